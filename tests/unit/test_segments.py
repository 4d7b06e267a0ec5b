"""Segments in a second: the most is never too high, however late a sample is; nothing is sampled while no session is open."""

from __future__ import annotations

import itertools
import os
from typing import Dict, Iterator, List, Tuple

import pytest
from _tsproxy.stats.board import Board
from _tsproxy.stats.counters import ACCEPTOR_ROW, Counter, SharedCounters
from _tsproxy.stats.segments import Segments
from hypothesis import example, given
from hypothesis import strategies as st

NEVER = float("inf")


class Route:
    """One route's counters, a clock that stands still, and the segments that are sampled."""

    def __init__(self, limit: int = 0) -> None:
        self.now = 1000.0
        self.counters = SharedCounters.create(2)
        self.segments = Segments(lambda: [self.counters], lambda: self.now)
        self.segments.limit = limit

    def open(self, sessions: int = 1) -> None:
        self.counters.rows[ACCEPTOR_ROW][Counter.ACCEPTED] += sessions

    def end(self, sessions: int = 1) -> None:
        self.counters.worker(0)[Counter.ENDED] += sessions

    def send(self, segments: int, worker: int = 0) -> None:
        self.counters.worker(worker)[Counter.SEGMENTS_SENT] += segments

    def at(self, after_s: float, woken: bool = False) -> str:
        """A sample so much later; the warning."""
        self.now += after_s
        return self.segments.sample(woken)

    @property
    def most(self) -> int:
        return self.segments.fields()["upstream_segments_per_s_max"]

    def close(self) -> None:
        os.close(self.counters.fd)
        vars(self.segments).clear()
        vars(self.counters).clear()


@pytest.fixture
def route() -> Iterator[Route]:
    made = Route()
    yield made
    made.close()


@pytest.fixture
def limited() -> Iterator[Route]:
    """At most 100 segments in a second."""
    made = Route(limit=100)
    yield made
    made.close()


def test_the_most_segments_are_those_of_one_second_of_all_workers(route: Route) -> None:
    route.open(2)
    route.at(0, woken=True)
    for sent in (10, 500, 20):
        route.send(sent)
        route.send(1, worker=1)
        route.at(0.9)
    assert route.most == 501


def test_segments_count_for_the_most_before_their_second_is_over(route: Route) -> None:
    route.open()
    route.at(0, woken=True)
    route.send(30)
    assert route.segments.fields() == {"upstream_segments_per_s": 30, "upstream_segments_per_s_max": 30}
    route.at(0.5)
    route.send(40)
    assert route.most == 70  # that was no sample: it was not due


@pytest.mark.parametrize(("late_s", "most"), [(0.09, 600), (0.2, 300), (1.2, 200), (9.3, 54)])
def test_a_late_sample_of_segments_is_divided_by_the_looks_that_fit_into_it(route: Route, late_s: float, most: int) -> None:
    route.open()
    route.at(0, woken=True)
    route.send(600)
    route.at(0.9 + late_s)
    assert route.most == most


def test_the_rate_of_segments_is_that_of_the_interval_and_at_least_over_a_second(route: Route) -> None:
    route.send(1000)
    route.now += 10
    assert route.segments.fields()["upstream_segments_per_s"] == 100
    route.send(1000)
    route.now += 0.1
    assert route.segments.fields()["upstream_segments_per_s"] == 1000
    assert route.segments.fields()["upstream_segments_per_s"] == 0


def test_segments_are_sampled_only_while_a_session_is_open_and_for_two_seconds_more(route: Route) -> None:
    assert route.segments.next_sample == NEVER
    route.at(60)
    assert route.segments.next_sample == NEVER
    route.at(60, woken=True)
    assert route.segments.next_sample == pytest.approx(route.now + 0.9)
    route.open()
    for _ in range(10):
        route.at(0.9)
        assert route.segments.next_sample == pytest.approx(route.now + 0.9)
    route.end()
    route.at(0.9)
    route.at(0.9)
    assert route.segments.next_sample < NEVER
    route.at(0.9)
    assert route.segments.next_sample == NEVER


def test_segments_of_a_first_second_are_not_divided_by_the_time_for_which_nobody_was_there(route: Route) -> None:
    route.at(3600)
    route.open()
    route.send(77)
    route.at(30, woken=True)
    assert route.most == 77


def test_a_segments_warning_comes_once_a_minute_and_tells_how_many_and_the_limit(limited: Route) -> None:
    limited.open()
    assert limited.at(0, woken=True) == ""
    limited.send(100)
    assert limited.at(0.9) == ""
    limited.send(101)
    said = "101 segments were sent to the exchange in a second; --segments-warning is 100"
    assert limited.at(0.9) == said
    warned = []
    for _ in range(200):
        limited.send(101)
        warned.append(limited.at(0.9))
    assert warned == ([""] * 66 + [said]) * 2 + [""] * 66  # 67 samples are 60.3 s


