"""Events that wait for their turn, so that a small order does not wait for all of them.

A worker's iteration serves bytes of established sessions at once. What may take long is posted here: new clients, bulk
transfer, ends of sessions. Each kind has its lane: first in, first out, one entry a descriptor. After the orders comes
one slice of time for one lane, then epoll_wait(2) again; the lanes take turns. So an order waits for one slice, and no
lane for more than a slice of each other. Orders can't starve the lanes either: these have as much time as the orders took.

Knows descriptors, event masks and the clock. Knows nothing of what handles them.
"""

from __future__ import annotations

from collections import deque
from time import monotonic_ns
from typing import Callable, Deque, Dict, Tuple

NOW, NEW, BULK, ENDING = range(4)  # NOW has no lane: it is not posted
# An accept with its connect(2) takes some 90 us, four hang-ups as much, a poll in between 2 (bench/NOTES.md).
SLICE_NS = 50_000

Lane = Deque[Tuple[int, int]]  # descriptor, and when it was first posted
Handle = Callable[[int, int, int], None]  # descriptor, mask, when it was first posted


class Posted:
    """See the module. `masks` has what waits: a descriptor and its events. It is true for as long as anything does."""

    __slots__ = ("_clock", "_lanes", "_since", "_turn", "masks")

    def __init__(self, clock: Callable[[], int] = monotonic_ns) -> None:
        self._clock = clock
        self.masks: Dict[int, int] = {}
        self._since: Dict[int, int] = {}  # descriptor -> when it was first posted: its place in a lane says the same
        new: Lane = deque()
        bulk: Lane = deque()
        ending: Lane = deque()
        # Each new session brings two ends: with two turns for one of the others these can't fall behind.
        self._lanes = (ending, new, bulk, ending)  # NEW, BULK and ENDING are the places
        self._turn = 0

    def put(self, lane: int, fd: int, mask: int, now: int) -> None:
        """Post an event. A descriptor that waits keeps its lane and its place; the masks are joined."""
        masks = self.masks
        if fd in masks:
            masks[fd] |= mask
        else:
            masks[fd], self._since[fd] = mask, now
            self._lanes[lane].append((fd, now))

    def drop(self, fd: int) -> None:
        """Forget a descriptor that is about to be closed: its number may come back. Its place in the lane is passed over."""
        self.masks.pop(fd, None)
        self._since.pop(fd, None)

    def serve(self, handle: Handle, now: int, share_ns: int) -> None:
        """Handle events for a slice, or for `share_ns` if that is more: a slice of each lane in turn; at least one event."""
        masks, posted, lanes, clock, turn = self.masks, self._since, self._lanes, self._clock, self._turn
        end = now + (share_ns if share_ns > SLICE_NS else SLICE_NS)
        while masks and now < end:
            turn = (turn + 1) % 4
            lane, until = lanes[turn], min(end, now + SLICE_NS)
            while lane and now < until:
                fd, since = lane.popleft()
                if posted.get(fd) == since:
                    del posted[fd]
                    handle(fd, masks.pop(fd), since)
                    now = clock()
        self._turn = turn if masks else 0  # new clients first: others can work for them meanwhile
