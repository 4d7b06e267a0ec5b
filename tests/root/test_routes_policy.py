"""Many routes of one process on the wire: each is proved by itself, refused by itself, and leaves by its own way."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Iterator, List, Optional

import pytest
from handover import HAND_OVER
from harness import CHECKOUT, ROOT, Exchange, Proxy, receive_exactly, wait_until
from rules import generated
from wire import SYN, UPSTREAM, Sniffer, Wire

pytestmark = pytest.mark.root

Start = Callable[..., Proxy]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts tsproxy in the clean namespace of a wire with a file of routes; `rewrite` and `reload` change that file."""
    file, started = tmp_path / "routes.ini", contextlib.ExitStack()

    def make(wire: Wire, text: str, *options: str) -> Proxy:
        file.write_text(text)
        proxy = Proxy([*wire.clean.enter, sys.executable, str(ROOT / "tsproxy.py")], f"--routes={file}", *options)
        started.callback(proxy.close)
        return proxy

    with started:
        yield make


def route_line(proxy: Proxy, name: str) -> Any:
    return proxy.line("route", lambda line: line["route"] == name)


def client_of(wire: Wire, proxy: Proxy, name: str) -> socket.socket:
    route = route_line(proxy, name)
    with wire.client:
        return socket.create_connection((route["listen_address"], route["listen_port"]), 20)


def is_served(wire: Wire, proxy: Proxy, name: str, far: Exchange) -> bool:
    """Whether a client's bytes arrive; else it is reset."""
    with client_of(wire, proxy, name) as client:
        try:
            client.sendall(b"order")
            with far.accept() as server:
                return receive_exactly(server, 5) == b"order"
        except (ConnectionResetError, BrokenPipeError, TimeoutError):
            return False


def is_refused(wire: Wire, proxy: Proxy, name: str) -> bool:
    """Whether a client is reset, at the latest when it has sent something."""
    with contextlib.suppress(ConnectionError), client_of(wire, proxy, name) as client:
        client.sendall(b"order")
        return client.recv(1) == b"never"
    return True


def section(wire: Wire, name: str, far: Exchange, *keys: str, family: int = 4) -> str:
    return "\n".join([f"[{name}]", "port = 0", f"bind = {wire.listen_address(family)}", f"target = {far.target}", *keys, ""])


@contextlib.contextmanager
def nobody() -> Iterator[None]:
    yield


def ended(wire: Wire, file: Path, *options: str) -> subprocess.CompletedProcess[str]:
    words = [*wire.clean.enter, *CHECKOUT, f"--routes={file}", *options]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)


# At the start


def test_a_start_ends_with_78_and_names_the_routes_that_can_not_be_proved_and_no_other(make_wire: Any, tmp_path: Path) -> None:
    wire, file = make_wire(split=False), tmp_path / "routes.ini"
    far = wire.far_end(4)
    kept = section(wire, "drop-copy", far, "timestamps = preserve")
    file.write_text(section(wire, "oe-primary", far) + section(wire, "oe-backup", far) + kept)
    done = ended(wire, file)
    assert done.returncode == 78
    first = done.stderr.splitlines()[0]
    assert first.startswith("tsproxy.py: [oe-primary] [oe-backup] --timestamps=strip can't be honoured here: ")
    assert "drop-copy" not in done.stderr
    assert "sysctl -w net.ipv4.tcp_timestamps=0" in done.stderr
    assert f"generate nftables --routes={file} | nft -f -\n" in done.stderr, "the set-up for all routes"
    assert done.stdout == ""


def test_of_many_routes_that_can_not_be_proved_some_are_named(make_wire: Any, tmp_path: Path) -> None:
    wire, file = make_wire(split=False), tmp_path / "routes.ini"
    far = wire.far_end(4)
    file.write_text("".join(section(wire, f"route-{number}", far) for number in range(30)))
    assert ended(wire, file).stderr.startswith("tsproxy.py: [route-0] [route-1] ")
    assert "[route-7] and 22 more: --timestamps=strip can't be honoured" in ended(wire, file).stderr


def test_a_family_whose_rules_are_missing_ends_the_start_for_the_routes_that_use_it(make_wire: Any, tmp_path: Path) -> None:
    wire, file = make_wire(split=False), tmp_path / "routes.ini"
    wire.rules(generated())
    wire.clean.run("nft", "insert", "rule", "inet", "tsproxy", "out", "meta", "nfproto", "ipv6", "accept")
    file.write_text(section(wire, "four", wire.far_end(4)) + section(wire, "six", wire.far_end(6)))
    done = ended(wire, file)
    assert (done.returncode, done.stderr[:32]) == (78, "tsproxy.py: [six] --timestamps=s")
    assert "[four]" not in done.stderr


