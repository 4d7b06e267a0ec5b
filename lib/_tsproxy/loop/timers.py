"""Deadlines of many connections: arming, moving and dropping one is O(1); nothing is left behind by a closed one."""

from __future__ import annotations

import heapq
from typing import Any, Dict, Iterator, List, Optional, Set, Tuple

TICK_NS = 5_000_000


class Timers:
    """A calendar of ticks of 5 ms. A deadline may come up to one tick (or grain) late, never early."""

    def __init__(self) -> None:
        self._buckets: Dict[int, Set[Any]] = {}
        self._order: List[int] = []  # the keys of _days as a heap
        self._armed: Dict[Any, int] = {}

    def arm(self, owner: Any, deadline_ns: int, grain: int = 1) -> None:
        """Set or move the one deadline of `owner`, rounded up to a multiple of `grain` ticks.

        A day that was emptied waits for its time to come, so far deadlines should be coarse: thousands of
        connections a second that each arm one five minutes ahead shall share a few hundred days.
        """
        tick = -(-deadline_ns // (TICK_NS * grain)) * grain
        self.disarm(owner)
        if tick not in self._buckets:
            self._buckets[tick] = set()
            heapq.heappush(self._order, tick)
        self._buckets[tick].add(owner)
        self._armed[owner] = tick

    def disarm(self, owner: Any) -> None:
        """Forget the deadline of `owner`, if it has one."""
        tick = self._armed.pop(owner, None)
        if tick in self._buckets:
            self._buckets[tick].discard(owner)

    def next_ns(self) -> Optional[int]:
        """When to look again; None if there is nothing to wait for."""
        while self._order and not self._buckets[self._order[0]]:
            del self._buckets[heapq.heappop(self._order)]
        return self._order[0] * TICK_NS if self._order else None

    def due(self, now_ns: int) -> Iterator[Any]:
        """The owners whose deadline has passed; each is disarmed when its turn comes. One that is disarmed before has none."""
        passed: List[Tuple[Any, int]] = []
        while self._order and self._order[0] * TICK_NS <= now_ns:
            tick = heapq.heappop(self._order)
            passed += [(owner, tick) for owner in self._buckets.pop(tick)]
        for owner, tick in passed:
            if self._armed.get(owner) == tick:
                del self._armed[owner]
                yield owner
