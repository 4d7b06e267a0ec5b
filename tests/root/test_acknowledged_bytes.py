"""What a line says was sent is what the peer's kernel acknowledged: each way to end, beside a capture of both legs.

One side reads nothing, so bytes wait everywhere: in its kernel, in ours, in the proxy. Then the connection ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Tuple

import pytest
from harness import Exchange, Line, Proxy, children, fill, free_port, receive_all, receive_exactly, reset, wait_until
from namespaces import Namespace
from program import EACH_RUNTIME, checkout_alone, python_for
from wire import ACK, DOWNSTREAM, FIN, RST, SYN, UPSTREAM, Packet, Sniffer, Wire

SMALL = 4096  # receive buffer of who does not read
LITTLE = 8192  # more than that, less than the kernel takes from the proxy
SIDES = ("client", "server")
End = Tuple[str, int]


@pytest.fixture(scope="module")
def wire() -> Iterator[Wire]:
    with contextlib.closing(Wire(split=False, sysctl="0")) as made:
        yield made


class Session:
    """One connection through a proxy of its own, both legs captured; `slow` reads nothing, `busy` sends to it."""

    def __init__(self, wire: Wire, slow: str, *options: str) -> None:
        self.wire, self.slow_side = wire, slow
        self.far = wire.far_end(4)
        if slow == "server":
            self.far.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
        self.proxy = wire.start(self.far, 4, "--workers=1", "--runtime=threads", *options)
        address = self.proxy.address
        self.taps = Sniffer(wire.client, DOWNSTREAM), Sniffer(wire.exchange, UPSTREAM)
        with wire.client:
            client = socket.socket()
        client.settimeout(20)
        if slow == "client":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
        client.connect(address)
        self.sides: Dict[str, socket.socket] = {"client": client, "server": self.far.accept()}
        self.slow, self.busy = self.sides[slow], self.sides[SIDES[1 - SIDES.index(slow)]]
        self.slow.sendall(b"logon")
        assert receive_exactly(self.busy, 5) == b"logon"

    def choke(self) -> None:
        """Send until bytes wait in the proxy, too, and nothing more fits."""
        self.sent = 0

        def is_choked() -> bool:
            self.sent += fill(self.busy)
            metrics = self.proxy.metrics()
            return any(value for name, value in metrics.items() if name.endswith("paused_reading_total"))

        wait_until(is_choked, "the proxy has paused the busy side")

    def seen(self, line: Line) -> Tuple[int, int]:
        """How many bytes client and exchange have acknowledged, by the capture."""
        legs = [tap.stop() for tap in self.taps]
        client = line["client_address"], line["client_port"]
        return acknowledged(legs[0], client, self.proxy.address), acknowledged(
            legs[1], (self.far.host, self.far.port), (line["upstream_local_address"], line["upstream_local_port"])
        )

    def close(self) -> None:
        for tap in self.taps:
            tap.close_if_running()
        for sock in self.sides.values():
            sock.close()
        self.proxy.close()
        self.far.close()


def acknowledged(packets: List[Packet], by: End, of: End) -> int:
    """The bytes of `of` that segments from `by` acknowledge. What a reset says is not taken for an ACK."""
    ours = [packet for packet in packets if (packet.source, packet.target) == (of, by)]
    theirs = [packet for packet in packets if (packet.source, packet.target) == (by, of)]
    first = next(packet.sequence for packet in ours if packet.flags & SYN) + 1
    offsets = [(packet.acknowledges - first) % 2**32 for packet in theirs if packet.flags & (ACK | RST) == ACK]
    fins = [(packet.sequence + packet.payload - first) % 2**32 for packet in ours if packet.flags & FIN]
    highest = max(offset for offset in offsets if offset < 2**31)
    return min([highest, *fins])


def breaks(side: str) -> Callable[[Session], None]:
    return lambda session: reset(session.sides[side])


def waits(session: Session) -> None:
    """The proxy's clock ends it."""


def shuts_first(session: Session) -> None:
    session.slow.shutdown(socket.SHUT_WR)
    assert session.busy.recv(1) == b""


def drains(session: Session) -> None:
    assert session.proxy.stop() == 0


def is_cut_off(session: Session) -> None:
    """Nothing from the proxy arrives at the slow side any more."""
    namespace = session.wire.client if session.slow_side == "client" else session.wire.exchange
    rule = "table inet cut { chain in { type filter hook input priority 0; meta l4proto tcp drop; } ; }"
    namespace.run("nft", "-f", "-", input=rule)
    try:
        session.proxy.line("connection")
    finally:
        namespace.run("nft", "delete", "table", "inet", "cut")


