"""Nothing lost: what was received is acknowledged or counted as discarded, however it comes in pieces, stalls and ends.

Real sockets in a namespace whose kernel buffers are small, so that partial writes are the rule and not the exception.
"""

from __future__ import annotations

import contextlib
import socket
from typing import Dict, Iterator, List, Tuple

import pytest
from harness import CHECKOUT, Exchange, Line, Proxy, examples, reset, wait_until
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from namespaces import Namespace

pytestmark = pytest.mark.root

SIDES = ("client", "server")
Step = Tuple[str, str, int]


class Side:
    """One end of a connection as the test drives it: what it sent, what it got, how it ended."""

    def __init__(self, sock: socket.socket, name: str) -> None:
        self.sock = sock
        self.sock.setblocking(False)
        self.name = name
        self.sent = 0
        self.got = 0
        self.shut = self.finished = self.was_reset = False

    def send(self, count: int) -> None:
        """Send up to `count` bytes of this side's pattern, as much as fits."""
        if self.shut or self.was_reset:
            return
        try:
            self.sent += self.sock.send(pattern(self.name, self.sent, count))
        except BlockingIOError:
            pass
        except (ConnectionResetError, BrokenPipeError):
            self.was_reset = True

    def read(self, count: int, other: str) -> None:
        """Read once, and check that it is the next part of what the other side sent."""
        if self.finished or self.was_reset:
            return
        try:
            data = self.sock.recv(count)
        except BlockingIOError:
            return
        except (ConnectionResetError, BrokenPipeError):
            self.was_reset = True
            return
        assert data == pattern(other, self.got, len(data))
        self.got += len(data)
        self.finished = not data

    def eof(self) -> None:
        if not self.shut and not self.was_reset:
            self.shut = True
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        if not self.was_reset:
            self.was_reset = True
            reset(self.sock)


