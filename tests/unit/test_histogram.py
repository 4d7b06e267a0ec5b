"""Histograms: each time in the one slot that holds it, percentiles within that slot, buckets that add up."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from fractions import Fraction
from typing import List

import pytest
from _tsproxy.stats import histogram
from _tsproxy.stats.histogram import BUCKETS, LIMITS_US, LINEAR_NS, STEP_NS, Counts, bucket, percentile, summary, upper_ns
from hypothesis import example, given
from hypothesis import strategies as st
from samples import row_of

LONGEST_NS = upper_ns(BUCKETS - 1)
# As many short ones as long ones: a plain range would hardly ever be below a second.
TIMES = st.integers(0, 40).flatmap(lambda bits: st.integers(0, min(2**bits, LONGEST_NS - 1)))
EDGES = sorted({edge + by for edge in map(upper_ns, range(BUCKETS)) for by in (-1, 0, 1)})


def counts_of(times: List[int]) -> Counts:
    return sorted(Counter(map(bucket, times)).items())


def test_upper_edges_ascend_from_a_quarter_of_a_microsecond_to_eighteen_minutes() -> None:
    edges = [upper_ns(index) for index in range(BUCKETS)]
    assert all(low < high for low, high in zip(edges, edges[1:]))
    assert edges[0] == 250
    assert 17.5 < edges[-1] / 60e9 < 18


def test_each_slot_begins_where_the_one_before_it_ends() -> None:
    assert bucket(0) == 0
    for index in range(BUCKETS - 1):
        edge = upper_ns(index)
        assert (bucket(edge - 1), bucket(edge)) == (index, index + 1)


def test_no_slot_is_wider_than_a_quarter_of_a_microsecond_or_a_thirty_second_part() -> None:
    for index in range(1, BUCKETS):
        low, high = upper_ns(index - 1), upper_ns(index)
        assert high - low == STEP_NS if low < LINEAR_NS else (high - low) * 32 <= low


@given(TIMES)
@example(LINEAR_NS)
@example(LINEAR_NS - 1)
@example(LONGEST_NS - 1)
def test_a_time_lies_within_its_slot(took: int) -> None:
    index = bucket(took)
    assert took < upper_ns(index)
    assert index == 0 or took >= upper_ns(index - 1)


@given(st.sampled_from(EDGES) | st.integers(-(2**70), 2**70), st.integers(0, 2**66))
def test_a_longer_time_is_never_in_an_earlier_slot(took: int, longer_by: int) -> None:
    assert 0 <= bucket(took) <= bucket(took + longer_by) < BUCKETS


@pytest.mark.parametrize(("took", "index"), [(-1, 0), (-(2**63), 0), (LONGEST_NS, BUCKETS - 1), (2**63, BUCKETS - 1)])
def test_times_out_of_range_go_into_the_outermost_slots(took: int, index: int) -> None:
    assert bucket(took) == index


@given(st.lists(TIMES, min_size=1), st.sampled_from([0.001, 0.25, 0.5, 0.99, 0.999, 1.0]) | st.floats(0.001, 1))
def test_a_percentile_is_the_upper_edge_of_the_slot_of_the_one_at_that_rank(times: List[int], share: float) -> None:
    rank = math.ceil(Fraction(share) * len(times))
    took = sorted(times)[rank - 1]
    found = percentile(counts_of(times), share)
    assert found is not None
    assert found == upper_ns(bucket(took)) / 1000
    assert took < found * 1000 <= max(took + STEP_NS, took * 33 / 32)


def test_of_nothing_there_is_no_percentile() -> None:
    assert percentile([], 0.5) is None
    assert percentile([], 1.0) is None


@given(st.lists(st.tuples(st.integers(0, BUCKETS - 1), st.integers(1, 2**64)), min_size=1, unique_by=lambda pair: pair[0]))
@example([(0, 2**63 - 1)])
def test_the_maximum_is_found_however_high_the_counts(counts: Counts) -> None:
    counts = sorted(counts)
    assert percentile(counts, 1.0) == upper_ns(counts[-1][0]) / 1000
    assert percentile(counts, 0.5) is not None


@given(st.lists(TIMES))
def test_the_buckets_count_what_took_less_than_their_limit(times: List[int]) -> None:
    fields = summary("relay_us", counts_of(times), max(times, default=0))
    ordered = sorted(times)
    for limit in LIMITS_US:
        assert fields[f"relay_us_le_{limit}"] == bisect_left(ordered, limit * 1000)
    assert fields["relay_us_count"] == len(times)
    assert fields["relay_us_max"] == (max(times) / 1000 if times else None)
    assert not times or all(fields[f"relay_us_{part}"] <= max(times) / 1000 for part in ("p50", "p99", "p999"))  # type: ignore


def test_the_summary_has_its_fields_in_order() -> None:
    buckets = [f"x_le_{2**power}" for power in range(21)]
    assert list(summary("x", [], 0)) == ["x_p50", "x_p99", "x_p999", "x_max", *buckets, "x_count"]
    assert set(summary("x", [], 0).values()) == {None, 0}


def test_each_limit_is_the_edge_of_a_slot() -> None:
    edges = {upper_ns(index) for index in range(BUCKETS)}
    assert all(limit * 1000 in edges for limit in LIMITS_US)


@given(st.lists(st.lists(TIMES, max_size=8), max_size=4))
def test_the_sum_of_several_workers_is_what_one_would_have_counted(workers: List[List[int]]) -> None:
    together = [took for times in workers for took in times]
    assert histogram.add(map(row_of, workers)) == counts_of(together)


def test_no_slot_is_passed_over() -> None:
    row = row_of([])
    for index in range(BUCKETS):
        row[index] = 7
        assert histogram.add([row]) == [(index, 7)]
        row[index] = 0
