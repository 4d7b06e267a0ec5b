"""Posted events, handled in slices of time, so that a small order does not wait for all of them.

The loop handles EPOLLIN of established sessions at once. Events that may take long are posted here: new clients, bulk
transfer, ends of sessions. Each kind has a lane: a FIFO queue with one entry a descriptor. After the orders of an iteration
comes one slice of time for one lane, then epoll_wait(2) again; the lanes are served round-robin. So an order waits for one
slice, and a lane for at most a slice of each other one. Orders can't starve the lanes: these get as much time as orders took.

Knows descriptors, event masks and the clock. Knows nothing of what handles them.
"""

from __future__ import annotations

from collections import deque
from time import monotonic_ns
from typing import Callable, Deque, Dict, Tuple

NOW, NEW, BULK, ENDING = range(4)  # NOW has no lane: it is not posted
# An accept4(2) with its connect(2) takes some 90 us, four hang-ups as much, an epoll_wait(2) in between 2 (bench/NOTES.md).
SLICE_NS = 50_000

Lane = Deque[Tuple[int, int]]  # descriptor, and when it was first posted
Handle = Callable[[int, int, int], None]  # descriptor, mask, when it was first posted


class Posted:
    """See the module. `masks`: the events of each descriptor that has posted ones; empty if there are none."""

    __slots__ = ("_clock", "_lanes", "_next_lane", "_since", "masks")

    def __init__(self, clock: Callable[[], int] = monotonic_ns) -> None:
        self._clock = clock
        self.masks: Dict[int, int] = {}
        self._since: Dict[int, int] = {}  # descriptor -> when it was first posted, as in its entry in a lane
        new: Lane = deque()
        bulk: Lane = deque()
        ending: Lane = deque()
        # Each session has two hang-ups: with two slices for one of each other lane they can't fall behind.
        self._lanes = (ending, new, bulk, ending)  # NEW, BULK and ENDING are indexes
        self._next_lane = 0

    def put(self, lane: int, fd: int, mask: int, now: int) -> None:
        """Post an event. If the descriptor has a posted one it keeps its lane and its place, and the masks are joined."""
        masks = self.masks
        if fd in masks:
            masks[fd] |= mask
        else:
            masks[fd], self._since[fd] = mask, now
            self._lanes[lane].append((fd, now))

    def drop(self, fd: int) -> None:
        """Drop the event of a descriptor that is about to be closed: its number may be reused. serve() skips its entry."""
        self.masks.pop(fd, None)
        self._since.pop(fd, None)

    def serve(self, handle: Handle, now: int, budget_ns: int) -> None:
        """Handle events for a slice, or for `budget_ns` if that is more: a slice of each lane in turn, at least one event."""
        masks, posted, lanes, clock, lane_index = self.masks, self._since, self._lanes, self._clock, self._next_lane
        end = now + (budget_ns if budget_ns > SLICE_NS else SLICE_NS)
        while masks and now < end:
            lane_index = (lane_index + 1) % 4
            lane, lane_end = lanes[lane_index], min(end, now + SLICE_NS)
            while lane and now < lane_end:
                fd, since = lane.popleft()
                if posted.get(fd) == since:
                    del posted[fd]
                    handle(fd, masks.pop(fd), since)
                    now = clock()
        self._next_lane = lane_index if masks else 0  # new clients first: their connect(2) runs meanwhile
