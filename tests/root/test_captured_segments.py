"""Segments of the upstream connection: what a line says was sent and received, beside a capture of that leg.

Nothing joins segments on this wire (gso_max_segs is 1) but where a test wants it: a captured packet is a segment. What the
kernel had counted when TCP_INFO was read is what had crossed before the first packet of close(2): a FIN behind the exchange's
own, or a reset.
"""

from __future__ import annotations

import contextlib
import socket
from typing import Any, Callable, Iterator, List, NamedTuple, Tuple

import pytest
from harness import Exchange, Line, Proxy, receive_all, receive_exactly, reset, wait_until
from namespaces import Namespace
from wire import ACK, FIN, RST, SYN, UPSTREAM, Packet, Sniffer, Wire

pytestmark = pytest.mark.root

LONG, MSS = 3_000_000, 1460
ONE_LOOP = "--workers=1", "--runtime=threads"


class Leg(NamedTuple):
    """A wire, a proxy and an exchange."""

    wire: Wire
    proxy: Proxy
    far: Exchange


@pytest.fixture(scope="module")
def leg() -> Iterator[Leg]:
    with contextlib.closing(Wire(split=False, sysctl="0")) as wire:
        limit_packets(wire, 1)
        far = wire.far_end(4)
        yield Leg(wire, wire.start(far, 4, *ONE_LOOP), far)


def limit_packets(wire: Wire, segments: int) -> None:
    """Nobody joins more segments into one packet (GSO)."""
    for namespace in (wire.clean, wire.exchange):
        namespace.run("ip", "link", "set", UPSTREAM, "gso_max_segs", str(segments))


class Session:
    """One connection through the proxy, its upstream leg captured from the SYN on."""

    def __init__(self, leg: Leg) -> None:
        self.leg = leg
        self._tap = Sniffer(leg.wire.clean, UPSTREAM)
        self.client = leg.wire.connect(leg.proxy)
        self.server = leg.far.accept()
        self.local: Tuple[str, int] = self.server.getpeername()
        self.ordered = self.filled = 0  # bytes

    def trade(self) -> None:
        """Five requests, each with its response."""
        for number in range(5):
            self.order(b"order %d" % number)
            self.fill(b"fill %d" % number)

    def order(self, text: bytes) -> None:
        self.client.sendall(text)
        self.ordered += len(text)
        assert receive_exactly(self.server, len(text)) == text

    def fill(self, text: bytes) -> None:
        self.server.sendall(text)
        self.filled += len(text)
        assert receive_exactly(self.client, len(text)) == text

    def line(self) -> Line:
        return self.leg.proxy.line("connection", lambda line: line["upstream_local_port"] == self.local[1])

    def packets(self) -> List[Packet]:
        """Those of this connection so far."""
        return [packet for packet in list(self._tap.packets) if self.local in (packet.source, packet.target)]

    def wait_for(self, crossed: Callable[[Packet], Any], what: str, times: int = 1) -> None:
        wait_until(lambda: sum(bool(crossed(packet)) for packet in self.packets()) >= times, what)

    def sends(self, flag: int) -> Callable[[Packet], bool]:
        """Whether a packet is the proxy's, and has that flag."""
        return lambda packet: packet.source == self.local and bool(packet.flags & flag)

    def close(self) -> None:
        self._tap.close_if_running()
        self.client.close()
        self.server.close()


@pytest.fixture
def session(leg: Leg) -> Iterator[Session]:
    with contextlib.closing(Session(leg)) as made:
        yield made


@contextlib.contextmanager
def cut(namespace: Namespace, hook: str, packets: str, verdict: str = "drop") -> Iterator[Callable[[], int]]:
    """A rule there, by default for what is dropped; yields what tells how many packets it has matched, also later.

    What the exchange drops on its way in has crossed the wire, on its way out it has not.
    """
    chain = f"chain segments {{ type filter hook {hook} priority 0; {packets} counter name matched {verdict}; }}"
    namespace.run("nft", "-f", "-", input=f"table inet cut {{ counter matched {{ }} ; {chain} ; }}")
    total: List[int] = []

    def matched() -> int:
        listed = namespace.run("nft", "list", "counters", "table", "inet", "cut") if not total else ""
        return int(listed.partition("packets ")[2].split()[0]) if listed else total[0]

    try:
        yield matched
    finally:
        namespace.run("nft", "flush", "chain", "inet", "cut", "segments")
        total.append(matched())
        namespace.run("nft", "delete", "table", "inet", "cut")


