"""The event loop: order of events, deferred close(2), bugs in handlers, timers, and when run() and run_for() return."""

from __future__ import annotations

import contextlib
import socket
import time
from typing import Callable, Iterator, List, Optional, Set, Tuple

import pytest
from _tsproxy.loop.event_loop import EventLoop
from _tsproxy.loop.poller import MAX_EVENTS, READ
from _tsproxy.loop.posted import BULK, ENDING, NEW, NOW
from _tsproxy.loop.timers import NEVER_NS, TICK_NS, Timers
from hypothesis import given, settings
from hypothesis import strategies as st

MS = 1_000_000
LANES = st.sampled_from([NOW, NEW, BULK, ENDING])


def nothing() -> None:
    """Most handlers have nothing to do."""


class Pair:
    """A handler of one end of a socket pair; it notes its number, and consumes one byte."""

    def __init__(self, number: int, lane: int, handled: List[int], call: Callable[[], object] = nothing) -> None:
        self.number, self.lane, self._handled, self._call = number, lane, handled, call
        self.bugs: List[Exception] = []
        self.contains = True
        self.ours, self.peer = socket.socketpair()
        self.fd = self.ours.fileno()

    def readable(self) -> None:
        assert self.lane == NOW
        self.ready(0)

    def ready(self, mask: int) -> None:
        self._handled.append(self.number)
        self.ours.recv(1)
        self._call()

    def on_bug(self, bug: Exception) -> None:
        self.bugs.append(bug)
        if not self.contains:
            raise bug


