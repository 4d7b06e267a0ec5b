"""What routers, firewalls and routes make of a connection: each errno has its ending, and none is taken for a bug.

The ICMP errors are real: nftables on the far host rejects with them. One connection for each kind, all at the same time.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any, Iterator, List

import pytest
from harness import CHECKOUT, Exchange, Proxy, receive_exactly
from namespaces import Namespace
from wire import ADDRESSES, UPSTREAM, Wire

V4 = ["net-unreachable", "host-unreachable", "prot-unreachable", "port-unreachable"]
V4 += ["net-prohibited", "host-prohibited", "admin-prohibited"]
V6 = ["no-route", "admin-prohibited", "addr-unreachable", "port-unreachable", "policy-fail", "reject-route"]
WAYS = {4: ("icmp", V4), 6: ("icmpv6", V6)}
FAMILIES = pytest.mark.parametrize("family", [4, 6])


@pytest.fixture
def wire() -> Iterator[Wire]:
    with contextlib.closing(Wire(split=False, sysctl="0")) as made:
        for space in (made.client, made.exchange):  # a host sends few ICMP errors a second by default
            space.sysctl("icmp_ratelimit", "0")
            space.sysctl("../ipv6/icmp/ratelimit", "0")
        yield made


def reject(space: Namespace, rules: List[str]) -> None:
    """From now on, in place of earlier ones."""
    space.run("nft", "add", "table", "inet", "errors")
    space.run("nft", "delete", "table", "inet", "errors")
    chain = "type filter hook input priority 0;\n" + "\n".join(rules)
    space.run("nft", "-f", "-", input=f"table inet errors {{\nchain in {{\n{chain}\n}}\n}}\n")


def no_bug(proxy: Proxy) -> None:
    assert proxy.metrics()["internal_errors_total"] == 0
    assert proxy.count("error") == 0


@pytest.mark.root
@FAMILIES
def test_an_icmp_error_ends_a_connect_attempt(wire: Wire, family: int) -> None:
    far = wire.far_end(family)
    proxy = wire.start(far, family, "--connect-timeout=60", "--log-level=debug")
    protocol, kinds = WAYS[family]
    for kind in kinds:
        reject(wire.exchange, [f"tcp dport {far.port} reject with {protocol} type {kind}"])
        seen = len(proxy.lines)
        with wire.client:
            proxy.expect_reset()
        line = proxy.line("connection", after=seen)
        wanted = "connect_refused" if kind == "port-unreachable" else "connect_failed"
        assert (kind, line["reason"], line["termination_state"]) == (kind, wanted, "SC")
    no_bug(proxy)


def relayed(wire: Wire, proxy: Proxy, far: Exchange, count: int) -> List[Any]:
    """(client, server) of so many connections that have relayed something."""
    pairs = []
    for _ in range(count):
        client, server = wire.connect(proxy), far.accept()
        client.sendall(b"x")
        assert receive_exactly(server, 1) == b"x"
        wire._stack.callback(client.close)
        pairs.append((client, server))
    return pairs


@pytest.mark.root
@FAMILIES
@pytest.mark.parametrize("side", ["client", "exchange"])
def test_an_icmp_error_on_an_established_connection_ends_it_as_gone(wire: Wire, family: int, side: str) -> None:
    """It is kept until no ACK has come for the user timeout. (To a keepalive probe Linux does not listen to any.)"""
    far = wire.far_end(family)
    proxy = wire.start(far, family, "--workers=1", "--keepalive=0", "--user-timeout=500")
    protocol, kinds = WAYS[family]
    pairs = relayed(wire, proxy, far, len(kinds))
    ports = [(client if side == "client" else server).getsockname()[1] for client, server in pairs]
    peers = [(client if side == "client" else server).getpeername()[1] for client, server in pairs]
    space = wire.client if side == "client" else wire.exchange
    matches = zip(ports, peers, kinds)
    reject(space, [f"tcp sport {peer} tcp dport {port} reject with {protocol} type {kind}" for port, peer, kind in matches])
    for client, server in pairs:
        (server if side == "client" else client).sendall(b"meets the error")
    for client, server in pairs:
        with pytest.raises(ConnectionResetError):
            (server if side == "client" else client).recv(1)
    who = "client" if side == "client" else "server"
    proxy.wait_lines()
    lines = [line for line in proxy.lines if line["event"] == "connection"]
    assert {(line["reason"], line["termination_state"]) for line in lines} == {
        (f"{who}_timeout", "CD" if who == "client" else "SD")
    }
    no_bug(proxy)


CHANGES = ["prohibit", "blackhole", "unreachable", "the interface is down", "the interface is gone"]


@pytest.mark.root
@pytest.mark.parametrize(("family", "change"), [*((4, change) for change in CHANGES), *((6, change) for change in CHANGES[:3])])
def test_a_route_or_interface_that_changes_ends_connections_as_gone(wire: Wire, family: int, change: str) -> None:
    far = wire.far_end(family)
    proxy = wire.start(far, family, "--workers=1", "--keepalive=1", "--user-timeout=500")
    ((client, _server),) = relayed(wire, proxy, far, 1)
    far_host = ADDRESSES[family][1] + "2"
    if change == "the interface is down":
        wire.clean.run("ip", "link", "set", UPSTREAM, "down")
    elif change == "the interface is gone":
        wire.clean.run("ip", "link", "del", UPSTREAM)
    else:
        wire.clean.run("ip", f"-{family}", "route", "add", change, far_host)
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    line = proxy.line("connection")
    assert (line["reason"], line["termination_state"]) == ("server_timeout", "SD")
    with wire.client:
        proxy.expect_reset()
    wanted = {"connect_failed"} if change in CHANGES[:3] else {"connect_failed", "policy"}
    assert proxy.line("connection", lambda line: line["reason"] != "server_timeout")["reason"] in wanted
    no_bug(proxy)


@pytest.mark.root
@FAMILIES
def test_a_filter_on_output_ends_connections_as_gone_and_attempts_as_failed(wire: Wire, family: int) -> None:
    far = wire.far_end(family)
    proxy = wire.start(far, family, "--workers=1", "--keepalive=0", "--user-timeout=500", "--connect-timeout=1")
    pairs = relayed(wire, proxy, far, 2)
    rules = [f"tcp dport {server.getsockname()[1]} tcp sport {server.getpeername()[1]}" for _, server in pairs]
    protocol = WAYS[family][0]
    verdicts = [f"{rules[0]} drop", f"{rules[1]} reject with {protocol} type admin-prohibited", f"tcp dport {far.port} drop"]
    chain = "\n".join(["type filter hook output priority 0;", *verdicts])
    wire.rules(f"table inet errors {{\nchain out {{\n{chain}\n}}\n}}\n")
    for client, _ in pairs:
        client.sendall(b"kept from leaving")
    for client, _ in pairs:
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    with wire.client:
        proxy.expect_reset()
    proxy.wait_lines()
    reasons = [line["reason"] for line in proxy.lines if line["event"] == "connection"]
    assert reasons[:2] == ["server_timeout"] * 2
    assert reasons[2] in ("connect_timeout", "connect_failed")
    no_bug(proxy)


# The kernel has no memory


@pytest.mark.parametrize("fault", ["sendto:error=ENOBUFS", "sendto:error=ENOMEM", "recvfrom:error=ENOMEM"])
def test_a_call_for_which_the_kernel_has_no_memory_is_made_again_later(exchange: Exchange, tmp_path: Path, fault: str) -> None:
    """strace(1) has it fail five times: the bytes wait, and the loop does not spin."""
    if not shutil.which("strace"):
        pytest.skip("LOUD: no strace: that a lack of memory is waited for is NOT tested here")
    call = fault.split(":")[0]
    trace = tmp_path / "trace"
    command = ["strace", "-D", "-f", "-qq", "-o", str(trace), "-e", f"trace={call}", "-e", f"inject={fault}:when=3..7"]
    words = ["-t", exchange.target, "-p0", "--workers=1", "--timestamps=preserve", "--metrics-interval=0", "--runtime=threads"]
    with contextlib.closing(Proxy([*command, *CHECKOUT], *words)) as proxy, proxy.connect() as client:
        server = exchange.accept()
        for number in range(9):
            for source, sink in ((client, server), (server, client)):
                source.sendall(b"order %d" % number)
                assert receive_exactly(sink, 7) == b"order %d" % number
        client.close()
        server.close()
        line = proxy.line("connection")
        assert (line["reason"], line["rx_bytes"], line["tx_bytes"], line["discarded_bytes"]) == ("closed", 63, 63, 0)
        no_bug(proxy)
        assert proxy.stop() == 0
    assert trace.read_text().count("INJECTED") == 5