_PATTERN = {name: bytes((i * 31 + i // 251 + number) % 256 for i in range(1 << 17)) for number, name in enumerate(SIDES)}


def pattern(name: str, start: int, count: int) -> bytes:
    """Bytes `start` to `start + count` of the endless stream that a side sends."""
    base = _PATTERN[name]
    start %= len(base) // 2
    return base[start : start + count]


@pytest.fixture(scope="module")
def narrow() -> Iterator[Namespace]:
    small = "4096 4608 4608"
    with contextlib.closing(Namespace(tcp_timestamps="0", tcp_wmem=small, tcp_rmem=small)) as namespace:
        yield namespace


COPYING, SPLICING = ("--buffer-size=4096", "--zero-copy=never"), ("--buffer-size=1024",)  # so that each order fills it


@pytest.fixture(scope="module", params=[COPYING, SPLICING], ids=["copying", "splicing"])
def running(narrow: Namespace, request: pytest.FixtureRequest) -> Iterator[Tuple[Proxy, Exchange]]:
    with narrow:
        exchange = Exchange()
    options = ["-t", exchange.target, "-p0", "--metrics-interval=0", "--workers=2", *request.param]
    proxy = Proxy([*narrow.enter, *CHECKOUT], *options)
    yield proxy, exchange
    assert proxy.stop() == 0
    assert proxy.stderr() == ""
    proxy.close()
    exchange.close()


steps = st.lists(
    st.tuples(st.sampled_from(SIDES), st.sampled_from(["send", "send", "read"]), st.integers(1, 60_000)),
    max_size=25,
)
endings = st.tuples(st.sampled_from(SIDES), st.sampled_from(["eof", "reset", "close"]), st.booleans())


UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@settings(UNHURRIED, max_examples=examples(150))
@given(script=steps, ending=endings)
@example(script=[("client", "send", 60_000)] * 10, ending=("client", "eof", True))
@example(script=[("server", "send", 60_000)] * 10, ending=("client", "reset", False))
@example(script=[("client", "send", 60_000)] * 10, ending=("server", "reset", False))
@example(script=[("client", "send", 60_000)] * 10, ending=("server", "close", False))
def test_received_is_acknowledged_or_counted_as_discarded(
    narrow: Namespace, running: Tuple[Proxy, Exchange], script: List[Step], ending: Tuple[str, str, bool]
) -> None:
    proxy, exchange = running
    before = proxy.metrics()
    with narrow:
        client = proxy.connect()
    sides = {"client": Side(client, "client"), "server": Side(exchange.accept(), "server")}
    number = proxy.metrics()["downstream_cx_total"]
    try:
        for who, what, count in script:
            if what == "send":
                sides[who].send(count)
            else:
                sides[who].read(count, other(who))
        finish(sides, *ending)
        line = proxy.line("connection", lambda line: line["connection_id"] == number)
        after = proxy.wait_metrics(lambda line: line["downstream_cx_active"] == 0)
    finally:
        for side in sides.values():
            side.sock.close()
    conserved(line, before, after)
    plausible(line, sides)


def other(who: str) -> str:
    return SIDES[1 - SIDES.index(who)]


def finish(sides: Dict[str, Side], who: str, how: str, drained_first: bool) -> None:
    """End the connection from one side; the other reads to its end and ends, too."""
    first, second = sides[who], sides[other(who)]
    if drained_first:
        quiet(sides)
    if how == "reset":
        first.reset()
    elif how == "close":
        first.sock.close()
        first.was_reset = True
    else:
        first.eof()

    def ended() -> bool:
        second.read(1 << 16, first.name)
        if how != "eof" and not second.finished:
            second.send(1)  # a closed far end answers this with a reset
        if second.finished:
            second.eof()
        first.read(1 << 16, second.name)
        return all(side.finished or side.was_reset for side in (first, second))

    wait_until(ended, "both sides see the end")


def quiet(sides: Dict[str, Side]) -> None:
    """Read until each side has got all that the other sent."""

    def done() -> bool:
        for side in sides.values():
            side.read(1 << 16, other(side.name))
        return all(side.got == sides[other(side.name)].sent for side in sides.values())

    wait_until(done, "all that was sent arrives")


def conserved(line: Line, before: Line, after: Line) -> None:
    """Received = acknowledged + discarded, each way, by the counters and by the line."""
    delta = {name: after[name] - before[name] for name in after if name.endswith("bytes_total")}
    received = delta["downstream_cx_rx_bytes_total"] + delta["upstream_cx_rx_bytes_total"]
    sent = delta["downstream_cx_tx_bytes_total"] + delta["upstream_cx_tx_bytes_total"]
    assert received == sent + line["discarded_bytes"]
    assert line["unacknowledged_bytes"] == 0
    assert delta["upstream_cx_tx_bytes_total"] <= delta["downstream_cx_rx_bytes_total"]
    assert delta["downstream_cx_tx_bytes_total"] <= delta["upstream_cx_rx_bytes_total"]
    assert line["upstream_tx_bytes"] == delta["upstream_cx_tx_bytes_total"]
    assert line["rx_bytes"] == delta["downstream_cx_rx_bytes_total"]
    assert line["tx_bytes"] == delta["downstream_cx_tx_bytes_total"]
    assert after["internal_errors_total"] == 0


def plausible(line: Line, sides: Dict[str, Side]) -> None:
    """By what the ends themselves counted. What came with a reset on its heels may have come without an ACK going back."""
    client, server = sides["client"], sides["server"]
    assert line["upstream_tx_bytes"] <= line["rx_bytes"] <= client.sent
    assert line["tx_bytes"] <= server.sent
    assert line["tx_bytes"] + line["discarded_bytes"] >= client.got
    assert line["upstream_tx_bytes"] + line["discarded_bytes"] >= server.got
    if line["reason"] == "closed":
        assert line["discarded_bytes"] == 0
        assert (line["rx_bytes"], line["tx_bytes"]) == (client.sent, server.sent)
        assert line["upstream_tx_bytes"] == client.sent
        assert client.was_reset or client.got == server.sent
        assert server.was_reset or server.got == client.sent
