"""The event loop of one thread: descriptors, timers, deferred close. The main thread and each worker run this one.

An iteration: epoll_wait(2); plain EPOLLIN of established sessions at once; posted events for a slice of time (posted.py);
timers; then deferred close(2), so that no descriptor number is reused while events for it are queued.

Knows descriptors, deadlines and the clock. Knows nothing of what its handlers do.
"""

from __future__ import annotations

import socket
from time import monotonic_ns
from typing import Callable, Dict, List, Optional, Protocol

from _tsproxy.loop.poller import HANGUP, MAX_EVENTS, READABLE, Poller
from _tsproxy.loop.posted import BULK, ENDING, NOW, Posted
from _tsproxy.loop.timers import NEVER_NS, TICK_NS, Timers

_PROBE_NS = 100_000_000
_STALL_NS = 100_000_000  # a timer that is so late shows that the thread stood still: SIGSTOP, a paused container, a busy host
_LONGEST_NS = 86_400_000_000_000  # epoll_wait(2) takes milliseconds as an int: 24.8 days would be too long


class Handler(Protocol):
    """Handles the events of a descriptor. An exception that it raises is a bug, and is passed to its on_bug()."""

    @property
    def lane(self) -> int:
        """NOW: readable() is called at once; else the lane that its events are posted to (posted.py)."""
        ...

    def readable(self) -> None:
        """Plain EPOLLIN. Only called by the loop if the lane is NOW."""
        ...

    def ready(self, mask: int) -> None:
        """Any other event, or a posted one. `mask`: the epoll events since, joined."""
        ...

    def on_bug(self, bug: Exception) -> None:
        """Handle an exception of the methods above; or raise it again, which ends the loop."""
        ...


