"""Load at a fixed rate, free of coordinated omission: a slow answer delays nothing that was to be sent after it.

When each message is to be sent is fixed in advance. Its latency counts from that moment on, not from when it was in
fact sent; a stall is paid by every message that was due during it. How late the generator itself was is told too.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from array import array
from time import monotonic_ns
from typing import Dict, List

from common.load import Sample, Span, dial, distribution, percentile
from common.trouble import Failed

_SETTLE_NS = 20_000_000
_GRACE_NS = 2_000_000_000  # how long the last answers may take
_BEHIND_US = 100.0


def fixed_rate(port: int, size: int, connections: int, rate: int, seconds: float) -> Sample:
    """`rate` messages a second in all, over the connections in turn."""
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(dial(port)) for _ in range(connections)]
        return _Run(socks, size, rate, max(1, round(rate * seconds))).run()


def fixed_rate_on(sock: socket.socket, size: int, rate: int, span: Span) -> Sample:
    """The same on a connection that is there, from the beginning of `span`; asleep between messages: others have the CPU."""
    time.sleep(max(0, span.begin - monotonic_ns()) / 1e9)
    return _Run([sock], size, rate, max(1, round(rate * span.seconds)), sleeps=True).run()


class _Run:
    """Message i is due at start + i * period, on connection i modulo their number: no state but counters is needed."""

    def __init__(self, socks: List[socket.socket], size: int, rate: int, total: int, sleeps: bool = False) -> None:
        self.epoll = select.epoll()
        self.socks, self.sleeps = socks, sleeps
        self.size, self.total, self.period = size, total, 1e9 / rate
        self.message = memoryview(bytes(size))
        self.buffer = memoryview(bytearray(1 << 16))
        self.sent = self.answered = self.unsent = 0  # unsent: the rest of a message that the kernel took in part
        self.pushed_back = 0
        self.order = {sock.fileno(): index for index, sock in enumerate(self.socks)}
        self.bytes: Dict[int, int] = dict.fromkeys(self.order, 0)
        self.due_of_next = dict(self.order)  # descriptor -> which message its next answer belongs to
        self.took, self.late = array("Q"), array("Q")

    def run(self) -> Sample:
        """All messages, and the wait for the last answers."""
        for sock in self.socks:
            sock.setblocking(False)
            self.epoll.register(sock.fileno(), select.EPOLLIN)
        self.start = monotonic_ns() + _SETTLE_NS
        last = self.start + round(self.total * self.period) + _GRACE_NS
        while self.answered < self.total and monotonic_ns() < last:
            self._send_due()
            if self.sleeps:
                self._sleep()
            events = self.epoll.poll(0)
            if not events and not self.sleeps:
                # Never asleep: a timer's wake-up is late by more than a relay takes. The far end gets the CPU instead.
                os.sched_yield()
            for fd, _ in events:
                self._receive(fd)
        return self._sample()

    def _sleep(self) -> None:
        """Until an answer comes or the next message is due. epoll_wait(2) would round that up to a millisecond."""
        due = self._due(self.sent) if self.sent < self.total else self.start + round(self.total * self.period) + _GRACE_NS
        select.select([self.epoll], [], [], max(0, due - monotonic_ns()) / 1e9)

    def _due(self, index: int) -> int:
        return self.start + int(index * self.period)

    def _send_due(self) -> None:
        """Send all that is due by now. One that a full socket does not take keeps its due time and goes first later."""
        while self.sent < self.total:
            due, now = self._due(self.sent), monotonic_ns()
            if due > now:
                return
            try:  # with nothing unsent, [-0:] is the whole message
                taken = self.socks[self.sent % len(self.socks)].send(self.message[-self.unsent :])
            except BlockingIOError:
                taken = 0
            self.unsent = (self.unsent or self.size) - taken
            if self.unsent:
                self.pushed_back += 1
                return
            self.late.append(now - due)
            self.sent += 1

    def _receive(self, fd: int) -> None:
        received = self.socks[self.order[fd]].recv_into(self.buffer)
        if not received:
            raise Failed("the relay closed the connection")
        now = monotonic_ns()
        self.bytes[fd] += received
        while self.bytes[fd] >= self.size:
            self.bytes[fd] -= self.size
            self.took.append(now - self._due(self.due_of_next[fd]))
            self.due_of_next[fd] += len(self.socks)
            self.answered += 1
            self.last_answer = now

    def _sample(self) -> Sample:
        """What never came back counts with the time it has waited so far."""
        if not self.answered:
            raise Failed("no message came back")
        now = monotonic_ns()
        for index in self.due_of_next.values():
            self.took.extend(now - self._due(later) for later in range(index, self.total, len(self.socks)))
        late = sorted(self.late)
        late_us = percentile(late, 0.99) / 1e3
        return {
            "achieved_per_s": self.answered * 1e9 / max(self.last_answer - self.start, self.total * self.period),
            "late_p99_us": late_us,
            "unanswered": self.total - self.answered,
            "behind": late_us > _BEHIND_US,
            "pushed_back": self.pushed_back,
            **distribution(self.took),
        }