def test_a_trusted_route_needs_no_lever(make_wire: Any, start: Start) -> None:
    wire = make_wire(split=False)
    far, other = wire.far_end(4), wire.far_end(4)
    text = section(wire, "seen", far, "timestamps = preserve") + section(wire, "vouched-for", other, "trust-host = on")
    proxy = start(wire, text)
    witnesses = {
        name: proxy.line("route", lambda line, name=name: line["route"] == name)["witness"] for name in ("seen", "vouched-for")
    }  # type: ignore[misc]
    assert witnesses == {"seen": "none", "vouched-for": "trusted"}
    assert is_served(wire, proxy, "seen", far)
    with client_of(wire, proxy, "vouched-for") as client:  # what the kernel negotiated shows that nobody strips
        client.sendall(b"order")
        with pytest.raises(ConnectionResetError):
            receive_exactly(client, 1)


# A drift


def test_a_drift_refuses_the_routes_that_it_concerns_and_no_other(make_wire: Any, start: Start) -> None:
    wire = make_wire(split=False, sysctl="0")
    first, second, seen = wire.far_end(4), wire.far_end(6), wire.far_end(4)
    text = section(wire, "four", first) + section(wire, "six", second) + section(wire, "seen", seen, "timestamps = preserve")
    proxy = start(wire, text)
    ends = {"four": first, "six": second, "seen": seen}
    assert all(is_served(wire, proxy, name, far) for name, far in ends.items())
    established, far_side = client_of(wire, proxy, "four"), first.accept()
    established.sendall(b"first")
    assert receive_exactly(far_side, 5) == b"first"
    wire.clean.sysctl("tcp_timestamps", "1")
    for name in ("four", "six"):
        drift = proxy.line("timestamps_drift", lambda line, name=name: line["route"] == name)  # type: ignore[misc]
        assert drift["level"] == "error"
        assert is_refused(wire, proxy, name)
    assert is_served(wire, proxy, "seen", seen)
    established.sendall(b"still")
    assert receive_exactly(far_side, 5) == b"still"
    wire.clean.sysctl("tcp_timestamps", "0")
    for name in ("four", "six"):
        proxy.line("timestamps_drift", lambda line, name=name: (line["route"], line["level"]) == (name, "info"))  # type: ignore[misc]
        wait_until(lambda name=name: is_served(wire, proxy, name, ends[name]), "it is served again")  # type: ignore[misc]
    established.close()
    far_side.close()
    assert proxy.stop() == 0
    assert {line["route"] for line in proxy.lines if line["event"] == "timestamps_drift"} == {"four", "six"}
    refused = [line["route"] for line in proxy.lines if line["event"] == "connection" and line["reason"] == "policy"]
    assert set(refused) == {"four", "six"}


def test_a_family_that_drifts_leaves_the_routes_over_the_other_one_alone(make_wire: Any, start: Start) -> None:
    wire = make_wire(split=False)
    wire.rules(generated())
    first, second = wire.far_end(4), wire.far_end(6)
    proxy = start(wire, section(wire, "four", first) + section(wire, "six", second))
    assert is_served(wire, proxy, "four", first) and is_served(wire, proxy, "six", second)
    wire.clean.run("nft", "insert", "rule", "inet", "tsproxy", "out", "meta", "nfproto", "ipv6", "accept")
    drift = proxy.line("timestamps_drift")
    assert (drift["route"], drift["level"]) == ("six", "error")
    assert is_refused(wire, proxy, "six")
    assert is_served(wire, proxy, "four", first)
    assert proxy.stop() == 0
    assert {line["route"] for line in proxy.lines if line["event"] == "timestamps_drift"} == {"six"}


def test_a_family_that_drifts_once_its_last_route_is_gone_is_no_drift_of_the_others(
    make_wire: Any, start: Start, tmp_path: Path
) -> None:
    wire = make_wire(split=False)
    wire.rules(generated())
    first, second = wire.far_end(4), wire.far_end(6)
    kept = section(wire, "four", first)
    proxy = start(wire, kept + section(wire, "six", second), "--metrics-interval=1.1")
    assert is_served(wire, proxy, "four", first) and is_served(wire, proxy, "six", second)
    (tmp_path / "routes.ini").write_text(kept)
    proxy.process.send_signal(1)
    assert proxy.line("reload")["removed"] == 1
    wire.rules(ACCEPT_FIRST.format("ipv6"))
    seen = proxy.count("metrics")
    wait_until(lambda: proxy.line("metrics", after=len(proxy.lines)) and proxy.count("metrics") > seen + 6, "a few looks at it")
    assert is_served(wire, proxy, "four", first)
    wire.rules(ACCEPT_FIRST.format("ipv4"))
    drift = proxy.line("timestamps_drift")
    assert drift["route"] == "four"
    assert "the witness SYN (IPv4) carries TSopt" in drift["message"]