class EventLoop:
    """See the module. `now` is the time of the event that is being handled (CLOCK_MONOTONIC, nanoseconds)."""

    def __init__(self, *, spin_ns: int = 0, on_lag: Optional[Callable[[int], None]] = None) -> None:
        """With `spin_ns` epoll_wait(2) does not block until so long after the last event.

        `on_lag` is called with how late timers fire, at least once in 100 ms while there are events. Refused without epoll.
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
        """Call `handler` for these events of the descriptor from now on. No system call if they are the same as before."""
        if self.poller.interests.get(fd) != events:
            self.poller.set_interest(fd, events)
        self.handlers[fd] = handler

    def unwatch(self, fd: int) -> None:
        """Stop watching a descriptor. close(2) alone does not end its events while another process has the file open."""
        if self.handlers.pop(fd, None) is not None:
            self.poller.unregister(fd)
            self.posted.drop(fd)

    def close_later(self, sock: socket.SocketType) -> None:
        """Stop watching a socket now, and close(2) it at the end of the iteration."""
        fd = sock.fileno()
        self.handlers.pop(fd, None)
        self.poller.interests.pop(fd, None)  # close(2) itself removes it from epoll
        if fd in self.posted.masks:
            self.posted.drop(fd)
        self.pending_close.append(sock)

    def after_close(self, call: Callable[[], None]) -> None:
        """Call this after close(2) of the sockets given to close_later() so far."""
        self._after_close.append(call)

    def close_pending(self) -> None:
        """Close the sockets given to close_later(), then make the calls given to after_close()."""
        for sock in self.pending_close:
            sock.close()
        self.pending_close.clear()
        calls, self._after_close = self._after_close, []
        for call in calls:
            call()

    def run(self, until: Callable[[], bool]) -> None:
        """Iterate until `until()` is true; it is called before each epoll_wait(2) when no posted event is left."""
        wait, handlers, clock = self.poller.wait, self.handlers, monotonic_ns
        timers, posted, waiting, probe = self.timers, self.posted, self.posted.masks, self._probe
        last_event = now = self.now = clock()
        while waiting or not until():
            due = timers.next_ns
            spins = waiting or now - last_event < self._spin_ns
            events = wait(0 if spins else self._timeout_s(due - now), MAX_EVENTS)
            now = self.now = clock()
            if events:
                last_event = now
                if not probe.is_armed:
                    probe.arm(now)
            for fd, mask in events:
                try:
                    handler = handlers[fd]
                except KeyError:  # closed by an earlier event of this iteration; or closed here, and still open in its sender
                    continue
                try:
                    if mask == READABLE and handler.lane == NOW:
                        handler.readable()
                    elif waiting or len(events) > 1:
                        posted.put(ENDING if mask & HANGUP else handler.lane or BULK, fd, mask, now)
                    else:  # the only event: it delays no other
                        handler.ready(mask)
                except Exception as bug:
                    handler.on_bug(bug)
            if waiting:
                served = clock()
                posted.serve(self._handle, served, served - now)
                self.now = now
            if due <= now:
                self._expire(due)
                probe.go_on(now, last_event)
            if self.pending_close:
                self.close_pending()

    def run_for(self, timeout_ns: int, until: Callable[[], bool] = lambda: False) -> None:
        """As run(), but for at most so long, and one tick of the timers."""
        deadline = _Deadline()
        self.timers.arm(deadline, monotonic_ns() + timeout_ns)
        try:
            self.run(lambda: deadline.has_passed or until())
        finally:
            self.timers.disarm(deadline)

    def _timeout_s(self, left_ns: int) -> float:
        """The timeout of epoll_wait(2)."""
        return left_ns / 1e9 if 0 < left_ns < _LONGEST_NS else 0 if left_ns <= 0 else _LONGEST_NS / 1e9

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
        """Fire the timers that are due. How late they are shows how long handlers took, or how long the thread had no CPU."""
        if self._on_lag:
            self._on_lag(monotonic_ns() - due)
        if self.now - due >= _STALL_NS:
            self._catch_up(self.now - due)
        for timer in self.timers.due(self.now):
            try:
                timer.on_deadline(self.now)
            except Exception as bug:
                timer.on_bug(bug)

    def _catch_up(self, stall_ns: int) -> None:
        """Handle what became ready during a stall, before timers fire: a peer whose bytes wait here is not idle.

        Takes at most as long as the stall. If SIGCONT interrupts epoll.poll() once its time is over, that returns no event.
        """
        now = monotonic_ns()
        deadline, is_over = now + stall_ns, False
        while now < deadline and not is_over:
            events = self.poller.wait(0, MAX_EVENTS)
            for fd, mask in events:
                if fd in self.handlers:
                    self.posted.put(ENDING if mask & HANGUP else self.handlers[fd].lane or BULK, fd, mask, now)
            self.posted.serve(self._handle, now, TICK_NS)
            is_over = len(events) < MAX_EVENTS and not self.posted.masks
            now = monotonic_ns()
        self.now = now

    def close(self) -> None:
        """Close pending sockets, drop the handlers, close the epoll descriptor. Other watched descriptors stay open."""
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
    """A timer that measures the loop's lag once in 100 ms while there are events. An idle loop does not wake for it."""

    def __init__(self, timers: Timers, *, is_armed: bool) -> None:
        self._timers, self.is_armed, self._armed_ns = timers, is_armed, NEVER_NS

    def arm(self, now_ns: int) -> None:
        """Arm it: there are events."""
        self.is_armed, self._armed_ns = True, now_ns
        self._timers.arm(self, now_ns + _PROBE_NS)

    def go_on(self, now_ns: int, last_event: int) -> None:
        """Arm it again if it has fired and events came since it was armed: a stop right after that is seen, too."""
        if not self.is_armed and last_event > self._armed_ns:
            self.arm(now_ns)

    def on_deadline(self, now_ns: int) -> None:
        """After a time without events the next one arms it."""
        self.is_armed = False

    def on_bug(self, bug: Exception) -> None:
        """on_deadline() does not raise."""
        raise bug