def test_without_a_limit_segments_are_no_warning(route: Route) -> None:
    route.open()
    route.at(0, woken=True)
    route.send(10**9)
    assert route.at(0.9) == ""


SESSIONS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 1000)), min_size=1, max_size=6)
LATE = st.lists(st.floats(0, 3) | st.floats(0, 0.1), min_size=30, max_size=30)
SPACINGS = st.lists(st.floats(1.0, 1.4), min_size=40, max_size=40)


@given(SESSIONS, SPACINGS, LATE)
@example([(0.0, 100)], [1.0] * 40, [0.0] * 30)
@example([(0.0, 100)], [1.0] * 40, [0.1] * 30)
@example([(0.0, 100)], [1.0] * 40, [0.11] * 30)
def test_the_most_segments_are_never_more_than_one_look_at_each_session_has_found(
    sessions: List[Tuple[float, int]], spacings: List[float], late: List[float]
) -> None:
    """Each session has the same number at each look, looks are a second apart or more, and samples come late."""
    route = Route()
    route.open(len(sessions))
    route.at(0, woken=True)
    begun = route.now
    looks = sorted((begun + phase + passed, sent) for phase, sent in sessions for passed in itertools.accumulate(spacings))
    for late_s in late:
        due = route.segments.next_sample + late_s
        while looks and looks[0][0] <= due:
            route.now, sent = looks.pop(0)
            route.send(sent)
        route.now = due
        route.segments.sample()
    assert route.most <= sum(sent for _, sent in sessions)
    route.close()


# Many routes


class Routes:
    """The process's counters, those of routes, and a board of them by a clock that stands still."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.process = SharedCounters.create(1)
        self.board = Board(self.process, many=True, clock=lambda: self.now)

    def add(self, number: int, name: str, limit: int = 0) -> SharedCounters:
        counters = SharedCounters.create(1)
        counters.rows[ACCEPTOR_ROW][Counter.ACCEPTED] = 1
        self.board.add(number, name, counters, limit)
        return counters

    def told(self) -> Dict[object, Tuple[int, int]]:
        """By route, what was sent, and the most in a second."""
        lines = list(self.board.lines())
        return {line["route"]: (line["upstream_segments_sent"], line["upstream_segments_per_s_max"]) for line in lines}

    def after_a_sample(self) -> List[Tuple[str, str]]:
        self.now += 0.9
        return list(self.board.sample(woken=True))


@pytest.fixture
def routes() -> Iterator[Routes]:
    made = Routes()
    list(made.board.sample(woken=True))
    yield made
    made.process.close()
    vars(made).clear()


def send(counters: SharedCounters, segments: int) -> None:
    counters.worker(0)[Counter.SEGMENTS_SENT] += segments


def test_segments_are_told_and_warned_of_by_route_and_the_process_has_the_sum_of_each_second(routes: Routes) -> None:
    orders, quotes = routes.add(0, "orders", limit=100), routes.add(1, "quotes", limit=1000)
    assert routes.after_a_sample() == []
    send(orders, 150)
    send(quotes, 800)
    ((route, warning),) = routes.after_a_sample()
    assert (route, warning.split()[0]) == ("orders", "150")
    send(orders, 90)
    send(quotes, 900)
    assert routes.after_a_sample() == []
    assert routes.told() == {"orders": (240, 150), "quotes": (1700, 900), None: (1940, 990)}
    for counters in (orders, quotes):
        counters.close()


def test_segments_of_a_changed_route_go_on_with_its_new_limit_and_of_a_removed_one_stay_in_the_sum(
    routes: Routes,
) -> None:
    before = routes.add(0, "orders")
    routes.after_a_sample()
    send(before, 150)
    assert routes.after_a_sample() == []
    after = routes.add(1, "orders", limit=100)
    before.worker(0)[Counter.ENDED] = 1
    routes.board.end(0, "orders")
    assert routes.after_a_sample() == []
    assert routes.told() == {"orders": (150, 150), None: (150, 150)}
    send(after, 101)
    assert [route for route, _ in routes.after_a_sample()] == ["orders"]
    after.worker(0)[Counter.ENDED] = 1
    routes.board.end(1, "orders")
    assert routes.after_a_sample() == []
    assert routes.told() == {None: (251, 150)}


def test_no_segments_are_sampled_while_no_route_has_a_session(routes: Routes) -> None:
    counters = routes.add(0, "orders")
    routes.after_a_sample()
    assert routes.board.next_sample < NEVER
    counters.worker(0)[Counter.ENDED] = 1
    routes.now += 3
    assert list(routes.board.sample(woken=False)) == []
    assert routes.board.next_sample == NEVER
    counters.close()
