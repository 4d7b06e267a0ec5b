"""Sweeps: however many sessions come and go, two visits of one are a step apart or more, and no session is forgotten."""

from __future__ import annotations

import itertools
from typing import Callable, Dict, Iterator, List, Tuple

import pytest
from _tsproxy.loop.timers import NEVER_NS, TICK_NS, Timers
from _tsproxy.proxy.sweep import Sweep
from _tsproxy.stats.counters import Counter, SharedCounters
from _tsproxy.stats.segments import Segments
from hypothesis import example, given
from hypothesis import strategies as st

STEP_NS = 1_000_000_000
SLICE = 32


class Session:
    """When it was visited."""

    def __init__(self, begun_ns: int) -> None:
        self.begun_ns = begun_ns
        self.visits: List[int] = []

    def on_bug(self, bug: Exception) -> None:
        raise bug


class Crowd:
    """Sessions that come and go, a sweep over them, and a clock that jumps from one deadline to the next."""

    def __init__(self) -> None:
        self.now, self._ids = 0, itertools.count(1)
        self.timers = Timers()
        self.sessions: Dict[int, Session] = {}
        self.sweep: Sweep[Session] = Sweep(self.timers, self.sessions, STEP_NS, lambda *visit: self.visit(*visit))
        self.visit: Callable[[Session, int], None] = lambda session, now_ns: session.visits.append(now_ns)
        self.all: List[Session] = []

    def come(self, count: int) -> None:
        for number in itertools.islice(self._ids, count):
            self.sessions[number] = Session(self.now)
            self.all.append(self.sessions[number])
            self.sweep.begin(self.now)

    def go(self, count: int, newest: bool) -> None:
        for number in sorted(self.sessions, reverse=newest)[:count]:
            del self.sessions[number]

    def run_until(self, end: int) -> None:
        while self.timers.next_ns <= end:
            self.now = self.timers.next_ns
            for timer in self.timers.due(self.now):
                timer.on_deadline(self.now)
        self.now = end


@pytest.fixture
def crowd() -> Iterator[Crowd]:
    yield Crowd()


# How long after the change before, how many come, how many go, and whether the newest of them.
CHANGES = st.lists(st.tuples(st.integers(0, 3 * STEP_NS), st.integers(0, 100), st.integers(0, 100), st.booleans()), max_size=8)


@given(st.integers(1, 200), CHANGES)
@example(64, [(3 * STEP_NS, 0, 32, True)])
@example(64, [(3 * STEP_NS, 1, 0, True)])
@example(320, [(3 * STEP_NS, 0, 288, True), (3 * STEP_NS, 0, 31, False)])
def test_two_visits_of_a_session_are_a_step_apart_or_more_and_none_is_forgotten(
    first: int, changes: List[Tuple[int, int, int, bool]]
) -> None:
    crowd = Crowd()
    crowd.come(first)
    for after_ns, come, go, newest in changes:
        crowd.run_until(crowd.now + after_ns)
        crowd.come(come)
        crowd.go(go, newest)
    crowd.run_until(crowd.now + 4 * STEP_NS)
    for session in crowd.all:
        assert all(later - earlier >= STEP_NS for earlier, later in zip(session.visits, session.visits[1:]))
    for session in crowd.sessions.values():
        assert crowd.now - max(session.visits) <= 2 * STEP_NS


def test_a_session_that_stays_while_the_crowd_does_is_visited_each_step(crowd: Crowd) -> None:
    crowd.come(5 * SLICE)
    crowd.run_until(20 * STEP_NS)
    for session in crowd.all:
        later = zip(session.visits, session.visits[1:])
        assert all(after - before <= STEP_NS + TICK_NS for before, after in later)
        assert session.visits[0] <= 2 * STEP_NS


def test_of_sessions_that_have_ended_little_is_left_also_before_their_turn(crowd: Crowd) -> None:
    crowd.come(1)
    for _ in range(1000):
        crowd.come(1)
        crowd.go(1, newest=True)
        crowd.run_until(crowd.now + STEP_NS // 100)
        assert len(crowd.sweep._queue) == len(crowd.sweep._queued) <= 2 * SLICE
    assert crowd.all[0].visits


def test_without_sessions_no_timer_is_armed(crowd: Crowd) -> None:
    assert crowd.timers.next_ns == NEVER_NS
    crowd.come(2 * SLICE)
    crowd.run_until(3 * STEP_NS)
    crowd.go(2 * SLICE, newest=True)
    crowd.run_until(5 * STEP_NS)
    assert crowd.timers.next_ns == NEVER_NS


def test_the_most_segments_in_a_second_stay_the_same_when_one_more_session_comes(crowd: Crowd) -> None:
    """Each sends ten a second, which the visits find; no sample has two visits of those that were there."""
    counters = SharedCounters.create(1)
    row = counters.worker(0)
    segments = Segments(lambda: [counters], lambda: crowd.now / STEP_NS)
    row[Counter.ACCEPTED] = 1

    def look(session: Session, now_ns: int) -> None:
        row[Counter.SEGMENTS_SENT] += 10 * (now_ns - max(session.visits, default=session.begun_ns)) // STEP_NS
        session.visits.append(now_ns)

    crowd.visit = look
    crowd.come(SLICE)
    crowd.run_until(STEP_NS // 2)
    crowd.come(SLICE)
    for twentieth in range(19, 200):
        crowd.run_until(twentieth * STEP_NS // 20)
        segments.sample(woken=twentieth == 19)
        if twentieth == 116:
            crowd.come(1)
    most = segments.fields()["upstream_segments_per_s_max"]
    counters.close()
    vars(segments).clear()
    vars(counters).clear()
    row.release()
    assert 0.9 * 20 * SLICE <= most <= 20 * (SLICE + 1)
