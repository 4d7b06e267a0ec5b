"""A sweep: visits all sessions of a worker periodically, in slices by a timer, so that no small order waits for all of them.

Two visits of a session are a step apart or more, whoever comes and goes meanwhile: each waits in a queue for its own next one.

Knows the timers and the sessions. Knows nothing of what a visit does.
"""

from __future__ import annotations

import itertools
from collections import deque
from typing import Callable, Deque, Dict, Generic, Iterator, Protocol, Set, Tuple, TypeVar

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
        """`sessions` are the open ones by connection id, kept by their owner. `visit` gets one of them, and the time."""
        self._timers, self._sessions, self._step_ns, self._visit = timers, sessions, step_ns, visit
        self._queue: Deque[Tuple[int, int]] = deque()  # when a visit is due, and connection id; also of some that have ended
        self._queued: Set[int] = set()
        self._runs = False

    def begin(self, now_ns: int) -> None:
        """Start, if it does not run: there is a session. One that comes later is found at the next deadline."""
        if not self._runs:
            self._runs = True
            self._timers.arm(self, now_ns + self._step_ns)

    def on_deadline(self, now_ns: int) -> None:
        """Visit one slice. The next one is due when the first of the queue is; or soon, if that has been for a while."""
        self._take_in()
        found = list(self._slice(now_ns))
        self._runs = bool(self._queue)
        if self._runs:
            due_ns, soon_ns = self._queue[0][0], self._step_ns // -(-len(self._queue) // _SLICE)
            self._timers.arm(self, due_ns if due_ns > now_ns else now_ns + soon_ns)
        for session in found:
            try:
                self._visit(session, now_ns)
            except Exception as bug:
                session.on_bug(bug)

    def _take_in(self) -> None:
        """Queue who has come since the last time: the dict has the newest last. Short sessions are never queued."""
        if len(self._queue) > 2 * len(self._sessions) + _SLICE:  # a step may be hours
            self._queue = deque(each for each in self._queue if each[1] in self._sessions)
            self._queued.intersection_update(self._sessions)
        new = list(itertools.takewhile(lambda number: number not in self._queued, reversed(self._sessions)))
        self._queue.extend((0, connection_id) for connection_id in reversed(new))
        self._queued.update(new)

    def _slice(self, now_ns: int) -> Iterator[T]:
        for _ in range(min(_SLICE, len(self._queue))):
            if self._queue[0][0] > now_ns:
                return
            _, connection_id = self._queue.popleft()
            session = self._sessions.get(connection_id)
            if session is None:
                self._queued.discard(connection_id)
            else:
                self._queue.append((now_ns + self._step_ns, connection_id))
                yield session

    def on_bug(self, bug: Exception) -> None:
        """A bug of no session."""
        raise bug
