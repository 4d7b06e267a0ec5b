"""What hotpath.py times: the relay's own objects between real sockets, in this process."""

from __future__ import annotations

import contextlib
import gc
import os
import select
import selectors
import socket
import time
from time import monotonic_ns
from typing import Any, Callable, Dict, Iterator, Tuple

from _tsproxy.linux import sockets
from _tsproxy.linux.sockets import Tuning
from _tsproxy.loop.poller import READ, Poller
from _tsproxy.proxy.context import RouteContext, SessionSettings, WorkerContext
from _tsproxy.proxy.direction import make_directions
from _tsproxy.stats.counters import Counter, SharedCounters
from _tsproxy.stats.histogram import bucket
from _tsproxy.stats.records import RecordWriter

from common.sandbox import TIMESTAMPS

Pair = Tuple[socket.socket, socket.socket]

# Name -> the statement that is timed, with the names of pieces().
PIECES = {
    "function call": "nothing()",
    "memoryview slice": "buffer[:64]",
    "counter in shared memory": "counters[received] += 64",
    "clock: monotonic_ns": "monotonic_ns()",
    "clock: perf_counter_ns": "perf_counter_ns()",
    "histogram bucket, linear part": "bucket(20_000)",
    "histogram bucket, beyond 1 ms": "bucket(5_000_000)",
    "receive with nothing there": "receive_nothing()",
    "TCP_INFO: timestamps negotiated?": "has_timestamps(tcp)",
    "TCP_INFO: with rtt, retransmits": "tcp_info(tcp)",
    "sysctl tcp_timestamps by pread": "int(pread(sysctl, 16, 0))",
}


@contextlib.contextmanager
def local_pair() -> Iterator[Pair]:
    """Two connected unix sockets, as the relay has its own: non-blocking."""
    first, second = socket.socketpair()
    with first, second:
        first.setblocking(False)
        second.setblocking(False)
        yield first, second


@contextlib.contextmanager
def tcp_pair() -> Iterator[Pair]:
    """Two ends of a TCP connection over loopback."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        first = socket.create_connection(listener.getsockname())
        second, _ = listener.accept()
    with first, second:
        for sock in (first, second):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setblocking(False)
        yield first, second


class Route:
    """client -> downstream -> [forward] -> upstream -> far: a message on its way, one at a time."""

    def __init__(self, client_side: Pair, far_side: Pair, size: int) -> None:
        self.client, self.downstream = client_side
        self.upstream, self.far = far_side
        self.message, self.drained = bytes(size), bytearray(size)
        self.shared_counters = SharedCounters.create(1)
        row = self.shared_counters.worker(0)
        beside: Any = None  # the gate and the client's SYN: a forward asks neither
        settings = SessionSettings(Tuning(), 0, 0, 0, log_connections=True, log_debug=False, zero_copy=True)
        self._worker = WorkerContext(0, row, RecordWriter(-1, row))
        self.context = RouteContext(self._worker, settings, beside, beside, row, (), 65536)
        self.direction, self._back = make_directions(self, self.context, self.downstream, self.upstream)  # type: ignore[arg-type]

    @property
    def naked(self) -> Callable[[], None]:
        """The two system calls, into and out of the same buffer."""
        receive, send, buffer = self.downstream.recv_into, self.upstream.send, self.context.buffer

        def forward() -> None:
            send(buffer[: receive(buffer)])

        return forward

    def timed(self, forward: Callable[[], None]) -> Callable[[int], float]:
        """A function that forwards so many messages, and returns what each forward took; the ends are not timed."""
        feed, message, drain, drained = self.client.send, self.message, self.far.recv_into, self.drained
        loop, clock = self.context.loop, monotonic_ns

        def run(count: int) -> float:
            total = 0
            gc.disable()
            for _ in range(count):
                feed(message)
                loop.now = began = clock()
                forward()
                total += clock() - began
                drain(drained)
            gc.enable()
            return max(0.0, total / count - _clock_ns())

        return run

    def close(self) -> None:
        """Let go of what is not the sockets."""
        self._worker.close()
        os.close(self.shared_counters.fd)


def _clock_ns() -> float:
    """What a pair of looks at the clock adds to what lies between them."""
    clock, total = monotonic_ns, 0
    for _ in range(1000):
        began = clock()
        total += clock() - began
    return total / 1000


@contextlib.contextmanager
def waiters(ready: int) -> Iterator[Dict[str, Any]]:
    """An epoll, a Poller and an EpollSelector that each watch the same descriptors, all readable."""
    with contextlib.ExitStack() as stack:
        epoll = stack.enter_context(contextlib.closing(select.epoll()))
        poller = stack.enter_context(contextlib.closing(Poller()))
        selector = stack.enter_context(contextlib.closing(selectors.EpollSelector()))
        for _ in range(ready):
            one, other = stack.enter_context(local_pair())
            one.send(b"x")
            epoll.register(other.fileno(), select.EPOLLIN)
            poller.register(other.fileno(), READ)
            selector.register(other.fileno(), selectors.EVENT_READ)
        yield {"epoll": epoll, "poller": poller, "selector": selector}


@contextlib.contextmanager
def pieces(route: Route) -> Iterator[Dict[str, Any]]:
    """The names that PIECES uses."""

    def receive_nothing() -> None:
        try:
            route.downstream.recv_into(route.context.buffer)
        except BlockingIOError:
            pass  # that is what is timed

    sysctl = os.open(TIMESTAMPS, os.O_RDONLY)
    try:
        yield {
            "nothing": lambda: None,
            "buffer": route.context.buffer,
            "counters": route.context.counters,
            "received": int(Counter.RECEIVED_DOWNSTREAM),
            "monotonic_ns": monotonic_ns,
            "perf_counter_ns": time.perf_counter_ns,
            "bucket": bucket,
            "receive_nothing": receive_nothing,
            "has_timestamps": sockets.has_timestamps,
            "tcp_info": sockets.tcp_info,
            "tcp": route.upstream,
            "pread": os.pread,
            "sysctl": sysctl,
        }
    finally:
        os.close(sysctl)