def reads_late(session: Session) -> None:
    session.busy.shutdown(socket.SHUT_WR)
    assert len(receive_all(session.slow)) == session.sent
    session.slow.close()


class How(NamedTuple):
    """A way to end; `before` is done before the slow side is choked."""

    reason: str
    option: str
    ends: Callable[[Session], None]
    before: Callable[[Session], None] = waits


WAYS = [
    *(How(f"{side}_reset", "--idle-timeout=0", breaks(side)) for side in SIDES),
    How("idle_timeout", "--idle-timeout=1", waits),
    How("half_close_timeout", "--half-close-timeout=1", waits, shuts_first),
    How("drain", "--drain-timeout=100ms", drains),
    How("slow_timeout", "--user-timeout=500", is_cut_off),
    How("closed", "--zero-copy=never", reads_late),
    How("closed", "--zero-copy=auto", reads_late),
    How("closed", "--drain-timeout=20", reads_late, shuts_first),
]


@pytest.mark.root
@pytest.mark.parametrize("slow", SIDES)
@pytest.mark.parametrize("how", WAYS, ids=lambda how: f"{how.reason}{how.option}")
def test_the_line_says_what_was_acknowledged_at_each_end(wire: Wire, how: How, slow: str) -> None:
    with contextlib.closing(Session(wire, slow, how.option)) as session:
        how.before(session)
        session.choke()
        how.ends(session)
        line = session.proxy.line("connection")
        assert line["reason"] == how.reason.replace("slow", slow)
        assert (line["tx_bytes"], line["upstream_tx_bytes"]) == session.seen(line)
        session.proxy.stop()
        conserved(line, session.proxy.line("metrics", lambda metrics: metrics["downstream_cx_active"] == 0))
        lost = 0 if how.reason == "closed" else line["upstream_tx_bytes" if slow == "server" else "tx_bytes"]
        assert lost < 200_000 < session.sent
        assert (line["discarded_bytes"] == 0) is (how.reason == "closed")


def conserved(line: Line, metrics: Line) -> None:
    """One connection: its line and the metrics say the same, and what was received was acknowledged, discarded or left."""
    assert line["rx_bytes"] == metrics["downstream_cx_rx_bytes_total"]
    assert line["tx_bytes"] == metrics["downstream_cx_tx_bytes_total"]
    assert line["upstream_tx_bytes"] == metrics["upstream_cx_tx_bytes_total"]
    received = metrics["downstream_cx_rx_bytes_total"] + metrics["upstream_cx_rx_bytes_total"]
    lost = line["discarded_bytes"] + line["unacknowledged_bytes"]
    assert received == line["tx_bytes"] + line["upstream_tx_bytes"] + lost


@pytest.mark.root
@pytest.mark.parametrize("slow", SIDES)
@pytest.mark.parametrize("option", ["--drain-timeout=100ms", "--half-close-timeout=500ms"])
def test_after_both_fins_nothing_is_taken_back_and_the_line_says_what_the_kernel_still_has(
    wire: Wire, slow: str, option: str
) -> None:
    with contextlib.closing(Session(wire, slow, option)) as session:
        session.busy.sendall(bytes(LITTLE))
        session.busy.shutdown(socket.SHUT_WR)
        session.slow.shutdown(socket.SHUT_WR)
        assert session.busy.recv(1) == b""
        session.proxy.stop() if "drain" in option else session.proxy.line("connection")
        line = session.proxy.line("connection")
        assert (line["reason"], line["discarded_bytes"]) == ("closed", 0)
        told = line["tx_bytes"] + line["upstream_tx_bytes"] - 5
        assert 0 < line["unacknowledged_bytes"] == LITTLE - told
        session.proxy.stop()
        conserved(line, session.proxy.line("metrics", lambda metrics: metrics["downstream_cx_active"] == 0))
        assert receive_all(session.slow) == bytes(LITTLE)