def counted(packets: List[Packet], local: Tuple[str, int]) -> Tuple[int, int]:
    """How many segments `local` has sent and received in them."""
    segments = [(packet, max(1, -(-packet.payload // MSS))) for packet in packets]
    sent = sum(count for packet, count in segments if packet.source == local)
    return sent, sum(count for packet, count in segments if packet.target == local)


def settle(session: Session, fins: int) -> None:
    """Wait until all bytes and that many FINs have crossed and are acknowledged, for an ACK may be delayed."""

    def is_settled() -> bool:
        packets = session.packets()
        sent = {packet.source: (packet.sequence + packet.payload + (packet.flags & FIN)) % 2**32 for packet in packets}
        seen = {packet.target: packet.acknowledges for packet in packets}
        has_bytes = sum(packet.payload for packet in packets) >= session.ordered + session.filled
        return sent == seen and has_bytes and sum(packet.flags & FIN for packet in packets) >= fins

    wait_until(is_settled, "all has crossed and is acknowledged")


def told(line: Line) -> Tuple[int, int]:
    return line["upstream_segments_sent"], line["upstream_segments_received"]


def before(packets: List[Packet], first: Callable[[Packet], bool]) -> List[Packet]:
    """The packets in front of the first such one, which must be there."""
    index = next(index for index, packet in enumerate(packets) if first(packet))
    return packets[:index]


def test_segments_after_the_clients_fin_are_all_counted_with_the_syn_both_fins_and_the_last_ack(session: Session) -> None:
    session.trade()
    session.client.shutdown(socket.SHUT_WR)
    assert receive_all(session.server) == b""
    session.fill(b"late fill")
    session.server.close()
    assert receive_all(session.client) == b""
    line = session.line()
    settle(session, fins=2)
    packets = session.packets()
    assert {SYN, SYN | ACK} <= {packet.flags for packet in packets}
    assert sum(bool(packet.flags & FIN) for packet in packets) == 2
    assert told(line) == counted(packets, session.local)
    assert line["reason"] == "closed"


def test_segments_of_close_after_the_exchanges_fin_are_not_counted_our_fin_and_the_ack_of_it(session: Session) -> None:
    half_close(session)
    session.order(b"late order")
    settle(session, fins=1)
    session.client.close()
    line = session.line()
    fin = session.sends(FIN)
    session.wait_for(fin, "the proxy's FIN")
    assert told(line) == counted(before(session.packets(), fin), session.local)
    assert line["reason"] == "closed"


def test_our_fin_is_counted_and_what_is_sent_again_if_bytes_before_it_were_not_acknowledged(session: Session) -> None:
    half_close(session)
    with cut(session.leg.wire.exchange, "output", "tcp flags & ack == ack"):
        session.client.sendall(b"late order")
        session.client.close()
        session.wait_for(session.sends(FIN), "FIN twice", 2)
    line = session.line()
    settle(session, fins=2)
    assert told(line) == counted(session.packets(), session.local)
    assert line["reason"] == "closed"


def half_close(session: Session) -> None:
    """From the exchange's side, and all is acknowledged."""
    session.trade()
    session.server.shutdown(socket.SHUT_WR)
    assert receive_all(session.client) == b""
    settle(session, fins=1)


def test_segments_before_a_clients_reset_are_counted_and_the_reset_that_passes_it_on_is_not(session: Session) -> None:
    session.trade()
    settle(session, fins=0)
    reset(session.client)
    line = session.line()
    rst = session.sends(RST)
    session.wait_for(rst, "the proxy's RST")
    assert told(line) == counted(before(session.packets(), rst), session.local)
    assert line["reason"] == "client_reset"


def test_segments_before_an_idle_timeout_are_counted_and_its_reset_is_not(leg: Leg) -> None:
    proxy = leg.wire.start(leg.far, 4, *ONE_LOOP, "--idle-timeout=500ms")
    with contextlib.closing(proxy), contextlib.closing(Session(leg._replace(proxy=proxy))) as session:
        session.trade()
        line, rst = session.line(), session.sends(RST)
        session.wait_for(rst, "the proxy's RST")
        assert told(line) == counted(before(session.packets(), rst), session.local)
        assert line["reason"] == "idle_timeout"


def test_an_exchanges_reset_is_a_segment_that_was_received(session: Session) -> None:
    session.trade()
    settle(session, fins=0)
    reset(session.server)
    line = session.line()
    session.wait_for(lambda packet: packet.target == session.local and packet.flags & RST, "the exchange's RST")
    assert told(line) == counted(session.packets(), session.local)
    assert line["reason"] == "server_reset"


@pytest.fixture(params=[1, 64], ids=["one a packet", "64 a packet"])
def joined(leg: Leg, request: pytest.FixtureRequest) -> Iterator[int]:
    """How many segments a packet of the capture may be made of."""
    limit_packets(leg.wire, request.param)
    yield request.param
    limit_packets(leg.wire, 1)


@pytest.mark.parametrize("sender", ["client", "server"])
def test_segments_of_a_long_stream_are_those_of_the_wire_however_they_are_joined(
    joined: int, session: Session, sender: str
) -> None:
    sides = {"client": session.client, "server": session.server}
    busy = sides.pop(sender)
    (quiet,) = sides.values()
    for start in range(0, LONG, LONG // 10):  # in parts, for the test is one thread
        busy.sendall(bytes(LONG // 10))
        assert len(receive_exactly(quiet, LONG // 10)) == LONG // 10, start
    session.ordered = LONG
    session.client.shutdown(socket.SHUT_WR)
    assert receive_all(session.server) == b""
    session.server.close()
    assert receive_all(session.client) == b""
    line = session.line()
    settle(session, fins=2)
    packets = session.packets()
    assert sum(packet.payload for packet in packets) >= LONG
    assert (max(packet.payload for packet in packets) > MSS) is (joined > 1)
    assert told(line) == counted(packets, session.local)
    assert told(line)[sender == "server"] > LONG // MSS


def test_segments_that_are_sent_again_count_each_time(leg: Leg) -> None:
    with contextlib.ExitStack() as stack:
        tap = Sniffer(leg.wire.clean, UPSTREAM)
        stack.callback(tap.close_if_running)
        proxy = leg.wire.start(leg.far, 4, *ONE_LOOP, "--timestamps=preserve")  # strip dials anew
        stack.callback(proxy.close)

        def orders() -> List[Packet]:
            return [packet for packet in list(tap.packets) if packet.target[1] == leg.far.port and packet.payload]

        with cut(leg.wire.exchange, "input", "tcp flags & (syn | ack) == syn"):
            client = stack.enter_context(leg.wire.connect(proxy))
            wait_until(lambda: sum(packet.is_syn for packet in list(tap.packets)) >= 2, "the SYN was sent again")
        server = stack.enter_context(leg.far.accept())
        with cut(leg.wire.exchange, "input", "tcp flags & psh == psh"):
            client.sendall(b"order")
            wait_until(lambda: len(orders()) >= 3, "the order was sent again")
        assert receive_exactly(server, 5) == b"order"
        client.shutdown(socket.SHUT_WR)
        assert receive_all(server) == b""
        server.close()
        line = proxy.line("connection")
        packets = tap.stop()
    assert told(line) == counted(packets, next(packet.source for packet in packets if packet.is_syn))
    assert line["upstream_retransmits"] == sum(packet.is_syn for packet in packets) - 1 + len(orders()) - 1


def test_segments_that_the_proxys_own_host_drops_count_on_their_way_out_and_not_on_their_way_in(session: Session) -> None:
    host = session.leg.wire.clean
    with cut(host, "output", "oifname upstream tcp flags & psh == psh") as unsent:
        session.client.sendall(b"order")
        wait_until(lambda: unsent() >= 2, "the order was dropped twice")
    assert receive_exactly(session.server, 5) == b"order"
    with cut(host, "input", "iifname upstream tcp flags & psh == psh") as unreceived:
        session.server.sendall(b"fill")
        wait_until(lambda: unreceived() >= 2, "the fill was dropped twice")
    assert receive_exactly(session.client, 4) == b"fill"
    session.ordered, session.filled = 5, 4
    settle(session, fins=0)
    reset(session.client)
    line, rst = session.line(), session.sends(RST)
    session.wait_for(rst, "the proxy's RST")
    sent, received = counted(before(session.packets(), rst), session.local)
    assert told(line) == (sent + unsent(), received - unreceived())


def test_segments_of_a_connection_that_never_was_are_null(leg: Leg) -> None:
    with cut(leg.wire.exchange, "input", "tcp flags & (syn | ack) == syn", "reject with tcp reset"):
        with contextlib.suppress(ConnectionResetError), leg.wire.connect(leg.proxy) as client:
            assert client.recv(1) == b""
    line = leg.proxy.line("connection", lambda line: line["reason"] == "connect_refused")
    assert told(line) == (None, None)