ACCEPT_FIRST = "insert rule inet tsproxy out meta nfproto {} accept\n"


def test_a_drift_is_over_for_a_route_once_nothing_of_it_is_refused(make_wire: Any, start: Start) -> None:
    wire = make_wire(split=False)
    wire.rules(generated())
    first, second = wire.far_end(4), wire.far_end(6)
    proxy = start(wire, section(wire, "both", first, f"         {second.target}") + section(wire, "six", second))
    assert is_served(wire, proxy, "both", first) and is_served(wire, proxy, "six", second)
    wire.rules(ACCEPT_FIRST.format("ipv4") + ACCEPT_FIRST.format("ipv6"))
    wait_until(lambda: proxy.metrics() and proxy.count("timestamps_drift") == 3, "each route and family has drifted")
    wire.rules("delete table inet tsproxy\n" + generated() + ACCEPT_FIRST.format("ipv4"))
    assert proxy.line("timestamps_drift", lambda line: line["level"] == "info")["route"] == "six"
    again = proxy.line("timestamps_drift", lambda line: "policy holds again" in line["message"] and line["route"] == "both")
    assert again["level"] == "error"
    assert again["message"].endswith("; new connections over IPv4 are still refused")
    wire.rules("delete table inet tsproxy\n" + generated())
    ended = proxy.line("timestamps_drift", lambda line: (line["route"], line["level"]) == ("both", "info"))
    assert "still refused" not in ended["message"]


def test_a_reload_that_adds_a_route_which_can_not_be_proved_changes_nothing(
    make_wire: Any, start: Start, tmp_path: Path
) -> None:
    wire = make_wire(split=False)
    seen, far = wire.far_end(4), wire.far_end(4)
    kept = section(wire, "seen", seen, "timestamps = preserve")
    proxy = start(wire, kept)
    proxy.line("route")
    (tmp_path / "routes.ini").write_text(kept + section(wire, "oe", far))
    proxy.process.send_signal(1)
    refused = proxy.line("reload")
    assert refused["level"] == "error"
    assert refused["message"].startswith("[oe] --timestamps=strip can't be honoured here")
    assert is_served(wire, proxy, "seen", seen)
    wire.clean.sysctl("tcp_timestamps", "0")  # and now it can be: the first route of this process that is monitored
    proxy.process.send_signal(1)
    added = proxy.line("reload", lambda line: line["level"] == "info")
    assert (added["added"], added["unchanged"]) == (1, 1)
    assert is_served(wire, proxy, "oe", far)
    wire.clean.sysctl("tcp_timestamps", "1")
    assert proxy.line("timestamps_drift")["route"] == "oe"
    assert is_refused(wire, proxy, "oe")


def test_a_reload_during_a_drift_adds_no_route_that_would_leak(make_wire: Any, start: Start, tmp_path: Path) -> None:
    wire = make_wire(split=False, sysctl="0")
    far = wire.far_end(4)
    kept = section(wire, "oe", far)
    proxy = start(wire, kept)
    assert is_served(wire, proxy, "oe", far)
    wire.rules(generated())
    wire.clean.sysctl("tcp_timestamps", "1")  # by rules it would hold, but the gates of this process read the sysctl
    proxy.line("timestamps_drift")
    (tmp_path / "routes.ini").write_text(kept + section(wire, "another", far))
    proxy.process.send_signal(1)
    refused = proxy.line("reload")
    assert refused["level"] == "error"
    assert "held by nftables now, by sysctl at the start" in refused["message"]


# Where they leave, and what they carry


def test_each_route_leaves_by_its_own_source_and_dscp(make_wire: Any, start: Start) -> None:
    wire = make_wire(split=False, sysctl="0")
    wire.clean.run("ip", "address", "add", "198.51.100.77/32", "dev", "lo")
    wire.exchange.run("ip", "route", "add", "198.51.100.77/32", "via", wire.exchange_address(4)[:-1] + "1")
    far, other = wire.far_end(4), wire.far_end(4)
    text = section(wire, "plain", far) + section(wire, "marked", other, "source = 198.51.100.77", "dscp = 46")
    proxy = start(wire, text)
    with contextlib.closing(Sniffer(wire.exchange, UPSTREAM)) as sniffer:
        assert is_served(wire, proxy, "plain", far) and is_served(wire, proxy, "marked", other)
        packets = sniffer.stop()

    plain, marked = ([packet for packet in packets if packet.target == (end.host, end.port)] for end in (far, other))
    ours = wire.exchange_address(4)[:-1] + "1"
    assert {(packet.source[0], packet.tos >> 2) for packet in plain} == {(ours, 0)}
    assert {(packet.source[0], packet.tos >> 2) for packet in marked} == {("198.51.100.77", 46)}
    assert [packet for packet in (*plain, *marked) if packet.tsval is not None] == []