class Stand:
    """A loop, and pairs in it."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self.loop = stack.enter_context(contextlib.closing(EventLoop()))
        self.handled: List[int] = []
        self.pairs: List[Pair] = []

    def pair(self, lane: int = NOW, call: Callable[[], object] = nothing) -> Pair:
        made = Pair(len(self.pairs), lane, self.handled, call)
        self._stack.enter_context(made.ours)
        self._stack.enter_context(made.peer)
        self.pairs.append(made)
        self.loop.watch(made.fd, READ, made)
        return made

    def run_until_handled(self, count: int) -> None:
        self.loop.run_for(5000 * MS, lambda: len(self.handled) >= count)


@contextlib.contextmanager
def a_stand() -> Iterator[Stand]:
    with contextlib.ExitStack() as stack:
        made = Stand(stack)
        yield made
        made.loop.handlers.clear()


@pytest.fixture
def stand() -> Iterator[Stand]:
    with a_stand() as made:
        yield made


class Alarm:
    """A timer that notes itself and when it was due."""

    def __init__(self, number: int, fired: List[Tuple[int, int]], bug: Optional[Exception] = None) -> None:
        self.number, self._fired, self._bug = number, fired, bug
        self.contains = True

    def on_deadline(self, now_ns: int) -> None:
        self._fired.append((self.number, now_ns))
        if self._bug:
            raise self._bug

    def on_bug(self, bug: Exception) -> None:
        if not self.contains:
            raise bug


# Order of events


@settings(deadline=None, max_examples=50)
@given(st.lists(LANES, min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_each_event_is_handled_once_established_sessions_first_and_each_lane_in_order(
    lanes: List[int], shuffled: object
) -> None:
    with a_stand() as stand:
        for lane in lanes:
            stand.pair(lane)
        order = list(stand.pairs)
        shuffled.shuffle(order)  # type: ignore[attr-defined]
        for pair in order:
            pair.peer.send(b"x")
        stand.run_until_handled(len(lanes))
        came = [pair.number for pair in order]
        assert sorted(stand.handled) == sorted(came)
        at_once = sum(lane == NOW for lane in lanes)
        assert [lanes[number] for number in stand.handled[:at_once]] == [NOW] * at_once
        for lane in (NOW, NEW, BULK, ENDING):
            assert [n for n in stand.handled if lanes[n] == lane] == [n for n in came if lanes[n] == lane]


def test_hangups_are_handled_last_in_an_iteration(stand: Stand) -> None:
    hung_up, bulk, new, established = (stand.pair(lane) for lane in (NOW, BULK, NEW, NOW))
    hung_up.peer.close()
    for pair in (bulk, new, established):
        pair.peer.send(b"x")
    stand.run_until_handled(4)
    assert stand.handled[:4] == [established.number, new.number, bulk.number, hung_up.number]


def test_run_returns_only_when_no_posted_event_is_left(stand: Stand) -> None:
    for _ in range(20):
        stand.pair(BULK, lambda: time.sleep(0.0002)).peer.send(b"x")  # each takes more than a slice
    stand.loop.run(lambda: bool(stand.handled))
    assert len(stand.handled) == 20


def test_now_is_when_a_posted_event_came_and_not_when_its_turn_came(stand: Stand) -> None:
    seen: List[int] = []
    for _ in range(3):
        stand.pair(BULK, lambda: (seen.append(stand.loop.now), time.sleep(0.002))[0]).peer.send(b"x")
    stand.run_until_handled(3)
    assert seen[0] == seen[1] == seen[2]


# Deferred close


def test_a_socket_that_is_closed_later_keeps_its_number_within_the_iteration(stand: Stand) -> None:
    """Its event is queued already: with a new socket under its number that one would get it."""
    numbers: List[int] = []

    def close_both_and_open_one() -> None:
        for pair in (first, second):
            stand.loop.close_later(pair.ours)
        with socket.socket() as new:
            numbers.append(new.fileno())

    first = stand.pair(NOW, close_both_and_open_one)
    second = stand.pair(NOW)
    first.peer.send(b"x")
    second.peer.send(b"x")
    stand.run_until_handled(1)
    assert stand.handled == [first.number], "the second was given up before its turn"
    assert numbers[0] not in (first.fd, second.fd)
    assert (first.ours.fileno(), second.ours.fileno()) == (-1, -1)


def test_a_posted_event_of_a_socket_that_is_closed_later_is_dropped(stand: Stand) -> None:
    first = stand.pair(BULK, lambda: stand.loop.close_later(second.ours))
    second = stand.pair(BULK)
    first.peer.send(b"x")
    second.peer.send(b"x")
    stand.run_until_handled(1)
    assert stand.handled == [first.number]
    assert not stand.loop.posted.masks


def test_what_is_to_come_after_close_comes_after_all_sockets_are_closed(stand: Stand) -> None:
    seen: List[bytes] = []

    def give_up() -> None:
        stand.loop.after_close(lambda: seen.append(first.peer.recv(1)))
        stand.loop.close_later(first.ours)

    first = stand.pair(NOW, give_up)
    first.peer.send(b"x")
    stand.loop.run_for(5000 * MS, lambda: bool(seen))
    assert seen == [b""]


def test_an_unwatched_descriptor_wakes_nobody_though_another_copy_of_it_is_open(stand: Stand) -> None:
    """close(2) alone ends no watch then: epoll(7), Questions and answers, 6."""
    pair = stand.pair(NEW)
    pair.peer.send(b"x")
    with pair.ours.dup():
        stand.loop.unwatch(pair.fd)
        pair.ours.close()
        assert stand.loop.poller.wait(0, 8) == []
    stand.loop.unwatch(pair.fd)  # idempotent


def test_an_event_of_a_descriptor_that_was_unwatched_in_the_same_iteration_is_dropped(stand: Stand) -> None:
    first = stand.pair(NOW, lambda: stand.loop.unwatch(second.fd))
    second = stand.pair(NOW)
    first.peer.send(b"x")
    second.peer.send(b"x")
    stand.run_until_handled(1)
    assert stand.handled == [first.number]


def test_closing_the_loop_leaves_what_was_watched_open_and_closes_what_was_pending(stand: Stand) -> None:
    kept, given_up = stand.pair(), stand.pair()
    stand.loop.close_later(given_up.ours)
    stand.loop.close()
    assert kept.ours.fileno() == kept.fd
    assert given_up.ours.fileno() == -1


# Bugs


def raise_a_bug() -> None:
    raise ValueError("a bug")


@pytest.mark.parametrize("lane", [NOW, NEW])
@pytest.mark.parametrize("others", [0, 2])
def test_a_bug_that_a_handler_contains_costs_nobody_else_an_event(stand: Stand, lane: int, others: int) -> None:
    broken = stand.pair(lane, raise_a_bug)
    for _ in range(others):
        stand.pair(lane)
    for pair in stand.pairs:
        pair.peer.send(b"x")
    stand.run_until_handled(1 + others)
    assert [str(bug) for bug in broken.bugs] == ["a bug"]
    assert sorted(stand.handled) == list(range(1 + others))


@pytest.mark.parametrize("lane", [NOW, NEW])
def test_a_bug_that_a_handler_raises_again_ends_the_loop(stand: Stand, lane: int) -> None:
    broken = stand.pair(lane, raise_a_bug)
    broken.contains = False
    broken.peer.send(b"x")
    with pytest.raises(ValueError, match="a bug"):
        stand.loop.run_for(5000 * MS)
    assert stand.loop.timers.next_ns == NEVER_NS, "the end of run_for() is disarmed"


@pytest.mark.parametrize("contains", [True, False])
def test_a_bug_of_a_timer_goes_to_the_timer(stand: Stand, contains: bool) -> None:
    fired: List[Tuple[int, int]] = []
    broken, other = Alarm(0, fired, ValueError("a bug")), Alarm(1, fired)
    broken.contains = contains
    stand.loop.timers.arm(broken, stand.loop.now)
    stand.loop.timers.arm(other, stand.loop.now + 2 * TICK_NS)
    with contextlib.nullcontext() if contains else pytest.raises(ValueError, match="a bug"):
        stand.loop.run_for(5000 * MS, lambda: len(fired) == 2)
    assert [number for number, _ in fired] == ([0, 1] if contains else [0])


# Timers and time


def test_run_for_returns_at_its_time_and_not_before(stand: Stand) -> None:
    began = time.monotonic_ns()
    stand.loop.run_for(30 * MS)
    assert time.monotonic_ns() - began >= 30 * MS


def test_run_for_returns_as_soon_as_its_condition_holds_and_leaves_no_timer(stand: Stand) -> None:
    stand.pair().peer.send(b"x")
    stand.loop.run_for(60_000 * MS, lambda: bool(stand.handled))
    assert stand.loop.timers.next_ns == NEVER_NS


def test_a_condition_that_holds_from_the_start_handles_nothing(stand: Stand) -> None:
    stand.pair().peer.send(b"x")
    stand.loop.run(lambda: True)
    assert stand.handled == []


def test_timers_fire_in_the_order_of_their_deadlines_and_never_early(stand: Stand) -> None:
    fired: List[Tuple[int, int]] = []
    began = stand.loop.now
    deadlines = [began + delay * MS for delay in (40, 0, 20, 60)]
    for number, deadline in enumerate(deadlines):
        stand.loop.timers.arm(Alarm(number, fired), deadline)
    stand.loop.run_for(5000 * MS, lambda: len(fired) == 4)
    assert [number for number, _ in fired] == [1, 2, 0, 3]
    assert all(now_ns >= deadlines[number] for number, now_ns in fired)


def test_a_timer_may_arm_itself_again_and_each_time_the_condition_is_looked_at(stand: Stand) -> None:
    fired: List[Tuple[int, int]] = []

    class Again(Alarm):
        def on_deadline(self, now_ns: int) -> None:
            super().on_deadline(now_ns)
            stand.loop.timers.arm(self, now_ns + 1)

    stand.loop.timers.arm(Again(0, fired), stand.loop.now)
    stand.loop.run(lambda: len(fired) == 3)
    assert len(fired) == 3


def test_a_timer_that_an_earlier_one_disarms_does_not_fire(stand: Stand) -> None:
    fired: List[Tuple[int, int]] = []
    second = Alarm(1, fired)

    class First(Alarm):
        def on_deadline(self, now_ns: int) -> None:
            super().on_deadline(now_ns)
            stand.loop.timers.disarm(second)

    stand.loop.timers.arm(First(0, fired), stand.loop.now)
    stand.loop.timers.arm(second, stand.loop.now + TICK_NS)
    time.sleep(0.015)  # both are due in the same iteration
    stand.loop.run_for(15 * MS)
    assert [number for number, _ in fired] == [0]


class Watcher(Alarm):
    """It notes how many events were handled before it."""

    def __init__(self, stand: Stand, seen: List[int]) -> None:
        super().__init__(0, [])
        self._stand, self._seen = stand, seen

    def on_deadline(self, now_ns: int) -> None:
        self._seen.append(len(self._stand.handled))


@pytest.mark.parametrize("lane", [NOW, BULK])
def test_after_a_stall_all_that_is_ready_is_handled_before_timers_fire(stand: Stand, lane: int) -> None:
    """Else whose bytes wait in the kernel would be taken for silent, but for the first ones that epoll_wait(2) returns."""
    seen: List[int] = []
    for _ in range(3 * MAX_EVENTS):
        stand.pair(lane).peer.send(b"x")
    stand.loop.timers.arm(Watcher(stand, seen), stand.loop.now - 60_000 * MS)
    stand.loop.run_for(5000 * MS, lambda: bool(seen))
    assert seen == [3 * MAX_EVENTS]


def test_after_a_stall_timers_fire_though_there_is_always_more(stand: Stand) -> None:
    seen: List[int] = []

    def again() -> None:
        stand.pairs[stand.handled[-1]].peer.send(b"x")

    for _ in range(2 * MAX_EVENTS):
        stand.pair(NOW, again).peer.send(b"x")
    stand.loop.timers.arm(Watcher(stand, seen), stand.loop.now - 150 * MS)
    stand.loop.run_for(60_000 * MS, lambda: bool(seen))
    assert seen[0] > 2 * MAX_EVENTS


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("arm"), st.integers(0, 5), st.integers(0, 40), st.sampled_from([1, 4])),
        st.tuples(st.just("disarm"), st.integers(0, 5)),
        st.tuples(st.just("pass"), st.integers(0, 20)),
    ),
    max_size=60,
)


@settings(deadline=None)
@given(STEPS)
def test_armed_moved_and_disarmed_timers_fire_once_in_order_and_at_most_one_grain_late(steps: List[Tuple[object, ...]]) -> None:
    timers, fired, now = Timers(), [], 0  # type: ignore[var-annotated]
    alarms = [Alarm(number, fired) for number in range(6)]
    armed: dict[int, Tuple[int, int]] = {}  # deadline, grain
    for step, *numbers in steps:
        which, *more = [int(str(number)) for number in numbers]
        if step == "arm":
            armed[which] = (now + more[0] * MS, more[1])
            timers.arm(alarms[which], *armed[which])
        elif step == "disarm":
            armed.pop(which, None)
            timers.disarm(alarms[which])
        else:
            now += which * MS
            due = [alarm.number for alarm in timers.due(now)]  # type: ignore[attr-defined]
            must = {number for number, (deadline, grain) in armed.items() if deadline + grain * TICK_NS <= now}
            may: Set[int] = {number for number, (deadline, _) in armed.items() if deadline <= now}
            assert must <= set(due) <= may
            ticks = [-(-armed[number][0] // (TICK_NS * armed[number][1])) * armed[number][1] for number in due]
            assert ticks == sorted(ticks)
            for number in due:
                del armed[number]


def test_an_idle_loop_has_no_timer_of_its_own_and_a_blocked_one_reports_its_lag() -> None:
    lags: List[int] = []
    with contextlib.ExitStack() as stack:
        loop = stack.enter_context(contextlib.closing(EventLoop(on_lag=lags.append)))
        loop.run_for(10 * MS)
        assert loop.timers.next_ns == NEVER_NS
        lags.clear()
        probed: List[bool] = []

        def block() -> None:
            probed.append(loop.timers.next_ns <= loop.now + 100 * MS + TICK_NS)
            time.sleep(0.15)  # beyond the time of the probe

        pair = Pair(0, NOW, [], block)
        for sock in (pair.ours, pair.peer):
            stack.enter_context(sock)
        loop.watch(pair.fd, READ, pair)
        pair.peer.send(b"x")
        loop.run_for(60_000 * MS, lambda: bool(lags))
        assert probed == [True], "an event arms the probe"
        assert lags[0] >= 40 * MS


def test_the_lag_of_a_loop_with_events_is_measured_without_a_gap_and_no_more_once_they_end() -> None:
    """Else a thread that is stopped between a measurement and the next event was not late, as far as anyone can see."""
    lags: List[int] = []
    with contextlib.ExitStack() as stack:
        loop = stack.enter_context(contextlib.closing(EventLoop(on_lag=lags.append)))
        pair = Pair(0, NOW, [], lambda: pair.peer.send(b"x"))
        for sock in (pair.ours, pair.peer):
            stack.enter_context(sock)
        loop.watch(pair.fd, READ, pair)
        pair.peer.send(b"x")
        is_probed: List[bool] = []

        def look() -> bool:
            is_probed.append(loop.timers.next_ns <= loop.now + 100 * MS + TICK_NS)
            return len(lags) > 2

        loop.run(look)
        assert is_probed.index(True) == 1, "from the first event on"
        assert all(is_probed[1:])
        loop.unwatch(pair.fd)
        loop.run(lambda: loop.timers.next_ns == NEVER_NS)


def test_a_deadline_beyond_what_epoll_wait_takes_is_no_error(stand: Stand) -> None:
    stand.loop.timers.arm(Alarm(0, []), stand.loop.now + 10**18)
    second = stand.pair()
    stand.pair(call=lambda: second.peer.send(b"x")).peer.send(b"x")  # the first wait of a run() does not sleep
    stand.loop.run(lambda: len(stand.handled) == 2)