@pytest.mark.root
def test_while_a_session_lives_the_metrics_say_what_was_acknowledged_and_never_take_it_back(wire: Wire) -> None:
    with contextlib.closing(Session(wire, "client")) as session:
        session.choke()
        metrics = session.proxy.wait_metrics(lambda metrics: metrics["downstream_cx_tx_bytes_total"] > 0)
        assert metrics["downstream_cx_tx_bytes_total"] < 50_000 < metrics["upstream_cx_rx_bytes_total"]
        receive_exactly(session.slow, 400_000)
        more = session.proxy.wait_metrics(lambda metrics: metrics["downstream_cx_tx_bytes_total"] >= 400_000)
        reset(session.slow)
        line = session.proxy.line("connection")
        assert session.proxy.metrics()["downstream_cx_tx_bytes_total"] == line["tx_bytes"]
        assert line["tx_bytes"] >= more["downstream_cx_tx_bytes_total"]


@pytest.mark.root
@pytest.mark.parametrize("runtime", EACH_RUNTIME)
def test_bytes_that_an_idle_end_took_back_do_not_count_as_sent_on_each_runtime(runtime: str, bundle: Path) -> None:
    with contextlib.closing(Namespace(tcp_timestamps="0")) as host, host, contextlib.closing(Exchange()) as far:
        words = ["-t", far.target, "-p0", f"--runtime={runtime}", "--workers=1", "--idle-timeout=500ms"]
        with contextlib.closing(Proxy([python_for(runtime), "-I", "-S", str(checkout_alone(bundle))], *words)) as proxy:
            with socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
                client.connect(proxy.address)
                sent = send_until_reset(far.accept())
                line = proxy.line("connection")
                got = read_until_reset(client)
            assert line["tx_bytes"] == got < sent
            assert proxy.stop() == 0
            conserved(line, proxy.line("metrics"))


def send_until_reset(server: socket.socket) -> int:
    """How much could be sent before that."""
    sent = 0
    with contextlib.suppress(ConnectionResetError):
        while True:
            sent += server.send(bytes(1 << 16))
    return sent


def read_until_reset(client: socket.socket) -> int:
    """How much can still be read: what had been acknowledged."""
    got = 0
    with contextlib.suppress(ConnectionResetError):
        while data := client.recv(1 << 16):
            got += len(data)
    return got


def test_a_killed_workers_bytes_count_as_acknowledged_up_to_the_last_look(start: Any, exchange: Exchange) -> None:
    proxy = start(exchange, "--runtime=processes", "--workers=1", "--max-connections-per-client=9")
    with proxy.connect() as client:
        server = exchange.accept()
        client.sendall(b"order")
        assert receive_exactly(server, 5) == b"order"
        before = proxy.wait_metrics(lambda metrics: metrics["upstream_cx_tx_bytes_total"] == 5)
        (worker,) = (pid for pid in proxy.family()[1:] if not children(pid))
        os.kill(worker, signal.SIGKILL)
        after = proxy.wait_metrics(lambda metrics: metrics["downstream_cx_active"] == 0)
    assert after["upstream_cx_tx_bytes_total"] == before["upstream_cx_tx_bytes_total"]


@pytest.mark.root
def test_the_line_names_the_upstream_flow_and_no_round_trip_where_none_was_measured(wire: Wire) -> None:
    """A SYN that was sent again measures nothing (Karn), and there was nothing after it."""
    drop = "table inet cut { chain in { type filter hook input priority 0; tcp flags & (syn | ack) == syn drop; } ; }"
    wire.exchange.run("nft", "-f", "-", input=drop)
    tap = Sniffer(wire.exchange, UPSTREAM)
    far = wire.far_end(4)
    proxy = wire.start(far, 4, "--workers=1", "--runtime=threads", "--timestamps=preserve")
    with contextlib.closing(far), contextlib.closing(proxy), wire.connect(proxy) as client:
        proxy.wait_metrics(lambda metrics: metrics["upstream_cx_total"] == 1)
        wire.exchange.run("nft", "delete", "table", "inet", "cut")
        server = far.accept()
        wait_until(lambda: proxy.metrics()["upstream_cx_active"] == 1)
        again = sum(packet.is_syn for packet in tap.stop()) - 1  # by the time that nft(8) took
        ours = server.getpeername()
        reset(client)
        line = proxy.line("connection")
        assert (line["upstream_local_address"], line["upstream_local_port"]) == ours
        assert (line["upstream_rtt_us"], line["upstream_retransmits"]) == (None, again)


def test_a_connection_that_never_was_has_no_local_address(start: Any) -> None:
    proxy = start(f"127.0.0.1:{free_port()}")
    proxy.expect_reset()
    line = proxy.line("connection")
    assert (line["upstream_local_address"], line["upstream_local_port"]) == (None, None)
    assert (line["rx_bytes"], line["upstream_tx_bytes"], line["unacknowledged_bytes"]) == (0, 0, 0)
