"""The load: what a client would do, as lean as Python allows. Its own cost is in every figure, with and without a relay.

Each function here runs in a process of its own. Latencies are nanoseconds of CLOCK_MONOTONIC.
"""

from __future__ import annotations

import contextlib
import math
import select
import socket
import struct
from array import array
from time import monotonic_ns
from typing import Any, Callable, Dict, List, MutableSequence, NamedTuple, NoReturn, Sequence, Tuple

from common.trouble import Failed

_STALLED_S = 10
_TIMEVAL = struct.Struct("ll")  # struct timeval (socket(7), SO_RCVTIMEO)
_WARM_UP = 0.25  # of the time measured, and not more than a third of a second
_BATCH_BYTES = 1 << 16
_CURVE_POINTS = 80
_CURVE_END = 4.0  # 99.99 %, in powers of ten of the share that is slower

Sample = Dict[str, Any]


class Span(NamedTuple):
    """When measuring begins and ends; before it is warm-up."""

    begin: int
    end: int

    @classmethod
    def lasting(cls, seconds: float) -> Span:
        """From a moment from now on."""
        begin = monotonic_ns() + round(min(0.33, _WARM_UP * seconds) * 1e9)
        return cls(begin, begin + round(seconds * 1e9))

    @property
    def seconds(self) -> float:
        """Its length."""
        return (self.end - self.begin) / 1e9


