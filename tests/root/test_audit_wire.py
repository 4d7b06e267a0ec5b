"""`audit` beside the wire: tsproxy relays between namespaces, tcpdump captures both legs, and the captures are judged."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import pytest
from harness import CHECKOUT, Exchange, Proxy, echo, receive_exactly
from wire import DOWNSTREAM, UPSTREAM, Sniffer, Wire, tcpdump

REWRITE = ("--timestamps=rewrite", "--static-timestamp=123456789")
CONNECTIONS = 3


@contextlib.contextmanager
def captured(wire: Wire, tmp_path: Path) -> Iterator[List[Path]]:
    """The captures of both legs, whole when the block has ended."""
    paths = [tmp_path / "clients.pcap", tmp_path / "exchange.pcap"]
    legs = ((wire.client, DOWNSTREAM), (wire.exchange, UPSTREAM))
    with contextlib.ExitStack() as stack:
        reads = [stack.enter_context(tcpdump(*leg, path)) for leg, path in zip(legs, paths)]
        sniffers = [Sniffer(*leg) for leg in legs]
        for sniffer in sniffers:
            stack.callback(sniffer.close_if_running)
        yield paths
        for read, sniffer in zip(reads, sniffers):
            read(len(sniffer.stop()))


def trade(wire: Wire, proxy: Proxy) -> None:
    """A few connections, with orders over a little more than a second."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(wire.connect(proxy)) for _ in range(CONNECTIONS)]
        for _ in range(12):
            for client in clients:
                client.sendall(b"order")
                assert receive_exactly(client, 5) == b"order"
            time.sleep(0.1)  # the clock is to go on meanwhile
    for number in range(CONNECTIONS):
        proxy.line("connection", lambda line, number=number: line["connection_id"] == number + 1)  # type: ignore[misc]


def audit(*words: str) -> Tuple[int, List[Dict[str, Any]], Dict[str, Any]]:
    """The exit code, the flows, and the end."""
    done = subprocess.run([*CHECKOUT, "audit", *words, "--json"], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    *flows, end = map(json.loads, done.stdout.splitlines())
    return done.returncode, flows, end


def relayed(wire: Wire, family: int, tmp_path: Path, *options: str) -> Tuple[List[str], Path, Exchange]:
    """The two captures of a whole life of tsproxy, its lines, and the exchange."""
    far = wire.far_end(family, echo)
    with captured(wire, tmp_path) as paths:
        proxy = wire.start(far, family, *options)
        trade(wire, proxy)
        assert proxy.stop() == 0
    lines = tmp_path / "lines.json"
    lines.write_text("".join(f"{json.dumps(line)}\n" for line in proxy.lines))
    return [str(path) for path in paths], lines, far


def verdicts(flows: List[Dict[str, Any]], far: Exchange) -> Dict[str, List[str]]:
    """The verdicts of what went to the exchange, of what came from there, and of the clients' leg."""
    found: Dict[str, List[str]] = {"to the exchange": [], "from the exchange": [], "clients": []}
    for flow in flows:
        to = (flow["destination"], flow["destination_port"]) == (far.host, far.port)
        came = (flow["source"], flow["source_port"]) == (far.host, far.port)
        found["to the exchange" if to else "from the exchange" if came else "clients"].append(flow["verdict"])
    return found


@pytest.mark.parametrize("family", [4, 6])
def test_under_strip_the_clients_leg_leaks_the_other_is_clean_and_the_lines_agree(
    make_wire: Any, family: int, tmp_path: Path
) -> None:
    captures, lines, far = relayed(make_wire(split=True, sysctl="0"), family, tmp_path)
    code, flows, end = audit(*captures, f"--lines={lines}")
    assert verdicts(flows, far) == {
        "to the exchange": ["CLEAN"] * CONNECTIONS,
        "from the exchange": ["CLEAN"] * CONNECTIONS,
        "clients": ["LEAK"] * 2 * CONNECTIONS,
    }
    assert (code, end["verdict"], end["files"]) == (78, "LEAK", 2)
    assert end["claimed_clean_seen_clean"] == CONNECTIONS
    assert (end["claimed_clean_seen_leaking"], end["claimed_not_seen"], end["seen_not_claimed"]) == (0, 0, 0)
    clocks = [flow for flow in flows if flow["verdict"] == "LEAK"]
    assert {flow["clock_class"] for flow in clocks} == {"1000 Hz"}
    assert {flow["first_leak_file"] for flow in clocks} == {captures[0]}
    code, flows, end = audit(*captures, f"--lines={lines}", "-t", far.target)
    assert (code, end["verdict"], len(flows)) == (0, "CLEAN", CONNECTIONS)
    assert end["claimed_clean_seen_clean"] == CONNECTIONS


def test_under_rewrite_the_leg_to_the_exchange_is_constant_and_the_lines_agree(make_wire: Any, tmp_path: Path) -> None:
    wire = make_wire(split=False)
    generate = [*CHECKOUT, "generate", "nftables", "-t", "10.2.0.2:1", *REWRITE]
    wire.rules(subprocess.run(generate, capture_output=True, text=True, check=True).stdout)
    captures, lines, far = relayed(wire, 4, tmp_path, *REWRITE)
    code, flows, end = audit(*captures, f"--lines={lines}", "-t", far.target)
    assert verdicts(flows, far)["to the exchange"] == ["CONSTANT"] * CONNECTIONS
    assert {flow["clock_class"] for flow in flows} == {"constant"}
    assert {flow["clock_group"] for flow in flows} == {None}
    assert (code, end["verdict"]) == (0, "CONSTANT")
    assert end["claimed_clean_seen_clean"] == CONNECTIONS
    assert (end["claimed_clean_seen_leaking"], end["claimed_not_seen"], end["seen_not_claimed"]) == (0, 0, 0)


def test_under_preserve_the_lines_claim_no_clean_connection_and_the_wire_shows_none(make_wire: Any, tmp_path: Path) -> None:
    captures, lines, far = relayed(make_wire(split=False, sysctl="2"), 4, tmp_path, "--timestamps=preserve")
    code, flows, end = audit(*captures, f"--lines={lines}")
    assert set(verdicts(flows, far)["to the exchange"]) == {"LEAK"}
    assert code == 78
    assert {name: end[name] for name in end if "claimed" in name} == {
        "claimed_clean_seen_clean": 0,
        "claimed_clean_seen_leaking": 0,
        "claimed_not_seen": 0,
        "seen_not_claimed": 0,
    }
    # net.ipv4.tcp_timestamps=2: no random offset, so the flows of one host show one clock, whatever their ports.
    assert len({flow["clock_group"] for flow in flows if flow["destination"] == far.host} - {None}) == 1
