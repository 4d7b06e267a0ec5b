"""`--interface` and `--dscp`: the link that upstream connections take, and what their packets carry, seen by the exchange."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Callable, Iterator, List

import pytest
from harness import CHECKOUT, Exchange, Proxy, receive_exactly, reset, wait_until
from namespaces import Namespace
from rules import REWRITE, generated
from wire import ACK, DOWNSTREAM, FIN, UPSTREAM, Packet, Sniffer, Wire, introduce, join, settled

pytestmark = pytest.mark.root

FAMILIES = pytest.mark.parametrize("family", [4, 6])
BACKUP = "backup"  # the second link to an exchange
EF = 46
LEVERS = {"sysctl": (), "strip by rules": (), "rewrite by rules": REWRITE, "rules of tsproxy beside the sysctl": ()}


# --dscp


@contextlib.contextmanager
def sniffing(*places: Any) -> Iterator[List[Sniffer]]:
    """A sniffer on each (namespace, interface)."""
    sniffers = [Sniffer(*place) for place in places]
    try:
        yield sniffers
    finally:
        for sniffer in sniffers:
            sniffer.close_if_running()


def wire_with(make_wire: Callable[..., Wire], lever: str, *options: str) -> Wire:
    """A wire on which the lever holds; rules are generated for these options."""
    wire: Wire = make_wire(split=False, sysctl="0" if "sysctl" in lever else "1")
    if "rules" in lever:
        wire.rules(generated(*options))
    return wire


def live(wire: Wire, proxy: Proxy, far: Exchange, sniffer: Sniffer) -> None:
    """SYN, data, ACK, FIN, an ACK from TIME_WAIT; and a connection that is reset."""
    target = (far.host, far.port)
    client = wire.connect(proxy)
    server = far.accept()
    client.sendall(b"order")
    assert receive_exactly(server, 5) == b"order"
    server.sendall(b"filled")
    assert receive_exactly(client, 6) == b"filled"
    client.close()
    assert server.recv(1) == b""
    rule = f"tcp dport {far.port} tcp flags == ack drop"
    wire.exchange.run(
        "nft", "-f", "-", input=f"table inet deaf {{ chain in {{ type filter hook input priority 0; {rule}; }} ; }}"
    )
    server.close()  # our ACK of its FIN is not heard, so it comes again, and TIME_WAIT answers
    wait_until(lambda: answers_from_time_wait(sniffer.packets, target), "an ACK from TIME_WAIT", 30)
    wire.exchange.run("nft", "delete", "table", "inet", "deaf")
    client, server = wire.connect(proxy), far.accept()
    client.sendall(b"x")
    assert receive_exactly(server, 1) == b"x"
    reset(client)
    settled(sniffer, {"SYN", "data", "ACK", "FIN", "RST"}, target)


def answers_from_time_wait(packets: List[Packet], target: Any) -> bool:
    ours = [packet for packet in list(packets) if packet.target == target]
    after = next((at for at, packet in enumerate(ours) if packet.flags & FIN), len(ours))
    return sum(packet.flags == ACK for packet in ours[after:]) >= 2


@FAMILIES
@pytest.mark.parametrize("lever", LEVERS)
def test_each_upstream_packet_has_the_dscp_asked_for_and_keeps_ecn(make_wire: Any, lever: str, family: int) -> None:
    options = (*LEVERS[lever], f"--dscp={EF}")
    wire = wire_with(make_wire, lever, *options)
    for end in (wire.clean, wire.exchange):
        end.sysctl("tcp_ecn", "1")
    far = wire.far_end(family)
    proxy = wire.start(far, family, *options)
    with sniffing((wire.exchange, UPSTREAM), (wire.client, DOWNSTREAM)) as (upstream, downstream):
        assert f"dscp={EF}" in proxy.line("start")["knobs"]
        live(wire, proxy, far, upstream)
        sent = [packet for packet in upstream.stop() if packet.target == (far.host, far.port)]
        to_client = [packet for packet in downstream.stop() if packet.source == proxy.address]
    assert {packet.tos >> 2 for packet in sent} == {EF}
    assert 2 in {packet.tos & 3 for packet in sent if packet.payload}  # ECT(0), RFC 3168
    assert {packet.tos >> 2 for packet in to_client} == {0}
    assert {line["reason"] for line in proxy.lines if line["event"] == "connection"} <= {"closed", "client_reset"}


LEVERS_OF_OTHERS = {"trust beside rules": ("--trust-host",)}


@pytest.mark.parametrize("lever", [lever for lever in (*LEVERS, *LEVERS_OF_OTHERS) if "rules" in lever])
@pytest.mark.parametrize(("wanted", "made"), [(EF, None), (0, EF)])
def test_rules_that_set_another_dscp_end_the_start_and_check_with_one_line(
    make_wire: Any, lever: str, wanted: int, made: Any
) -> None:
    options = {**LEVERS, **LEVERS_OF_OTHERS}[lever]
    wire = wire_with(make_wire, lever, *LEVERS.get(lever, ()), *([] if made is None else [f"--dscp={made}"]))
    for command in ([], ["check"]):
        words = [*wire.clean.enter, *CHECKOUT, *command, "-t", "192.0.2.1:1", "-p0", *options, f"--dscp={wanted}"]
        ended = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
        allowed = f"{made or 0}, which packet filter rules set here (generate nftables --dscp={wanted} prints others)"
        assert (ended.returncode, ended.stderr) == (2, f"tsproxy.py: --dscp: given '{wanted}'; allowed: {allowed}\n")
        assert ended.stdout == ""


# --interface


@pytest.fixture
def wire() -> Iterator[Wire]:
    with contextlib.closing(Wire(split=False, sysctl="0")) as made:
        yield made


@pytest.fixture
def elsewhere(wire: Wire) -> Iterator[Namespace]:
    """Another exchange with the addresses of the first, behind a link of its own, which no route prefers."""
    with contextlib.closing(Namespace()) as made:
        link(wire, made)
        yield made


def link(wire: Wire, elsewhere: Namespace) -> None:
    join(wire.clean, elsewhere, BACKUP, 1)
    introduce(wire.clean, elsewhere, BACKUP, 1)
    for name in ("all", BACKUP):
        wire.clean.sysctl(f"conf/{name}/rp_filter", "0")  # by the routes the answers come from the wrong side


@contextlib.contextmanager
def twins(wire: Wire, elsewhere: Namespace, family: int) -> Iterator[List[Exchange]]:
    """Two far ends with the same address and port."""
    first = wire.far_end(family)
    with elsewhere:
        second = Exchange(host=first.host, port=first.port)
    yield [first, second]
    second.close()


def served_by(wire: Wire, proxy: Proxy, far: Exchange) -> None:
    with wire.connect(proxy) as client, far.accept() as server:
        client.sendall(b"here?")
        assert receive_exactly(server, 5) == b"here?"


@FAMILIES
@pytest.mark.parametrize("chosen", [UPSTREAM, BACKUP])
def test_upstream_connections_take_the_interface_asked_for_and_no_other(
    wire: Wire, elsewhere: Namespace, family: int, chosen: str
) -> None:
    with twins(wire, elsewhere, family) as fars, sniffing((wire.exchange, UPSTREAM), (elsewhere, BACKUP)) as sniffers:
        far = fars[chosen == BACKUP]
        proxy = wire.start(far, family, f"--interface={chosen}", "--user=nobody")
        assert f"interface={chosen}" in proxy.line("start")["knobs"]
        served_by(wire, proxy, far)
        assert proxy.line("connection")["reason"] == "closed"
        settled(sniffers[chosen == BACKUP], {"SYN", "data", "FIN"}, (far.host, far.port))
        assert proxy.stop() == 0
        assert [bool(sniffer.stop()) for sniffer in sniffers] == [chosen == UPSTREAM, chosen == BACKUP]


@FAMILIES
def test_each_route_takes_its_own_interface_to_the_same_address(wire: Wire, elsewhere: Namespace, family: int) -> None:
    """Two lines to one venue: also after a reload, in which the routes swap them, by a user without rights."""
    with tempfile.TemporaryDirectory() as directory, twins(wire, elsewhere, family) as fars:
        file = Path(directory) / "routes.ini"  # not in pytest's: nobody can't read that
        file.parent.chmod(0o755)

        def say(*interfaces: str) -> None:
            bind = wire.listen_address(family)
            sections = (f"[{name}]\nport = 0\ninterface = {link}\n" for name, link in zip(("main", "spare"), interfaces))
            file.write_text(f"[DEFAULT]\nbind = {bind}\ntarget = {fars[0].target}\n" + "".join(sections))

        say(UPSTREAM, BACKUP)
        with contextlib.closing(Proxy([*wire.clean.enter, *CHECKOUT], f"--routes={file}", "--user=nobody")) as proxy:
            for far in fars:
                reached(wire, proxy, ("main", "spare")[fars.index(far)], far)
            say(BACKUP, UPSTREAM)
            proxy.process.send_signal(signal.SIGHUP)
            assert proxy.line("reload").get("changed") == 2
            for far in fars:
                reached(wire, proxy, ("spare", "main")[fars.index(far)], far)
            assert proxy.stop() == 0


def reached(wire: Wire, proxy: Proxy, name: str, far: Exchange) -> None:
    """A client of this route reaches this far end."""
    route = proxy.line("route", lambda line: line["route"] == name)
    with wire.client:
        client = socket.create_connection((route["listen_address"], route["listen_port"]), 20)
    with client, far.accept() as server:
        client.sendall(b"here?")
        assert receive_exactly(server, 5) == b"here?"


def test_an_interface_that_goes_fails_new_connections_until_it_is_there_again(wire: Wire, elsewhere: Namespace) -> None:
    with twins(wire, elsewhere, 4) as (_, far):
        proxy = wire.start(far, 4, f"--interface={BACKUP}")
        served_by(wire, proxy, far)
        wire.clean.run("ip", "link", "delete", BACKUP)
        with wire.client:
            proxy.expect_reset()
        failed = proxy.line("connection", lambda line: line["reason"] == "connect_failed")
        assert (failed["termination_state"], failed["upstream_timestamps"]) == ("SC", None)
        gone = f"--interface={BACKUP} is no interface of this host any more: connections fail until there is one again"
        assert [line["message"] for line in [proxy.line("error")]] == [gone]
        link(wire, elsewhere)
        served_by(wire, proxy, far)
        assert proxy.metrics()["internal_errors_total"] == 0


@FAMILIES
def test_an_interface_may_be_a_vrf_whose_addresses_are_no_addresses_outside_it(
    wire: Wire, elsewhere: Namespace, family: int
) -> None:
    made = subprocess.run([*wire.clean.enter, "ip", "link", "add", "venue", "type", "vrf", "table", "10"], check=False)
    if made.returncode:
        pytest.skip("LOUD: this kernel has no VRF: that --interface takes one is NOT tested here, but in tests/deploy/kernels")
    address = "10.3.0.1/24" if family == 4 else "fd03::1/64"
    target = "10.3.0.2" if family == 4 else "fd03::2"
    for words in ("set venue up", f"set {BACKUP} master venue"):
        wire.clean.run("ip", "link", *words.split())
    nodad = ["nodad"] if family == 6 else []
    wire.clean.run("ip", "addr", "add", address, "dev", BACKUP, *nodad)
    elsewhere.run("ip", "addr", "add", f"{target}/{address.partition('/')[2]}", "dev", BACKUP, *nodad)
    with elsewhere:
        far = Exchange(host=target)
    proxy = wire.start(far, family, "--interface=venue", f"--source={address.partition('/')[0]}", "--user=nobody")
    served_by(wire, proxy, far)
    assert proxy.line("connection")["upstream_local_address"] == address.partition("/")[0]
    far.close()


@pytest.mark.parametrize("command", [(), ("--source=127.0.0.1",)], ids=["alone", "with a source"])
def test_an_interface_that_is_not_there_at_the_start_may_come_later(wire: Wire, command: Any) -> None:
    words = [*wire.clean.enter, *CHECKOUT, "-t", "192.0.2.1:1", "-p0", "--interface=eth9", *command]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    said = "tsproxy.py: --interface: given 'eth9'; allowed: an interface of this host (ip -brief link)\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (75, "", said)
