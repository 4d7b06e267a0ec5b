"""Shared counters: rows in shared memory, one writer each, seen by every process that has the descriptor."""

from __future__ import annotations

import contextlib
import mmap
import os
import subprocess
import sys
from typing import Callable, Dict, FrozenSet, Iterable, Iterator

import pytest
from _tsproxy.stats import counters, histogram, metrics
from _tsproxy.stats.counters import ACCEPTOR_ROW, FIRST_WORKER_ROW, REPORTER_ROW, Counter, SharedCounters
from harness import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st


@contextlib.contextmanager
def ledger_for(workers: int) -> Iterator[SharedCounters]:
    """New counters; at the end its descriptor is closed and its memory unmapped."""
    shared_counters = SharedCounters.create(workers)
    fd = shared_counters.fd
    try:
        yield shared_counters
    finally:
        vars(shared_counters).clear()  # the mapping goes with its last view
        os.close(fd)


@pytest.fixture
def shared_counters() -> Iterator[SharedCounters]:
    with ledger_for(3) as made:
        yield made


def test_new_shared_counters_are_zero_with_a_row_for_each_writer(shared_counters: SharedCounters) -> None:
    assert len(shared_counters.rows) == FIRST_WORKER_ROW + 3
    assert not any(any(row) for row in shared_counters.rows)
    assert len({ACCEPTOR_ROW, REPORTER_ROW, FIRST_WORKER_ROW}) == 3


def test_no_two_rows_share_a_page_or_a_word(shared_counters: SharedCounters) -> None:
    for number, row in enumerate(shared_counters.rows):
        row[0], row[len(row) - 1] = number + 1, number + 1
        for index in range(len(row)):
            row[index] = number + 1
    assert [set(row) for row in shared_counters.rows] == [{number + 1} for number in range(len(shared_counters.rows))]
    os.pwrite(shared_counters.fd, bytes(16), (counters.LOOP_LAG + histogram.BUCKETS + 1) * 8)  # how many rows there are
    raw = os.pread(shared_counters.fd, os.fstat(shared_counters.fd).st_size, 0)
    pages = [raw[start : start + mmap.PAGESIZE] for start in range(0, len(raw), mmap.PAGESIZE)]
    words = [set(memoryview(page).cast("Q")) - {0} for page in pages]
    assert all(len(writers) <= 1 for writers in words)
    assert sum(len(row) for row in shared_counters.rows) == sum(word != 0 for word in memoryview(raw).cast("Q"))


def test_a_row_has_room_for_every_counter_and_both_histograms(shared_counters: SharedCounters) -> None:
    assert sorted(Counter) == list(range(len(Counter)))
    assert counters.RELAY == len(Counter)
    assert counters.CONNECT == counters.RELAY + histogram.BUCKETS + 1
    assert len(shared_counters.worker(0)) == counters.LOOP_LAG + histogram.BUCKETS + 1


def test_workers_come_after_the_acceptor_and_the_reporter(shared_counters: SharedCounters) -> None:
    for index in range(3):
        shared_counters.worker(index)[Counter.ENDED] = index + 10
    assert [row[Counter.ENDED] for row in shared_counters.rows] == [0, 0, 10, 11, 12]


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1), min_size=4, max_size=4), st.sampled_from(Counter))
def test_a_total_is_the_sum_over_all_rows(values: list[int], counter: Counter) -> None:
    with ledger_for(2) as shared_counters:
        for row, value in zip(shared_counters.rows, values):
            row[counter] = value
        assert shared_counters.total(counter) == sum(values)
        assert sum(shared_counters.total(other) for other in Counter) == sum(values)


def test_histograms_are_those_of_the_workers_and_apart_from_each_other(shared_counters: SharedCounters) -> None:
    shared_counters.worker(0)[counters.RELAY] = 1
    shared_counters.worker(2)[counters.RELAY] = 2
    shared_counters.worker(1)[counters.RELAY + histogram.BUCKETS - 1] = 3
    shared_counters.worker(1)[counters.RELAY + histogram.BUCKETS] = 2**60  # the longest, which is written before its bucket
    shared_counters.worker(1)[counters.CONNECT] = 4
    assert shared_counters.histogram(counters.RELAY) == [(0, 3), (histogram.BUCKETS - 1, 3)]
    assert shared_counters.histogram(counters.CONNECT) == [(0, 4)]