def dial(port: int, wake_at: int = 1) -> socket.socket:
    """A blocking connection that sends at once, and becomes readable when so many bytes are there (SO_RCVLOWAT, socket(7))."""
    sock = socket.create_connection(("127.0.0.1", port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, wake_at)
    return sock


def percentile(ordered: Sequence[int], share: float) -> int:
    """The smallest value that at least `share` of all are not above (nearest rank)."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def distribution(took: MutableSequence[int]) -> Sample:
    """Percentiles in microseconds, and the curve: (powers of ten of the share that is slower, microseconds)."""
    if not took:
        raise Failed("no round trip was completed")
    ordered = sorted(took)
    shares = {"p50_us": 0.5, "p90_us": 0.9, "p99_us": 0.99, "p99_9_us": 0.999, "max_us": 1.0}
    sample: Sample = {name: percentile(ordered, share) / 1e3 for name, share in shares.items()}
    low = math.log10(2)
    end = min(_CURVE_END, math.log10(len(ordered)))
    points = [low + step * (_CURVE_END - low) / _CURVE_POINTS for step in range(_CURVE_POINTS + 1)]
    sample["curve"] = [[x, percentile(ordered, 1 - 10**-x) / 1e3] for x in points if x <= end]
    return sample


def ping_pong(port: int, size: int, connections: int, span: Span) -> Sample:
    """Closed loop: each connection sends its next message when the last one has come back, and wakes for whole ones only."""
    with contextlib.ExitStack() as stack:
        wake_at = size if connections > 1 else 1  # for one it is the kernel that waits (MSG_WAITALL)
        socks = [stack.enter_context(dial(port, wake_at)) for _ in range(connections)]
        took = _alone(socks[0], size, span) if connections == 1 else _together(socks, size, span)
    return {"round_trips_per_s": len(took) / span.seconds, **distribution(took)}


def ping_pong_on(sock: socket.socket, size: int, span: Span) -> Sample:
    """Closed loop on a connection that is there."""
    took = _alone(sock, size, span)
    return {"round_trips_per_s": len(took) / span.seconds, **distribution(took)}


def _alone(sock: socket.socket, size: int, span: Span) -> MutableSequence[int]:
    """A blocking recv(2) for the whole message.

    Not with SO_RCVLOWAT: a recv that has a part of the message already would wait for as many bytes again to wake it.
    """
    message, buffer, whole, took = bytes(size), memoryview(bytearray(size)), socket.MSG_WAITALL, array("Q")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEVAL.pack(_STALLED_S, 0))
    send, receive, clock, note, (begin, end) = sock.send, sock.recv_into, monotonic_ns, took.append, span
    while True:
        sent = clock()
        send(message)
        try:
            received = receive(buffer, size, whole)
        except BlockingIOError:
            _stalled()
        if received != size:
            _cut_short(received, size)
        now = clock()
        if now >= begin:  # also one that was sent before: else what stands still for the whole span would not count
            note(now - sent)
        if now >= end:
            return took


def _together(socks: List[socket.socket], size: int, span: Span) -> MutableSequence[int]:
    """One epoll loop. A connection has one message on its way, so what is received is never of two."""
    message, buffer, took = bytes(size), memoryview(bytearray(size)), array("Q")
    clock, note, (begin, end), poll = monotonic_ns, took.append, span, _watch(socks).poll
    calls = {sock.fileno(): (sock.send, sock.recv_into) for sock in socks}
    wakers = {sock.fileno(): sock for sock in socks}
    missing = dict.fromkeys(calls, size)
    sent = {}
    for fd, (send, _) in calls.items():
        sent[fd] = clock()
        send(message)
    while True:
        for fd, _ in poll(_STALLED_S) or _stalled():
            send, receive = calls[fd]
            received = receive(buffer)
            if received != missing[fd]:
                missing[fd] -= received or _closed()
                wakers[fd].setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)  # the rest is less than a message
                continue
            now = clock()
            if now >= begin:
                note(now - sent[fd])
            if now >= end:
                return took
            missing[fd], sent[fd] = size, now
            send(message)


def _watch(socks: Sequence[socket.socket]) -> select.epoll:
    epoll = select.epoll()
    for sock in socks:
        epoll.register(sock.fileno(), select.EPOLLIN)
    return epoll


def _stalled() -> NoReturn:
    raise Failed(f"no byte came for {_STALLED_S} s")


def _cut_short(received: int, size: int) -> NoReturn:
    raise Failed(f"the relay closed the connection, or stood still for {_STALLED_S} s, after {received} of {size} bytes")


def _closed() -> NoReturn:
    raise Failed("the relay closed the connection")


def bulk(port: int, size: int, seconds: float) -> Sample:
    """One direction: send messages of that size; the time ends when the far end has taken the last byte."""
    message, batch = bytes(size), range(max(1, _BATCH_BYTES // size))
    with dial(port) as sock:
        send, sent, began = sock.send, 0, monotonic_ns()
        end = began + round(seconds * 1e9)
        while monotonic_ns() < end:
            for _ in batch:
                send(message)
            sent += size * len(batch)
        sock.shutdown(socket.SHUT_WR)
        if sock.recv(1):
            raise Failed("the sink answered")
        return {"gbit_per_s": sent * 8 / (monotonic_ns() - began), "sent_bytes": sent}


def connects(port: int, seconds: float) -> Sample:
    """One after the other: connect, one byte there and back, end of file, close. No create_connection(): it asks a resolver."""
    done, address, began = 0, ("127.0.0.1", port), monotonic_ns()
    end = began + round(seconds * 1e9)
    while monotonic_ns() < end:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
            sock.connect(address)
            sock.send(b"x")
            if not sock.recv(1) or sock.recv(1):
                raise Failed(f"connection {done + 1} got no answer")
        done += 1
    return {"connections_per_s": done * 1e9 / (monotonic_ns() - began)}


def beside_idle(port: int, count: int, measure: Callable[[], int]) -> Tuple[int, int]:
    """What `measure` gives before, and beside, that many idle connections. What the first one costs was paid earlier."""
    for sock in idle(port, 1):
        sock.close()
    before = measure()
    held = idle(port, count)
    after = measure()
    for sock in held:
        sock.close()
    return before, after


def idle(port: int, count: int) -> List[socket.socket]:
    """That many connections, each proved by a byte there and back; the caller closes them."""
    socks: List[socket.socket] = []
    for _ in range(count):
        socks.append(dial(port))
        socks[-1].settimeout(_STALLED_S)
        socks[-1].send(b"x")
        if not socks[-1].recv(1):
            raise Failed(f"the relay refused connection {len(socks)} of {count}")
    return socks
