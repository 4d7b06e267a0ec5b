"""Timers of many sessions: to arm, move or disarm one is O(1). A disarmed one is not referenced any more."""

from __future__ import annotations

import heapq
from typing import Dict, Iterator, List, Protocol, Set, Tuple

TICK_NS = 5_000_000
NEVER_NS = 2**63 - 1


class Timer(Protocol):
    """The owner of a deadline; hashed by identity. An exception of on_deadline() is a bug, and is passed to on_bug()."""

    def on_deadline(self, now_ns: int) -> None:
        """The deadline has passed. It is disarmed."""
        ...

    def on_bug(self, bug: Exception) -> None:
        """Handle it, or raise it again."""
        ...


class Timers:
    """A calendar queue of ticks of 5 ms. A timer fires up to one tick (or grain) late, never early."""

    def __init__(self) -> None:
        self._buckets: Dict[int, Set[Timer]] = {}
        self._order: List[int] = []  # the keys of _buckets as a heap
        self._armed: Dict[Timer, int] = {}
        self.next_ns = NEVER_NS  # the earliest deadline; an attribute, since the loop reads it in each iteration

    def arm(self, timer: Timer, deadline_ns: int, grain: int = 1) -> None:
        """Set or move the one deadline of `timer`, rounded up to a multiple of `grain` ticks.

        An empty bucket is deleted only when its tick is reached, so far deadlines should be coarse: when thousands of
        sessions a second each arm one five minutes ahead they share a few hundred buckets.
        """
        tick = -(-deadline_ns // (TICK_NS * grain)) * grain
        self.disarm(timer)
        if tick not in self._buckets:
            self._buckets[tick] = set()
            heapq.heappush(self._order, tick)
        self._buckets[tick].add(timer)
        self._armed[timer] = tick
        self.next_ns = min(self.next_ns, tick * TICK_NS)

    def disarm(self, timer: Timer) -> None:
        """Remove the deadline of `timer`, if it has one."""
        tick = self._armed.pop(timer, None)
        if tick is not None and tick in self._buckets:
            bucket = self._buckets[tick]
            bucket.discard(timer)
            if not bucket and tick * TICK_NS == self.next_ns:
                self._find_next()

    def _find_next(self) -> None:
        while self._order and not self._buckets[self._order[0]]:
            del self._buckets[heapq.heappop(self._order)]
        self.next_ns = self._order[0] * TICK_NS if self._order else NEVER_NS

    def due(self, now_ns: int) -> Iterator[Timer]:
        """The timers whose deadline has passed. Each is disarmed before it is yielded; one disarmed until then is not."""
        passed: List[Tuple[Timer, int]] = []
        while self._order and self._order[0] * TICK_NS <= now_ns:
            tick = heapq.heappop(self._order)
            passed += [(timer, tick) for timer in self._buckets.pop(tick)]
        self._find_next()
        for timer, tick in passed:
            if self._armed.get(timer) == tick:
                del self._armed[timer]
                yield timer
