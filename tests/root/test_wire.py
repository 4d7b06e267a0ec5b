"""What really leaves: every packet of a connection's life, seen on the exchange's side of the wire.

SYN, SYN sent again, data, ACK, keepalive, zero-window probe, FIN, ACK from TIME_WAIT, RST: none may carry TSopt under
`strip`, each must carry the constant under `rewrite`; and the client's leg keeps its own timestamps.
"""

from __future__ import annotations

import contextlib
import hashlib
import socket
import threading
from pathlib import Path
from typing import Callable, Iterator, List, Set, Tuple

import pytest
from harness import PATIENCE, Exchange, Proxy, receive_exactly, reset, wait_until
from program import on_time
from rules import REWRITE, TSVAL, generated
from wire import ACK, DOWNSTREAM, RST, UPSTREAM, Packet, Sniffer, Wire, kinds, netstat, settled, tcpdump

pytestmark = pytest.mark.root

MIB = 1 << 20


LEVERS = ("sysctl with an inherited listener", "nftables")


@pytest.fixture(params=LEVERS)
def stripping(request: pytest.FixtureRequest, make_wire: Callable[..., Wire]) -> Wire:
    """A wire on which `strip` can be had: by the sysctl, or by the generated rules."""
    if request.param == LEVERS[0]:
        return make_wire(split=True, sysctl="0")
    wire = make_wire(split=False)
    wire.rules(generated())
    return wire


@contextlib.contextmanager
def listening(wire: Wire) -> Iterator[Tuple[Sniffer, Sniffer]]:
    """Sniffers on the exchange's and on the client's side."""
    upstream, downstream = Sniffer(wire.exchange, UPSTREAM), Sniffer(wire.client, DOWNSTREAM)
    try:
        yield upstream, downstream
    finally:
        upstream.close_if_running()
        downstream.close_if_running()


@contextlib.contextmanager
def dropping(wire: Wire, port: int, flags: str) -> Iterator[None]:
    """The exchange's kernel does not hear these segments; the sniffer, which stands before it, does."""
    rule = f"table inet deaf {{ chain in {{ type filter hook input priority 0; tcp dport {port} tcp flags {flags} drop; }} ; }}"
    wire.exchange.run("nft", "-f", "-", input=rule)
    try:
        yield
    finally:
        wire.exchange.run("nft", "delete", "table", "inet", "deaf")


def live(wire: Wire, proxy: Proxy, far: Exchange, sniffer: Sniffer) -> None:
    """One connection through all it can come to, and one that is reset."""
    target = (far.host, far.port)
    with dropping(wire, far.port, "& (syn|ack) == syn"):
        client = wire.connect(proxy)
        settled(sniffer, {"SYN", "SYN again"}, target)
    client, server = ordered(wire, proxy, far, client)
    server.sendall(b"filled")
    assert receive_exactly(client, 6) == b"filled"
    settled(sniffer, {"data", "ACK", "probe"}, target)  # idle now: the probe is the keepalive
    starve(client, server, sniffer, target)
    part(wire, client, server, sniffer, target)
    client, server = wire.connect(proxy), far.accept()
    client.sendall(b"x")
    assert receive_exactly(server, 1) == b"x"
    reset(client)
    settled(sniffer, {"RST"}, target)


def ordered(wire: Wire, proxy: Proxy, far: Exchange, client: socket.socket) -> Tuple[socket.socket, socket.socket]:
    """A client whose order has come, and the exchange's end.

    The connection of the first one is refused, as it should be, if the worker stood still for 0.25 s and the kernel sent its
    SYN again. Then it is another client's.
    """
    server = far.accept()
    client.sendall(b"order")
    try:
        assert receive_exactly(server, 5) == b"order"
        return client, server
    except ConnectionResetError:
        refused = proxy.line("connection")
        assert (refused["reason"], refused["upstream_retransmits"]) == ("policy", 1)
        client.close()
        server.close()
        return ordered(wire, proxy, far, wire.connect(proxy))


def starve(client: socket.socket, server: socket.socket, sniffer: Sniffer, target: Tuple[str, int]) -> None:
    """The exchange does not read: its window closes, and the proxy's kernel probes it."""
    client.setblocking(False)
    sent = 0

    def probed() -> bool:
        nonlocal sent
        with contextlib.suppress(BlockingIOError):
            while True:
                sent += client.send(bytes(MIB))
        packets = list(sniffer.packets)
        closed = next((n for n, p in enumerate(packets) if p.source == target and not p.window and p.flags == ACK), None)
        return (
            closed is not None
            and "probe" in kinds(packets, target)
            and any(
                p.target == target and not p.payload and p.sequence == before.sequence + before.payload - 1
                for p in packets[closed:]
                for before in [last_data(packets[:closed], target)]
            )
        )

    wait_until(probed, "a zero-window probe", 30)
    client.settimeout(PATIENCE)
    assert len(receive_exactly(server, sent)) == sent


def last_data(packets: List[Packet], target: Tuple[str, int]) -> Packet:
    first = packets[0].sequence
    return max((p for p in packets if p.target == target and p.payload), key=lambda p: (p.sequence - first) % 2**32)