@pytest.mark.parametrize("first", [counters.RELAY, counters.CONNECT, counters.LOOP_LAG])
def test_the_longest_time_of_all_workers_is_kept_as_it_was_measured(shared_counters: SharedCounters, first: int) -> None:
    for worker, times in enumerate([(1,), (3_333_333, 5), (2_000_000,)]):
        for took_ns in times:
            counters.observe(shared_counters.worker(worker), first, took_ns)
    assert shared_counters.longest_ns(first) == 3_333_333
    assert sum(count for _, count in shared_counters.histogram(first)) == 4
    name = {counters.RELAY: "relay_us", counters.CONNECT: "connect_us", counters.LOOP_LAG: "loop_lag_us"}[first]
    found = metrics.latencies(metrics.read(shared_counters))
    assert (found[f"{name}_max"], found[f"{name}_p999"]) == (3333.333, 3333.333)


def test_a_second_view_of_the_same_memory_sees_each_write_at_once(shared_counters: SharedCounters) -> None:
    other = SharedCounters(shared_counters.fd)
    other.worker(1)[Counter.ACCEPTED] += 5
    assert shared_counters.total(Counter.ACCEPTED) == 5
    shared_counters.rows[ACCEPTOR_ROW][Counter.ACCEPTED] += 1
    assert other.total(Counter.ACCEPTED) == 6


WORKER = """
import sys
from _tsproxy.stats import counters
from _tsproxy.stats.counters import Counter, SharedCounters
ledger, index = SharedCounters(int(sys.argv[1])), int(sys.argv[2])
row = ledger.worker(index)
for _ in range(20_000):
    row[Counter.RECEIVED_UPSTREAM] += index + 1
row[counters.RELAY + index], row[counters.LONGEST_RELAY] = 7, 1
row[len(row) - 1] = 1
print(ledger.rows[0][Counter.ACCEPTED])
"""


def test_workers_in_other_processes_count_in_their_own_rows_without_losing_any(shared_counters: SharedCounters) -> None:
    shared_counters.rows[ACCEPTOR_ROW][Counter.ACCEPTED] = 99
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "lib")}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(shared_counters.fd), str(index)],
            pass_fds=(shared_counters.fd,),
            stdout=subprocess.PIPE,
            env=environment,
        )
        for index in range(3)
    ]
    assert [worker.communicate(timeout=60)[0] for worker in workers] == [b"99\n"] * 3
    assert [worker.returncode for worker in workers] == [0] * 3
    assert [shared_counters.worker(index)[Counter.RECEIVED_UPSTREAM] for index in range(3)] == [20_000, 40_000, 60_000]
    assert shared_counters.histogram(counters.RELAY) == [(0, 7), (1, 7), (2, 7)]
    assert shared_counters.longest_ns(counters.LOOP_LAG) == 1, "the last word of a row"


def test_shared_counters_are_not_inherited_unless_they_are_passed_on(shared_counters: SharedCounters) -> None:
    assert not os.get_inheritable(shared_counters.fd)


# The metrics made of it


def test_the_metrics_say_what_was_received_and_acknowledged_and_derive_what_is_active(shared_counters: SharedCounters) -> None:
    row = shared_counters.worker(0)
    row[Counter.RECEIVED_DOWNSTREAM], row[Counter.ACKNOWLEDGED_UPSTREAM] = 100, 93
    row[Counter.RECEIVED_UPSTREAM], row[Counter.ACKNOWLEDGED_DOWNSTREAM] = 1000, 930
    row[Counter.CONNECTS], row[Counter.CONNECTS_ENDED], row[Counter.ENDED] = 9, 4, 3
    shared_counters.rows[ACCEPTOR_ROW][Counter.ACCEPTED] = 12
    fields = metrics.totals(shared_counters)
    assert (fields["downstream_cx_rx_bytes_total"], fields["upstream_cx_tx_bytes_total"]) == (100, 93)
    assert (fields["upstream_cx_rx_bytes_total"], fields["downstream_cx_tx_bytes_total"]) == (1000, 930)
    assert (fields["downstream_cx_active"], metrics.active(shared_counters), fields["upstream_cx_active"]) == (9, 9, 5)


def test_each_counter_shows_in_the_metrics_but_those_of_the_inbox(shared_counters: SharedCounters) -> None:
    before = metrics.totals(shared_counters)
    for counter in (counter for counter in Counter if counter.name not in {"CONSUMED", "BEGUN"}):
        shared_counters.rows[REPORTER_ROW][counter] += 1
        after = metrics.totals(shared_counters)
        assert after != before, counter
        before = after


