"""Handlers and timers of the main thread's event loop that do no more than call a function.

Knows the loop's protocols. Knows nothing of what the functions do: an exception in one ends the loop, and so the process.
"""

from __future__ import annotations

from collections import deque
from time import monotonic_ns
from typing import Callable, Deque

from _tsproxy.linux import wakeup
from _tsproxy.loop.event_loop import EventLoop
from _tsproxy.loop.poller import READ
from _tsproxy.loop.posted import NOW

Call = Callable[[], None]


class OnReadable:
    """A handler: calls a function while a descriptor is readable. The function has to read it empty."""

    lane = NOW

    def __init__(self, call: Call) -> None:
        self.readable = call

    def ready(self, mask: int) -> None:
        """EPOLLHUP or EPOLLERR: the function's read(2) finds out which."""
        self.readable()

    def on_bug(self, bug: Exception) -> None:
        """The main thread has nothing to fall back to."""
        raise bug


class CallTimer:
    """A timer: calls a function once when its time has come."""

    def __init__(self, loop: EventLoop, call: Call) -> None:
        self._loop, self._call = loop, call

    def arm(self, delay_s: float) -> None:
        """Call the function after so long; an earlier time is forgotten."""
        self._loop.timers.arm(self, monotonic_ns() + round(delay_s * 1e9))

    def disarm(self) -> None:
        """Don't call it."""
        self._loop.timers.disarm(self)

    def on_deadline(self, now_ns: int) -> None:
        """See Timer."""
        self._call()

    def on_bug(self, bug: Exception) -> None:
        """The main thread has nothing to fall back to."""
        raise bug


class ThreadsafeCalls:
    """Calls that other threads ask the loop's thread for (asyncio's call_soon_threadsafe), in their order."""

    def __init__(self) -> None:
        """Refused if there is neither an eventfd nor a pipe."""
        self._calls: Deque[Call] = deque()  # append() and popleft() are atomic
        self._wakeup = wakeup.create()
        self.kind = self._wakeup.kind

    def watch(self, loop: EventLoop) -> None:
        """Run the calls in this loop."""
        loop.watch(self._wakeup.reader, READ, OnReadable(self._run))

    def call_soon(self, call: Call) -> None:
        """In any thread. Never blocks."""
        self._calls.append(call)
        self._wakeup.wake()

    def _run(self) -> None:
        self._wakeup.collect()
        while self._calls:
            self._calls.popleft()()