def part(wire: Wire, client: socket.socket, server: socket.socket, sniffer: Sniffer, target: Tuple[str, int]) -> None:
    """The client closes first, so the proxy's socket ends in TIME_WAIT; unheard ACKs make it answer FINs from there."""
    client.close()
    assert server.recv(1) == b""
    settled(sniffer, {"FIN"}, target)
    with dropping(wire, target[1], "== ack"):
        before = len(sniffer.packets)
        server.close()

        def answered() -> bool:
            later = list(sniffer.packets)[before:]
            return sum(p.target == target and p.flags == ACK for p in later) >= 2

        wait_until(answered, "ACKs from TIME_WAIT", 30)


ALL_KINDS: Set[str] = {"SYN", "SYN again", "data", "ACK", "probe", "FIN", "RST"}


@pytest.mark.parametrize("family", [4, 6])
def test_strip_lets_no_timestamp_out_in_any_packet_of_a_life(stripping: Wire, family: int, tmp_path: Path) -> None:
    wire = stripping
    far = wire.far_end(family)
    proxy = wire.start(far, family, "--keepalive=1", "--connect-timeout=20", wrap=on_time())
    with listening(wire) as (upstream, downstream), tcpdump(wire.exchange, UPSTREAM, tmp_path / "pcap") as words:
        live(wire, proxy, far, upstream)
        packets, theirs = upstream.stop(), downstream.stop()
        said = words(len(packets))
    ours = [packet for packet in packets if packet.target == (far.host, far.port)]
    assert kinds(packets, (far.host, far.port)) == ALL_KINDS
    assert [packet for packet in ours if packet.tsval is not None] == []
    assert [line for line in said if "TS val" in line] == []
    # The client's own leg keeps its timestamps, from its SYN on.
    address = (proxy.address[0], proxy.address[1])
    stamped = [packet.tsval is not None for packet in theirs if packet.target == address and not packet.flags & RST]
    assert stamped
    assert all(stamped)
    lines = [proxy.line("connection"), proxy.line("connection", lambda line: line["reason"] == "client_reset")]
    for line in lines:
        assert (line["client_timestamps"], line["upstream_timestamps"]) == (True, False)
        assert line["client_syn_tsval"] in {packet.tsval for packet in theirs if packet.is_syn}


@pytest.mark.parametrize("family", [4, 6])
def test_rewrite_gives_each_packet_the_constant_and_nothing_else(
    make_wire: Callable[..., Wire], family: int, tmp_path: Path
) -> None:
    wire = make_wire(split=False)
    wire.rules(generated(*REWRITE))
    far = wire.far_end(family)
    proxy = wire.start(far, family, "--keepalive=1", "--connect-timeout=20", *REWRITE, wrap=on_time())
    assert proxy.line("start")["witness"] == "nftables"
    with listening(wire) as (upstream, _), tcpdump(wire.exchange, UPSTREAM, tmp_path / "pcap") as words:
        live(wire, proxy, far, upstream)
        packets = upstream.stop()
        said = words(len(packets))
    target = (far.host, far.port)
    assert kinds(packets, target) == ALL_KINDS
    # A reset of a connection that exists carries TSopt like any other segment.
    assert {packet.tsval for packet in packets if packet.target == target} == {TSVAL}
    outgoing = [line for line in said if f"{target[0]}.{target[1]}:" in line.split(" > ")[-1]]
    assert all(f"TS val {TSVAL} " in line for line in outgoing)


@pytest.mark.slow
def test_rewrite_moves_a_gibibyte_each_way_intact_and_no_paws_is_counted(make_wire: Callable[..., Wire]) -> None:
    wire = make_wire(split=False)
    wire.rules(generated(*REWRITE))
    far = wire.far_end(4)
    proxy = wire.start(far, 4, *REWRITE)
    client, server = wire.connect(proxy), far.accept()
    digests: List[str] = []
    workers = [threading.Thread(target=work) for work in both_ways(client, server, digests)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    client.close()
    server.close()
    assert len(set(digests)) == 1
    assert len(digests) == 4
    line = proxy.line("connection")
    assert (line["rx_bytes"], line["tx_bytes"], line["discarded_bytes"]) == (1024 * MIB, 1024 * MIB, 0)
    for namespace in (wire.clean, wire.exchange):
        counters = netstat(namespace)
        assert {name: value for name, value in counters.items() if "PAWS" in name and value} == {}
    assert proxy.metrics()["upstream_cx_connect_fail"] == 0


def both_ways(client: socket.socket, server: socket.socket, digests: List[str]) -> List[Callable[[], None]]:
    def push(sock: socket.socket) -> None:
        digest = hashlib.sha256()
        for number in range(1024):
            block = (b"%08d" % number) * (MIB // 8)
            digest.update(block)
            sock.sendall(block)
        sock.shutdown(socket.SHUT_WR)
        digests.append(digest.hexdigest())

    def pull(sock: socket.socket) -> None:
        digest, buffer = hashlib.sha256(), memoryview(bytearray(MIB))
        while count := sock.recv_into(buffer):
            digest.update(buffer[:count])
        digests.append(digest.hexdigest())

    return [lambda work=work, sock=sock: work(sock) for sock in (client, server) for work in (push, pull)]  # type: ignore[misc]