class MovingLedger(SharedCounters):
    """Counters on which something happens right after some looks at it, so many times at most."""

    watched: FrozenSet[Counter]
    happen: Callable[[memoryview], None]
    times: int

    def total(self, counter: Counter) -> int:
        value = super().total(counter)
        if counter in self.watched and self.times:
            self.times -= 1
            self.happen(self.worker(0))
        return value


def totals_while(happen: Callable[[memoryview], None], watched: Iterable[Counter], times: int) -> Dict[str, int]:
    """The metrics of empty counters on which that happens meanwhile."""
    with ledger_for(1) as still:
        shared_counters = MovingLedger(still.fd)
        shared_counters.happen, shared_counters.watched, shared_counters.times = happen, frozenset(watched), times
        return metrics.totals(shared_counters)


def a_connection_comes_and_goes(row: memoryview) -> None:
    for counter in (Counter.ACCEPTED, Counter.CONNECTS, Counter.CONNECTS_ENDED, Counter.ENDED):
        row[counter] += 1


def bytes_come_and_are_acknowledged(row: memoryview) -> None:
    for counter in (Counter.RECEIVED_UPSTREAM, Counter.RECEIVED_DOWNSTREAM):
        row[counter] += 100
    for counter in (Counter.ACKNOWLEDGED_UPSTREAM, Counter.ACKNOWLEDGED_DOWNSTREAM):
        row[counter] += 100


@pytest.mark.parametrize("seen", [Counter.ACCEPTED, Counter.ENDED, Counter.CONNECTS, Counter.CONNECTS_ENDED])
def test_no_gauge_is_negative_when_connections_come_and_go_between_two_looks(seen: Counter) -> None:
    fields = totals_while(a_connection_comes_and_goes, [seen], times=100)
    assert fields["downstream_cx_active"] >= 0
    assert fields["upstream_cx_active"] >= 0


@pytest.mark.parametrize("seen", ["ACKNOWLEDGED", "RECEIVED"])
def test_never_more_is_acknowledged_than_received_when_bytes_come_between_two_looks(seen: str) -> None:
    watched = [counter for counter in Counter if counter.name.startswith(seen)]
    fields = totals_while(bytes_come_and_are_acknowledged, watched, times=100)
    assert fields["downstream_cx_tx_bytes_total"] <= fields["upstream_cx_rx_bytes_total"]
    assert fields["upstream_cx_tx_bytes_total"] <= fields["downstream_cx_rx_bytes_total"]


def test_a_client_that_its_killed_worker_had_counted_but_not_begun_with_is_not_active_for_ever() -> None:
    """The worker accepted it by itself. Its replacement's row goes on, and may be written off again."""
    with ledger_for(1) as shared_counters:
        row = shared_counters.worker(0)
        row[Counter.ACCEPTED], row[Counter.BEGUN], row[Counter.ENDED] = 7, 6, 4
        assert shared_counters.count_lost(0) == 3
        assert metrics.active(shared_counters) == 0
        row[Counter.ACCEPTED] += 1
        row[Counter.BEGUN] += 1
        assert shared_counters.count_lost(0) == 1
        assert metrics.active(shared_counters) == 0
        shared_counters.rows[ACCEPTOR_ROW][Counter.ACCEPTED] += 1  # handed over in the drain
        row[Counter.BEGUN] += 1
        del row
        assert metrics.active(shared_counters) == 1


def test_counters_absorb_what_ended_ones_have_counted_and_the_longest_of_both(shared_counters: SharedCounters) -> None:
    with ledger_for(2) as ended:
        for at, row in enumerate(ended.rows[FIRST_WORKER_ROW:], 1):
            row[Counter.ENDED] = at
            counters.observe(row, counters.CONNECT, 1_000_000 * at)
        counters.observe(shared_counters.worker(0), counters.CONNECT, 1_500_000)
        for times in (1, 2):
            shared_counters.absorb(ended)
            assert shared_counters.total(Counter.ENDED) == 3 * times
            assert sum(count for _, count in shared_counters.histogram(counters.CONNECT)) == 1 + 2 * times
            assert shared_counters.longest_ns(counters.CONNECT) == 2_000_000


@given(st.binary(max_size=300_000), st.integers(0, 3), st.integers(1, 4))
@settings(deadline=None, max_examples=20)
def test_a_note_goes_with_the_counters_to_whoever_attaches(note: bytes, slots: int, workers: int) -> None:
    with contextlib.closing(SharedCounters.create(workers, slots, note)) as made:
        for row in made.rows[REPORTER_ROW:]:
            row[len(row) - 1] = 2**64 - 1
        assert counters.note_in(made.fd) == note
        assert len(SharedCounters(made.fd).rows) == len(made.rows)