@pytest.mark.parametrize("dscp", [None, 46, *range(0, 64, 4)])  # a TOS sets the priority, too, by which rules know a socket
def test_a_route_that_preserves_timestamps_keeps_them_beside_rules_for_another(
    make_wire: Any, start: Start, dscp: Optional[int]
) -> None:
    wire = make_wire(split=False)
    wire.rules(generated())
    far, seen = wire.far_end(4), wire.far_end(4)
    keys = ["timestamps = preserve", *([] if dscp is None else [f"dscp = {dscp}"])]
    proxy = start(wire, section(wire, "oe", far) + section(wire, "seen", seen, *keys))
    with contextlib.closing(Sniffer(wire.exchange, UPSTREAM)) as sniffer:
        assert is_served(wire, proxy, "oe", far) and is_served(wire, proxy, "seen", seen)
        packets = sniffer.stop()
    stripped, kept = ([packet for packet in packets if packet.target == (end.host, end.port)] for end in (far, seen))
    assert {packet.tsval is None for packet in stripped} == {True}
    assert {packet.tsval is None for packet in kept if packet.payload or packet.flags & SYN} == {False}
    assert {packet.tos >> 2 for packet in kept} == {dscp or 0}


# Sockets that a service manager hands over


def handed(wire: Wire, file: Path, names: List[str], sockets: List[socket.socket]) -> Proxy:
    fds = [sock.fileno() for sock in sockets]
    enter, *entered = wire.clean.enter
    command = [str(shutil.which(enter)), *entered, *CHECKOUT, f"--routes={file}"]
    environment = {**os.environ, "LISTEN_FDS": str(len(fds)), "LISTEN_FDNAMES": ":".join(names)}
    return Proxy([sys.executable, "-c", HAND_OVER, ",".join(map(str, fds)), *command], pass_fds=fds, env=environment)


def test_a_socket_that_is_named_like_a_route_is_its_listener_also_after_a_reload(make_wire: Any, tmp_path: Path) -> None:
    """Several may have one name: a socket for each address family."""
    wire, file = make_wire(split=False, sysctl="0"), tmp_path / "routes.ini"
    far, other = wire.far_end(4), wire.far_end(4)
    own = section(wire, "own", other)
    file.write_text(f"[oe-primary]\ntarget = {far.target}\n{own}")
    with wire.clean, contextlib.ExitStack() as socks:
        four = socks.enter_context(socket.create_server((wire.listen_address(4), 0)))
        six = socks.enter_context(socket.create_server((wire.listen_address(6), 0), family=socket.AF_INET6))
        proxy = handed(wire, file, ["oe-primary", "oe-primary"], [four, six])
        addresses = [four.getsockname(), six.getsockname()]
    try:
        route = proxy.line("route", lambda line: line["route"] == "oe-primary")
        assert len(route["listeners"]) == 2
        for reloads in range(3):
            for address in addresses:
                with wire.client, socket.create_connection(address[:2], 20) as client, far.accept() as server:
                    client.sendall(b"order")
                    assert receive_exactly(server, 5) == b"order"
            assert is_served(wire, proxy, "own", other)
            gone = [own, f"[oe-primary]\ntarget = {far.target}\nmax-connections = 7\n{own}"]
            for text in gone:  # it goes, and comes again with other options
                seen = len(proxy.lines)
                file.write_text(text)
                proxy.process.send_signal(1)
                assert proxy.line("reload", after=seen)["level"] == "info", reloads
        assert proxy.stop() == 0
    finally:
        proxy.close()


@pytest.mark.parametrize(
    ("names", "keys", "said"),
    [
        (["other"], "port = 1", "LISTEN_FDNAMES: given 'other'; allowed: the name of a route of "),
        (
            ["oe"],
            "port = 1",
            ":3: [oe] port: given '1'; allowed: nothing: a socket of the route's name was handed over (LISTEN_FDNAMES)",
        ),
        (["oe"], "bind = ::1", ":3: [oe] bind: given '::1'; allowed: nothing"),
    ],
)
def test_a_socket_that_fits_no_route_ends_with_2_and_one_line(
    names: List[str], keys: str, said: str, make_wire: Any, tmp_path: Path
) -> None:
    wire, file = make_wire(split=False, sysctl="0"), tmp_path / "routes.ini"
    file.write_text(f"[oe]\ntarget = 127.0.0.1:1\n{keys}\n")
    with wire.clean, socket.create_server(("127.0.0.1", 0)) as listener:
        proxy = handed(wire, file, names, [listener])
    try:
        assert proxy.wait() == 2
        (line,) = proxy.stderr().splitlines()
        assert said in line
    finally:
        proxy.close()
