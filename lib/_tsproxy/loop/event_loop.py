"""The event loop of one thread: descriptors, timers, deferred close. The main thread and each worker run this one.

An iteration: epoll_wait(2); plain EPOLLIN of established sessions at once; posted events for a slice of time (posted.py);
timers; then close(2) of what handlers gave up, so that no descriptor number comes back while events for it are queued.

Knows descriptors, deadlines and the clock. Knows nothing of what its handlers do.
"""

from __future__ import annotations

import socket
from time import monotonic_ns
from typing import Callable, Dict, List, Optional, Protocol

from _tsproxy.loop.poller import ENDED, READABLE, Poller
from _tsproxy.loop.posted import BULK, ENDING, NOW, Posted
from _tsproxy.loop.timers import Timers

_BATCH = 256  # events an iteration
_PROBE_NS = 100_000_000
_LONGEST_S = 86400.0  # epoll_wait(2) takes milliseconds as an int: 24.8 days would be too long


class Handler(Protocol):
    """What takes the events of a descriptor. What it raises is a bug, and goes to its own on_bug()."""

    @property
    def lane(self) -> int:
        """NOW: readable() is called at once; else the lane in which its events wait (posted.py)."""
        ...

    def readable(self) -> None:
        """Plain EPOLLIN. Only called by the loop if the lane is NOW."""
        ...

    def ready(self, mask: int) -> None:
        """Any other event, or one that was posted: the joined epoll mask."""
        ...

    def on_bug(self, bug: Exception) -> None:
        """Contain what a call above raised; raise it again if nothing can, which ends the loop."""
        ...


class EventLoop:
    """See the module. `now` is when the event that is being handled came (CLOCK_MONOTONIC, nanoseconds)."""

    def __init__(self, *, spin_ns: int = 0, on_lag: Optional[Callable[[int], None]] = None) -> None:
        """With `spin_ns` it polls that long after the last event before it sleeps.

        `on_lag` is told how late timers fire, at least once in 100 ms while there are events. OSError if epoll can't be had.
        """
        self.poller, self.posted, self.timers = Poller(), Posted(), Timers()
        self.handlers: Dict[int, Handler] = {}
        self.now = monotonic_ns()
        self._spin_ns = spin_ns
        self._on_lag = on_lag
        self._probe = _LagProbe(self.timers, is_armed=on_lag is None)
        self.pending_close: List[socket.SocketType] = []
        self._after_close: List[Callable[[], None]] = []

    def watch(self, fd: int, events: int, handler: Handler) -> None:
        """Hand these events of the descriptor to `handler` from now on. Free if nothing changes."""
        self.poller.expect(fd, events)
        self.handlers[fd] = handler

    def unwatch(self, fd: int) -> None:
        """Hand on no more events of it. close(2) alone does not end them while another process has the file open."""
        if self.handlers.pop(fd, None) is not None:
            self.poller.unregister(fd)
            self.posted.drop(fd)

    def close_later(self, sock: socket.SocketType) -> None:
        """Stop watching a socket now, close(2) it at the end of the iteration."""
        fd = sock.fileno()
        self.handlers.pop(fd, None)
        self.poller.forget(fd)
        self.posted.drop(fd)
        self.pending_close.append(sock)

    def after_close(self, call: Callable[[], None]) -> None:
        """Call this once the sockets that close_later() has been given so far are closed."""
        self._after_close.append(call)

    def close_pending(self) -> None:
        """Do what close_later() and after_close() have put off."""
        for sock in self.pending_close:
            sock.close()
        self.pending_close.clear()
        calls, self._after_close = self._after_close, []
        for call in calls:
            call()

    def run(self, until: Callable[[], bool]) -> None:
        """Iterate until `until()` is true; it is asked before each wait, once no posted event is left."""
        wait, handlers, clock = self.poller.wait, self.handlers, monotonic_ns
        timers, posted, waiting, probe = self.timers, self.posted, self.posted.masks, self._probe
        last_event = self.now = clock()
        while waiting or not until():
            due = timers.next_ns()
            spins = bool(waiting) or self.now - last_event < self._spin_ns
            events = wait(0 if spins else self._timeout_s(due), _BATCH)
            now = self.now = clock()
            if events:
                last_event = now
                if not probe.is_armed:
                    probe.arm(now)
            for fd, mask in events:
                try:
                    handler = handlers[fd]
                except KeyError:  # closed by an earlier event of this iteration, or here but not yet by who handed it over
                    continue
                try:
                    if mask == READABLE and handler.lane == NOW:
                        handler.readable()
                    elif waiting or len(events) > 1:
                        posted.put(ENDING if mask & ENDED else handler.lane or BULK, fd, mask, now)
                    else:  # it is alone: nobody waits for it
                        handler.ready(mask)
                except Exception as bug:
                    handler.on_bug(bug)
            if waiting:
                served = clock()
                posted.serve(self._handle, served, served - now)
                self.now = now
            if due is not None and due <= now:
                self._expire(due)
            if self.pending_close:
                self.close_pending()

    def run_for(self, timeout_ns: int, until: Callable[[], bool] = lambda: False) -> None:
        """run(), but for so long at most (and one tick of the timers)."""
        deadline = _Deadline()
        self.timers.arm(deadline, monotonic_ns() + timeout_ns)
        try:
            self.run(lambda: deadline.has_passed or until())
        finally:
            self.timers.disarm(deadline)

    def _timeout_s(self, due: Optional[int]) -> float:
        """How long epoll_wait(2) may sleep; -1 is for ever."""
        return -1 if due is None else min(max(0, due - self.now) / 1e9, _LONGEST_S)

    def _handle(self, fd: int, mask: int, since: int) -> None:
        """A posted event, whose descriptor was ready at `since`."""
        handler = self.handlers[fd]
        self.now = since
        try:
            handler.ready(mask)
        except Exception as bug:
            handler.on_bug(bug)
        if self.pending_close:
            self.close_pending()

    def _expire(self, due: int) -> None:
        """Timers whose time has come. How late that is shows how long the loop was kept from it, or had no CPU."""
        if self._on_lag:
            self._on_lag(monotonic_ns() - due)
        for timer in self.timers.due(self.now):
            try:
                timer.on_deadline(self.now)
            except Exception as bug:
                timer.on_bug(bug)

    def close(self) -> None:
        """Do what is put off, let go of the handlers, close the epoll descriptor. What was watched stays open."""
        self.close_pending()
        self.handlers.clear()
        self.poller.close()


class _Deadline:
    """The end of run_for()."""

    has_passed = False

    def on_deadline(self, now_ns: int) -> None:
        self.has_passed = True

    def on_bug(self, bug: Exception) -> None:
        raise bug


class _LagProbe:
    """A timer that does nothing but be late, once in 100 ms while there are events: an idle loop need not wake for it."""

    def __init__(self, timers: Timers, *, is_armed: bool) -> None:
        self._timers, self.is_armed = timers, is_armed

    def arm(self, now_ns: int) -> None:
        """There are events."""
        self.is_armed = True
        self._timers.arm(self, now_ns + _PROBE_NS)

    def on_deadline(self, now_ns: int) -> None:
        """The next event arms it again."""
        self.is_armed = False

    def on_bug(self, bug: Exception) -> None:
        """There is nothing in it to fail."""
        raise bug
