"""Posted events: first in, first out in each lane, none lost, none handled late because another lane is long."""

from __future__ import annotations

from typing import Dict, List, Set, Tuple

from _tsproxy.loop.posted import BULK, ENDING, NEW, SLICE_NS, Posted
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

LANES = (NEW, BULK, ENDING)
FDS = st.integers(3, 12)


class Clock:
    """Goes on when an event is handled."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now


def names(waiting: Posted, clock: Clock, took_ns: int, share_ns: int = 0) -> List[int]:
    """The descriptors that one serve() handles, if each takes so long."""
    handled: List[int] = []

    def handle(fd: int, mask: int, since: int) -> None:
        handled.append(fd)
        clock.now += took_ns

    waiting.serve(handle, clock.now, share_ns)
    return handled


def test_an_iteration_has_one_slice_for_new_clients_bulk_or_ends() -> None:
    clock = Clock()
    waiting = Posted(clock)
    for lane, first in ((NEW, 10), (BULK, 20), (ENDING, 30)):
        for fd in range(first, first + 4):
            waiting.put(lane, fd, 1, 0)
    turns = [names(waiting, clock, SLICE_NS) for _ in range(12)]
    assert turns == [[10], [20], [30], [31], [11], [21], [32], [33], [12], [22], [13], [23]]
    assert not waiting.masks


def test_short_ends_share_a_slice_and_what_is_left_of_it_goes_to_the_next_lane() -> None:
    clock = Clock()
    waiting = Posted(clock)
    for fd in range(30, 33):
        waiting.put(ENDING, fd, 1, 0)
    waiting.put(NEW, 10, 1, 0)
    assert names(waiting, clock, SLICE_NS // 5) == [10, 30, 31, 32]


def test_posted_events_have_as_much_time_as_the_orders_had() -> None:
    """Else a worker full of orders would never accept."""
    clock = Clock()
    waiting = Posted(clock)
    for fd in range(100):
        waiting.put(NEW, fd, 1, 0)
    assert len(names(waiting, clock, SLICE_NS, 10 * SLICE_NS)) == 10


def test_a_descriptor_that_is_posted_twice_keeps_its_place_its_first_time_and_both_masks() -> None:
    waiting = Posted(Clock())
    waiting.put(BULK, 5, 1, 100)
    waiting.put(BULK, 6, 1, 150)
    waiting.put(BULK, 5, 8, 200)
    handled: List[Tuple[int, int, int]] = []
    waiting.serve(lambda *event: handled.append(event), 0, 0)
    assert handled == [(5, 9, 100), (6, 1, 150)]


@example([1, SLICE_NS // 2 - 1, 1, SLICE_NS // 2, SLICE_NS // 2])  # the second lane's slice begins in the middle
@given(st.lists(st.integers(1, 3 * SLICE_NS), min_size=1, max_size=40))
def test_an_order_waits_for_one_slice_and_the_event_that_began_in_it(took: List[int]) -> None:
    clock = Clock()
    waiting = Posted(clock)
    for fd in range(len(took)):
        waiting.put(LANES[fd % 3], fd, 1, 0)

    def handle(fd: int, mask: int, since: int) -> None:
        clock.now += took[fd]

    while waiting.masks:
        began = clock.now
        waiting.serve(handle, began, 0)
        assert began < clock.now < began + SLICE_NS + max(took)


def test_a_number_that_comes_back_has_neither_the_place_nor_the_time_of_the_closed_descriptor() -> None:
    """Its lane is its own: that it ended does not go with bulk."""
    waiting = Posted(Clock())
    waiting.put(BULK, 5, 1, 100)
    waiting.drop(5)
    waiting.put(BULK, 6, 1, 200)
    waiting.put(ENDING, 5, 16, 300)
    handled: List[Tuple[int, int, int]] = []
    waiting.serve(lambda *event: handled.append(event), 0, 0)
    assert handled == [(6, 1, 200), (5, 16, 300)]


class Lanes(RuleBasedStateMachine):
    """Beside a model: what waits, oldest first, in the lane in which it was first posted."""

    @initialize()
    def begin(self) -> None:
        self.clock = Clock()
        self.waiting = Posted(self.clock)
        self.model: Dict[int, Tuple[int, int, int]] = {}  # descriptor -> lane, mask, since when
        self.unserved = dict.fromkeys(LANES, 0)  # how often in a row a lane had something, and got nothing

    def _put(self, lane: int, fd: int, mask: int) -> None:
        self.waiting.put(lane, fd, mask, self.clock.now)
        first, known, since = self.model.get(fd, (lane, 0, self.clock.now))
        self.model[fd] = (first, known | mask, since)

    @rule(lane=st.sampled_from(LANES), fd=FDS, bit=st.integers(0, 3))
    def put(self, lane: int, fd: int, bit: int) -> None:
        self._put(lane, fd, 1 << bit)

    @rule(fd=FDS)
    def close(self, fd: int) -> None:
        self.waiting.drop(fd)
        self.model.pop(fd, None)

    @rule(took=st.integers(1, 2 * SLICE_NS), share=st.integers(0, 3 * SLICE_NS), again=st.booleans())
    def serve(self, took: int, share: int, again: bool) -> None:
        """What is handled waited, and is told once with all its events; the first may be posted anew meanwhile."""
        before = {lane for lane, _, _ in self.model.values()}
        served: Set[int] = set()

        def handle(fd: int, mask: int, since: int) -> None:
            lane, *known = self.model.pop(fd)
            assert [mask, since] == known
            self.clock.now += took
            if again and not served:
                self._put(NEW, fd, 1)
            served.add(lane)

        self.waiting.serve(handle, self.clock.now, share)
        assert served or not before, "an iteration makes progress"
        for lane in LANES:
            self.unserved[lane] = self.unserved[lane] + 1 if lane in before - served else 0

    @invariant()
    def nothing_is_lost_and_no_lane_starves(self) -> None:
        if hasattr(self, "model"):
            assert self.waiting.masks == {fd: mask for fd, (_, mask, _) in self.model.items()}
            assert max(self.unserved.values()) <= 3


TestLanes = Lanes.TestCase
