"""A sweep: visits all sessions of a worker periodically, in slices by a timer, so that no small order waits for all of them.

Knows the timers and the sessions. Knows nothing of what a visit does.
"""

from __future__ import annotations

from typing import Callable, Dict, Generic, List, Protocol, TypeVar

from _tsproxy.loop.timers import Timers

_SLICE = 32  # sessions at a time: 0.1 ms if all have had traffic (1.4 us a visit), 0.01 ms if none has


class Visited(Protocol):
    """What a sweep visits."""

    def on_bug(self, bug: Exception) -> None:
        """The visit raised: a bug of this session."""
        ...


T = TypeVar("T", bound=Visited)


class Sweep(Generic[T]):
    """One sweep takes `step_ns`. While there is no session no timer is armed."""

    def __init__(self, timers: Timers, sessions: Dict[int, T], step_ns: int, visit: Callable[[T, int], None]) -> None:
        """`sessions` are the open ones, kept by their owner. `visit` gets one of them, and the time."""
        self._timers, self._sessions, self._step_ns, self._visit = timers, sessions, step_ns, visit
        self._gap_ns = 0
        self._left: List[T] = []  # not visited yet in this sweep
        self._runs = False

    def begin(self, now_ns: int) -> None:
        """Start, if it does not run: there is a session."""
        if not self._runs:
            self._runs = True
            self._timers.arm(self, now_ns + self._step_ns)

    def on_deadline(self, now_ns: int) -> None:
        """Visit one slice; after the last session begin again."""
        if not self._left:
            self._left = list(self._sessions.values())
            self._gap_ns = self._step_ns // max(1, -(-len(self._left) // _SLICE))
        self._runs = bool(self._left)
        if self._runs:
            self._timers.arm(self, now_ns + self._gap_ns)
        for _ in range(min(_SLICE, len(self._left))):
            session = self._left.pop()
            try:
                self._visit(session, now_ns)
            except Exception as bug:
                session.on_bug(bug)

    def on_bug(self, bug: Exception) -> None:
        """A bug of no session."""
        raise bug
