"""The reporter: lines in the order in which things happened, figures that add up, an end that nothing holds up."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import re
import socket
import sys
import threading
import time
from typing import Any, Callable, Iterator, List, Optional, Sequence, Tuple

import pytest
from _tsproxy.linux import uapi
from _tsproxy.linux.addresses import pack
from _tsproxy.stats import counters, encoder, histogram, records
from _tsproxy.stats.board import Board
from _tsproxy.stats.counters import ACCEPTOR_ROW, REPORTER_ROW, Counter, SharedCounters
from _tsproxy.stats.endings import ENDING_FIELDS, Ending
from _tsproxy.stats.records import NOTICE_LEVELS, Notice, RecordPipe, RecordWriter
from _tsproxy.stats.reporter import Reporter, _Patience
from harness import PATIENCE, Line, examples, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import FULL, pipe

CLIENT = pack(socket.AF_INET, ("192.0.2.1", 50000))
UPSTREAM = pack(socket.AF_INET6, ("2001:db8::1", 443, 0, 0))
CLOSED = FULL._replace(
    worker=0, connection_id=1, client=CLIENT, upstream=UPSTREAM, discarded_bytes=5, client_syn_tsval=7, ending=Ending.CLOSED
)

HEAD = ["timestamp", "level", "event", "pid"]
CONNECTION_FIELDS = """connection_id worker client_address client_port upstream_address upstream_port
    upstream_local_address upstream_local_port duration_us connect_us rx_bytes tx_bytes upstream_tx_bytes discarded_bytes
    unacknowledged_bytes client_timestamps client_syn_tsval upstream_timestamps witness upstream_rtt_us upstream_retransmits
    upstream_segments_sent upstream_segments_received reason termination_state route""".split()
METRICS_FIELDS = """route start_time uptime_s interval_s downstream_cx_total downstream_cx_overflow downstream_cx_denied
    downstream_cx_rx_bytes_total downstream_cx_tx_bytes_total upstream_cx_total upstream_cx_rx_bytes_total
    upstream_cx_tx_bytes_total upstream_cx_connect_fail upstream_cx_connect_timeout downstream_cx_timestamps_total
    upstream_cx_timestamps_total upstream_cx_policy_refused_total downstream_flow_control_paused_reading_total
    upstream_flow_control_paused_reading_total cx_reset_by_peer_total idle_timeout_total log_lines_dropped_total
    worker_restarts_total downstream_cx_active upstream_cx_active rx_bytes_per_s tx_bytes_per_s
    upstream_segments_sent upstream_segments_received upstream_segments_per_s upstream_segments_per_s_max""".split()
METRICS_FIELDS += [f"{name}_us_{of}" for name in ("connect", "relay") for of in ("p50", "p99", "p999", "max")]


class Desk:
    """A reporter with all that it reads from and a file that it writes to."""

    def __init__(self, fd: Optional[int] = None, workers: int = 2, names: Sequence[str] = ("default",), **options: Any) -> None:
        self.fd = os.memfd_create("stdout") if fd is None else fd
        self.process, self.pipe = SharedCounters.create(workers), RecordPipe.create()
        self.writers = [RecordWriter(self.pipe.writer, self.process.worker(index)) for index in range(workers)]
        options = {"level": "debug", "interval_s": 0.0, "witness_names": ("none", "sysctl"), **options}
        self.reporter = Reporter(self.fd, self.process, self.pipe, **options)
        self.of_routes = [SharedCounters.create(workers) for _ in names]
        self.shared_counters = self.of_routes[0]
        for number, (name, of_route) in enumerate(zip(names, self.of_routes)):
            self.reporter.add_route(number, name, of_route)

    def lines(self) -> List[Line]:
        """What was written so far: whole lines, each of them JSON, none too long."""
        parts = os.pread(self.fd, os.fstat(self.fd).st_size, 0).split(b"\n")
        assert all(len(part) < 4096 for part in parts)
        return [json.loads(part) for part in parts[:-1]]

    def events(self) -> List[str]:
        return [line["event"] for line in self.lines()]

    def metrics(self) -> Line:
        """A `metrics` line made now."""
        before = self.events().count("metrics")
        self.reporter.metrics_now()
        wait_until(lambda: self.events().count("metrics") > before, "a metrics line")
        return [line for line in self.lines() if line["event"] == "metrics"][before]

    def close(self, **stop: Any) -> None:
        """Close the reporter, and wait for the end of its thread: on a busy machine it takes longer than close() waits."""
        self.reporter.close(**stop)
        wait_until(lambda: not self.reporter._thread.is_alive(), "the end of the reporter")

    def dropped(self) -> int:
        return self.process.total(Counter.LINES_DROPPED)


@contextlib.contextmanager
def desk_with(fd: Optional[int] = None, prepare: Callable[[Desk], None] = lambda _: None, **options: Any) -> Iterator[Desk]:
    """A desk whose reporter runs, once it is prepared; the reporter is closed at the end if the test has not done so."""
    desk = Desk(fd, **options)
    prepare(desk)
    desk.reporter.start()
    try:
        yield desk
    finally:
        desk.close()
        desk.reporter._wakeup.close()
        fds = [desk.process.fd, *(of_route.fd for of_route in desk.of_routes), *desk.pipe, *([desk.fd] if fd is None else [])]
        desk.writers.clear()
        vars(desk.reporter).clear()
        del desk.shared_counters
        for mapped in (desk.process, *desk.of_routes):
            vars(mapped).clear()  # the mapping goes with its last view
        for each in fds:
            os.close(each)


@pytest.fixture
def desk() -> Iterator[Desk]:
    with desk_with() as made:
        yield made


# Whatever a worker writes

I64, U64, BYTE = st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**64 - 1), st.integers(0, 255)
ANY_CLIENT = st.binary(min_size=len(CLIENT), max_size=len(CLIENT)) | st.sampled_from([CLIENT, UPSTREAM])
U16 = st.integers(0, 65535)
ANY_BODY = st.tuples(
    *(U16, U16, U64, I64, ANY_CLIENT, I64, st.integers(0, 30), BYTE, st.integers(-128, 127), I64, ANY_CLIENT),
    *(I64, st.integers(-128, 127), ANY_CLIENT, I64, I64, I64, I64, U64, U64, U64, U64, U64),
).map(lambda numbers: records._HEADER.pack(records._HEADER.size + records._BODY.size, 1) + records._BODY.pack(*numbers))
ANY_NOTICE = st.tuples(U16, I64, st.integers(0, 5), st.integers(-3, 3), st.binary(max_size=60)).map(
    lambda given: (
        records._HEADER.pack(records._HEADER.size + records._NOTICE_BODY.size + len(given[4]), 2)
        + records._NOTICE_BODY.pack(*given[:4])
        + given[4]
    )
)
WHATEVER = st.lists(st.binary(max_size=200) | ANY_BODY | ANY_NOTICE, max_size=4).map(b"".join)


@pytest.mark.parametrize("field", ["witness", "route"])
def test_a_record_with_a_number_that_has_no_word_costs_its_line_alone(desk: Desk, field: str) -> None:
    for connection, number in enumerate((0, 200, 0)):
        desk.writers[0].put(CLOSED._replace(connection_id=connection, **{field: number}))
    desk.close()
    assert [(line["event"], line.get("connection_id")) for line in desk.lines()] == [
        ("connection", 0),
        ("error", None),
        ("connection", 2),
    ]
    assert "can't be told" in desk.lines()[1]["message"]


def test_no_record_ends_the_reporter_whatever_is_in_it() -> None:
    """Any bytes, and frames of the right form with any numbers: what is said after them is written."""
    with desk_with() as desk:
        count = itertools.count()

        @settings(deadline=None, max_examples=examples(300))
        @given(WHATEVER)
        def write(data: bytes) -> None:
            os.write(desk.pipe.writer, data)
            number = next(count)
            desk.reporter.log("said", number=number)
            wait_until(lambda: f'"number":{number}}}'.encode() in tail(desk.fd), "the reporter goes on")

        write()
        assert all(line["event"] in {"said", "connection", "error", "warning", "debug"} for line in desk.lines())


def tail(fd: int) -> bytes:
    return os.pread(fd, 4096, max(0, os.fstat(fd).st_size - 4096))


# Order


def test_records_come_before_the_last_metrics_and_stop_comes_last(desk: Desk) -> None:
    for number in range(1000):
        desk.writers[number % 2].put(CLOSED._replace(connection_id=number))
    desk.reporter.metrics_now()
    desk.reporter.log("drain")
    desk.close(reason="SIGTERM")
    lines = desk.lines()
    assert [line["event"] for line in lines if line["event"] != "metrics"] == ["connection"] * 1000 + ["drain", "stop"]
    assert lines[-2]["event"] in {"metrics", "drain"}
    lines = [line for line in lines if line["event"] == "connection"]
    assert [line["connection_id"] for line in lines[:1000]] == list(range(1000))


STEPS = st.lists(st.sampled_from(["say", "metrics", "record", "notice"]), max_size=40)


@settings(deadline=None, max_examples=examples(60))
@given(STEPS)
def test_nothing_is_said_before_what_was_recorded_before_it(steps: List[str]) -> None:
    with desk_with() as desk:
        for number, step in enumerate(steps):
            if step == "say":
                desk.reporter.log("said", number=number)
            elif step == "metrics":
                desk.reporter.metrics_now()
            elif step == "record":
                desk.writers[0].put(CLOSED._replace(connection_id=number))
            else:
                desk.writers[1].put(Notice(1, 0, "error", str(number)))
        desk.close()
        lines = desk.lines()
    said = [line["number"] for line in lines if line["event"] == "said"]
    recorded = [line["connection_id"] if line["event"] == "connection" else int(line["message"]) for line in recorded_of(lines)]
    assert said == [number for number, step in enumerate(steps) if step == "say"]
    assert recorded == [number for number, step in enumerate(steps) if step in {"record", "notice"}]
    assert min(1, steps.count("metrics")) <= sum(line["event"] == "metrics" for line in lines) <= steps.count("metrics")
    for place, line in enumerate(lines):
        if line["event"] == "said":
            earlier = [number for number in recorded if number < line["number"]]
            assert len(recorded_of(lines[:place])) >= len(earlier)


def recorded_of(lines: List[Line]) -> List[Line]:
    return [line for line in lines if line["event"] in {"connection", "error"}]


def test_what_many_threads_say_is_all_there_in_the_order_of_each(desk: Desk) -> None:
    def speak(who: int) -> None:
        for number in range(200):
            desk.reporter.log("said", who=who, number=number)

    threads = [threading.Thread(target=speak, args=(who,)) for who in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    desk.close()
    for who in range(5):
        assert [line["number"] for line in desk.lines() if line["who"] == who] == list(range(200))


def test_what_was_recorded_just_before_the_end_is_written_though_nothing_is_said(desk: Desk) -> None:
    for _ in range(500):
        desk.writers[0].put(CLOSED)
    desk.close()
    assert desk.events() == ["connection"] * 500


class LateWakeup:
    """The reporter's wake-up, which is rung by close() just when the reporter is about to collect an earlier ring."""

    def __init__(self, reporter: Reporter) -> None:
        self.inner, self.rung = reporter._wakeup, threading.Event()
        self.closing = threading.Thread(target=reporter.close)

    def wake(self) -> None:
        self.inner.wake()
        self.rung.set()

    def collect(self) -> int:
        if not self.rung.is_set():
            self.closing.start()
            assert self.rung.wait(PATIENCE)
        return self.inner.collect()

    def close(self) -> None:
        self.closing.join()
        self.inner.close()


def test_a_ring_of_close_that_is_taken_with_an_earlier_one_is_not_lost() -> None:
    def prepare(desk: Desk) -> None:
        desk.writers[0].put(CLOSED)
        desk.reporter._wakeup = LateWakeup(desk.reporter)

    with desk_with(prepare=prepare) as desk:
        wait_until(lambda: not desk.reporter._thread.is_alive(), "the end of the reporter")
        assert desk.events() == ["connection"]


# Lines


def test_each_line_begins_with_when_how_bad_what_and_who(desk: Desk) -> None:
    before = time.time()
    desk.reporter.log("drain", "warning", active_connections=3)
    desk.close()
    (line,) = desk.lines()
    assert list(line) == [*HEAD, "active_connections"]
    assert (line["level"], line["event"], line["pid"]) == ("warning", "drain", os.getpid())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", line["timestamp"])
    assert line["timestamp"] >= time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(before))


def test_a_connection_line_has_its_fields_and_no_other(desk: Desk) -> None:
    desk.writers[1].put(CLOSED._replace(worker=1))
    desk.close()
    (line,) = desk.lines()
    assert sorted(line) == sorted([*HEAD, *CONNECTION_FIELDS])
    assert list(line)[:4] == HEAD
    assert line["timestamp"] == "2023-11-14T22:13:20.123456Z"  # when it closed, not when it was written
    assert (line["client_address"], line["client_port"]) == ("192.0.2.1", 50000)
    assert (line["upstream_address"], line["upstream_port"]) == ("2001:db8::1", 443)
    assert (line["witness"], line["worker"], line["reason"], line["termination_state"]) == ("sysctl", 1, "closed", "--")


def test_lines_name_their_route_by_the_number_in_the_record() -> None:
    with desk_with(names=("oe-primary", "oe-backup")) as desk:
        for route in (1, 0):
            desk.writers[0].put(CLOSED._replace(route=route))
            desk.writers[0].put(Notice(0, 0, "warning", "of a route", route))
        desk.writers[0].put(Notice(0, 0, "warning", "of none"))
        desk.close()
        told = [line.get("route") for line in desk.lines()]
    assert told == ["oe-backup", "oe-backup", "oe-primary", "oe-primary", None]


@pytest.mark.parametrize("ending", list(Ending))
def test_how_bad_an_ending_is_shows_as_the_level_of_its_line(desk: Desk, ending: Ending) -> None:
    desk.writers[0].put(CLOSED._replace(ending=ending, upstream=None, witness=0))
    desk.close()
    (line,) = desk.lines()
    assert (line["reason"], line["termination_state"], line["level"]) == ENDING_FIELDS[ending]
    assert (line["upstream_address"], line["upstream_port"], line["witness"]) == (None, None, "none")


@pytest.mark.parametrize("level", ["warning", "error"])
def test_a_workers_notice_is_a_line_of_its_level(desk: Desk, level: str) -> None:
    desk.writers[1].put(Notice(1, 0, level, "Traceback\n  \udcff" + "x" * 9000))
    desk.close()
    (line,) = desk.lines()
    assert list(line) == [*HEAD, "worker", "message"]
    assert (line["level"], line["event"], line["worker"]) == (level, level, 1)
    assert line["message"].startswith("Traceback\n  \\udcffxxx")


@pytest.mark.parametrize("threshold", NOTICE_LEVELS)
def test_lines_below_the_level_are_left_out_and_not_counted_as_dropped(threshold: str) -> None:
    allowed = NOTICE_LEVELS[NOTICE_LEVELS.index(threshold) :]
    with desk_with(level=threshold) as desk:
        desk.writers[0].put(CLOSED)
        for level in NOTICE_LEVELS:
            desk.writers[0].put(Notice(0, 0, level, level))
            desk.reporter.log("said", level)
        desk.reporter.metrics_now()
        desk.close()
        seen = [(line["event"], line["level"]) for line in desk.lines()]
        assert [level for event, level in seen if event == "said"] == list(allowed)
        assert len([event for event, _ in seen if event in NOTICE_LEVELS]) == len(allowed)
        assert (("metrics", "info") in seen) is (("connection", "info") in seen) is ("info" in allowed)
        assert desk.dropped() == 0


# Metrics


def test_a_metrics_line_has_every_field_of_the_design(desk: Desk) -> None:
    line = desk.metrics()
    assert list(line)[:8] == [*HEAD, "route", "start_time", "uptime_s", "interval_s"]
    assert set(METRICS_FIELDS) <= set(line)
    buckets = {f"{name}_us_le_{2**power}" for name in ("connect", "relay") for power in range(21)}
    lag = {
        f"loop_lag_us_{of}" for of in ("p50", "p99", "p999", "max", "count", *(f"le_{4**power}" for power in range(0, 12, 2)))
    }
    ends = {"internal_errors_total", "upstream_cx_policy_ended_total", "downstream_cx_lost_with_worker_total"}
    more = {*buckets, *lag, *ends, "connect_us_count", "relay_us_count", "downstream_client_cx_overflow"}
    assert set(line) == {*HEAD, *METRICS_FIELDS, *more}


def test_the_figures_are_those_of_the_moment_the_line_is_asked_for(desk: Desk) -> None:
    assert desk.metrics()["downstream_cx_total"] == 0
    desk.shared_counters.rows[ACCEPTOR_ROW][Counter.ACCEPTED] = 5
    desk.shared_counters.worker(1)[Counter.ENDED] = 2
    desk.shared_counters.worker(0)[counters.RELAY], desk.shared_counters.worker(0)[counters.LONGEST_RELAY] = 9, 201
    line = desk.metrics()
    assert (line["downstream_cx_total"], line["downstream_cx_active"]) == (5, 3)
    assert (line["relay_us_p50"], line["relay_us_max"], line["relay_us_le_1"], line["relay_us_count"]) == (0.201, 0.201, 9, 9)
    assert (line["connect_us_p50"], line["connect_us_count"]) == (None, 0)


def test_rates_are_what_came_since_the_line_before_over_the_time_between(desk: Desk) -> None:
    now = 100.0
    board, row = Board(desk.process, False, lambda: now), desk.shared_counters.worker(0)
    board.add(0, "default", desk.shared_counters)
    row[Counter.RECEIVED_DOWNSTREAM], row[Counter.ACKNOWLEDGED_DOWNSTREAM], now = 1000, 3001, 102.0
    (first,) = board.lines()
    assert (first["rx_bytes_per_s"], first["tx_bytes_per_s"]) == (500, 1500)
    assert (first["uptime_s"], first["interval_s"]) == (2.0, 2.0)
    now = 102.25
    (second,) = board.lines()
    assert (second["rx_bytes_per_s"], second["tx_bytes_per_s"]) == (0, 0)
    assert (second["uptime_s"], second["interval_s"], second["start_time"]) == (2.25, 0.25, first["start_time"])
    row[Counter.RECEIVED_DOWNSTREAM] += 1  # no time has passed: no division by it
    assert next(board.lines())["rx_bytes_per_s"] == 1_000_000


def test_the_process_has_the_sum_of_its_routes_lines_while_workers_count_on(desk: Desk) -> None:
    board, row = Board(desk.process, True), desk.shared_counters.worker(0)
    board.add(0, "orders", desk.shared_counters)
    lines = []
    for line in board.lines():
        lines.append(line)
        for word in (*Counter, counters.RELAY, counters.CONNECT):
            row[word] += 1
    orders, process = lines
    summed = [name for name in orders if name.endswith(("_total", "_count", "_sent", "_received")) or "_us_le_" in name]
    assert {"relay_us_le_1", "connect_us_count", "upstream_segments_sent"} <= set(summed)
    assert [process[name] for name in summed] == [orders[name] for name in summed]
    assert next(board.lines())["relay_us_count"] == 2


MOST_BYTES = 2**63 - 1  # 100 Gbit/s for 23 years; of segments, too, which are fewer
MOST_EVENTS = 10**17 - 1  # 256 workers for twelve years, if an event (a message, a session, a timer) takes 1 us: it takes more
MOST_NS = 2**63 - 1  # 292 years
OF_BYTES = ("RECEIVED", "ACKNOWLEDGED", "SEGMENTS")


def fill_to_the_most(row: memoryview) -> None:
    """What all workers can have counted together: each counter at its most, each histogram with its most events."""
    for counter in Counter:
        row[counter] = MOST_BYTES if counter.name.startswith(OF_BYTES) else MOST_EVENTS
    row[Counter.ENDED] = row[Counter.CONNECTS_ENDED] = 0  # all are open: the gauges are at their most, too
    for start in (counters.RELAY, counters.CONNECT, counters.LOOP_LAG):
        row[start] = row[start + histogram.BUCKETS - 1] = MOST_EVENTS // 2
        row[start + histogram.BUCKETS] = MOST_NS


def test_a_metrics_line_fits_and_is_whole_with_each_counter_at_its_most() -> None:
    with desk_with(names=("r" * 63,)) as desk:  # the longest name that a route has
        fill_to_the_most(desk.shared_counters.worker(0))
        line = desk.metrics()
    assert set(METRICS_FIELDS) <= set(line)
    assert (line["route"], line["upstream_cx_active"], line["relay_us_max"]) == ("r" * 63, MOST_EVENTS, MOST_NS / 1000)
    assert (line["upstream_segments_per_s_max"], line["relay_us_le_1"]) == (MOST_BYTES, MOST_EVENTS // 2)
    longest = {**line, "pid": 2**22, "uptime_s": 378_432_000.123, "interval_s": 86_400.123}
    assert len(encoder.line(longest)) == len(encoder.with_json(longest)) + 1 <= 4096 - 50  # and some room is left


def test_a_sum_of_counters_is_exact_beyond_64_bits(desk: Desk) -> None:
    for row in desk.shared_counters.rows:
        for counter in Counter:
            row[counter] = 2**64 - 1
    line, writers = desk.metrics(), len(desk.shared_counters.rows)
    assert line["upstream_cx_connect_fail"] == line["upstream_segments_sent"] == writers * (2**64 - 1)


def test_metrics_come_each_interval_without_being_asked_for() -> None:
    with desk_with(interval_s=0.02) as desk:
        wait_until(lambda: desk.events().count("metrics") >= 5, "five intervals")
        lines = desk.lines()
        assert sum(line["interval_s"] for line in lines) == pytest.approx(lines[-1]["uptime_s"], abs=0.001 * len(lines))


def test_an_interval_of_zero_is_no_metrics_but_those_asked_for(desk: Desk) -> None:
    desk.reporter.log("one")
    wait_until(lambda: desk.events() == ["one"], "the line")
    desk.metrics()
    desk.reporter.log("two")
    desk.close()
    assert desk.events() == ["one", "metrics", "two"]


def test_requests_for_metrics_are_one_until_the_lines_are_made() -> None:
    with desk_with(prepare=lambda desk: [desk.reporter.metrics_now() for _ in range(1000)]) as desk:
        desk.close(reason="SIGTERM")
        assert desk.events() == ["metrics", "stop"]


def test_a_request_that_comes_while_metrics_lines_are_made_has_others_made_after_it() -> None:
    def prepare(desk: Desk) -> None:
        lines, wanted = desk.reporter._board.lines, iter([1])

        def asking() -> Iterator[encoder.Fields]:
            made = list(lines())  # with the counters of now
            for count in wanted:
                desk.shared_counters.rows[ACCEPTOR_ROW][Counter.ACCEPTED] = count
                desk.reporter.metrics_now()
            yield from made

        desk.reporter._board.lines = asking  # type: ignore[method-assign]

    with desk_with(prepare=prepare) as desk:
        desk.metrics()
        wait_until(lambda: desk.events() == ["metrics"] * 2, "those asked for meanwhile")
        assert [line["downstream_cx_total"] for line in desk.lines()] == [0, 1]


@contextlib.contextmanager
def closing(desk: Desk) -> Iterator[threading.Thread]:
    thread = threading.Thread(target=desk.close, kwargs={"reason": "SIGTERM"})
    thread.start()
    yield thread
    thread.join()


def closed_while_read(desk: Desk, reader: int) -> List[str]:
    """The events of the lines up to `stop`."""
    fcntl.fcntl(reader, uapi.F_SETPIPE_SZ, 1 << 20)  # else each line is a switch to the other thread, and back
    events = [""]
    with closing(desk), open(reader, "rb", closefd=False) as stream:
        while events[-1] != "stop":
            events.append(json.loads(stream.readline())["event"])
    return events


def test_no_metrics_lines_are_made_while_those_before_wait_for_the_reader() -> None:
    """Else they would displace `connection` lines."""
    with pipe(4096) as (reader, writer), desk_with(writer) as desk:
        for number in range(100):
            desk.reporter.log("said")
            desk.reporter.metrics_now()
            wait_until(lambda said=number: said < desk.reporter._line_writer.lines_put, "the line is put")
        events = closed_while_read(desk, reader)
        assert events.count("said") == 100
        assert events.count("metrics") <= 4
        assert events[-2] == "metrics"


def test_metrics_lines_of_many_routes_leave_room_for_the_last_lines() -> None:
    names = [f"route-{number}" for number in range(100)]
    with pipe(4096) as (reader, writer), desk_with(writer, names=names, many=True, interval_s=0.001) as desk:
        wait_until(desk.dropped, "a line without room")
        desk.reporter.log("drain")
        events = closed_while_read(desk, reader)
        assert "drain" in events


def test_metrics_lines_of_all_routes_are_of_one_moment(desk: Desk) -> None:
    board = Board(desk.process, True, itertools.count().__next__)
    for number, name in enumerate(["one", "two"]):
        board.add(number, name, desk.shared_counters)
    started = [rates.started for rates in (*board._rates_of.values(), board._rates)]
    assert len({line["uptime_s"] + since for line, since in zip(board.lines(), started)}) == 1


def test_a_metrics_line_has_the_time_at_which_it_was_made() -> None:
    """Of two clocks: `timestamp` is the host's, `uptime_s` goes on evenly."""
    made_after: List[int] = []

    def prepare(desk: Desk) -> None:
        desk.reporter.metrics_now()
        made_after.append(time.time_ns() + 5_000_000)
        wait_until(lambda: time.time_ns() > made_after[0])

    with desk_with(prepare=prepare) as desk:
        desk.close(reason="SIGTERM")
        metrics, stop = desk.lines()
    assert encoder.Stamps().rfc3339(made_after[0]) <= metrics["timestamp"] <= stop["timestamp"]
    assert 0.005 <= metrics["uptime_s"] <= stop["uptime_s"]


def test_what_was_dropped_shows_in_the_metrics(desk: Desk) -> None:
    desk.process.worker(0)[Counter.LINES_DROPPED] = 3
    desk.process.rows[REPORTER_ROW][Counter.LINES_DROPPED] = 4
    assert desk.metrics()["log_lines_dropped_total"] == 7


# Readers that keep up, stall, or die


def test_a_burst_is_written_and_not_dropped_where_there_is_always_room() -> None:
    with desk_with(workers=4) as desk:

        def work(worker: int) -> None:
            for number in range(5000):
                desk.writers[worker].put(CLOSED._replace(worker=worker, connection_id=number))

        threads = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        desk.reporter.log("stop")
        desk.close()
        assert desk.process.rows[REPORTER_ROW][Counter.LINES_DROPPED] == 0
        assert len(desk.lines()) + desk.dropped() == 4 * 5000 + 1
        assert desk.events()[-1] == "stop"


def test_a_stalled_reader_holds_nobody_up_and_each_line_is_counted() -> None:
    with pipe(4096) as (reader, writer):
        with desk_with(writer) as desk:
            for number in range(6000):
                desk.reporter.log("said", number=number)
            wait_until(desk.dropped, "the first dropped line")
            desk.close()  # it gives up by itself: nobody reads
            dropped = desk.dropped()
        os.close(writer)
        with open(reader, "rb", closefd=False) as rest:
            lines = [json.loads(line) for line in rest]
    assert [line["number"] for line in lines] == list(range(len(lines)))
    assert len(lines) + dropped == 6000


def test_a_reader_that_comes_back_gets_the_backlog_and_the_end() -> None:
    with pipe(4096) as (reader, writer):
        with desk_with(writer) as desk:
            for number in range(300):
                desk.writers[0].put(CLOSED._replace(connection_id=number))
            with open(reader, "rb", closefd=False) as stream:
                first = json.loads(stream.readline())
                desk.reporter.log("stop")
                closing = threading.Thread(target=desk.close)
                closing.start()
                lines = [first]
                while lines[-1]["event"] != "stop":
                    lines.append(json.loads(stream.readline()))
                closing.join()
            assert desk.dropped() == 0
    assert [line["connection_id"] for line in lines[:-1]] == list(range(300))


def test_a_dead_reader_costs_the_lines_and_the_reporter_goes_on() -> None:
    with pipe(4096) as (reader, writer):
        with desk_with(writer) as desk:
            os.close(reader)
            for _ in range(50):
                desk.reporter.log("said")
            wait_until(lambda: desk.dropped() == 50, "all counted")
            desk.writers[0].put(CLOSED)
            wait_until(lambda: desk.dropped() == 51, "the record, too")
            desk.close()
            assert desk.dropped() == 51


def test_a_full_disk_is_no_end_and_closing_does_not_wait_for_it() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        with desk_with(full) as desk:
            for _ in range(50):
                desk.reporter.log("said")
            desk.close()
            assert desk.dropped() == 50
    finally:
        os.close(full)


def test_a_full_disk_is_said_on_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    with open("/dev/full", "wb") as full, desk_with(full.fileno()) as desk:
        for _ in range(50):
            desk.reporter.log("said")
        desk.close()
    said = ["No space left on device; trying again every 1 s; 4,096 lines are kept"]
    said.append("lines that it did not take within 1 s, and that are lost: 50")
    assert capfd.readouterr() == ("", "".join(f"tsproxy.py: standard output: {line}\n" for line in said))


def test_a_slow_reader_gets_the_last_lines_while_it_takes_some(capfd: pytest.CaptureFixture[str]) -> None:
    with pipe(4096) as (reader, writer), desk_with(writer) as desk:
        for _ in range(15):
            desk.reporter.log("said", text="x" * 3900)  # a pipe full each
        with closing(desk) as thread:
            events = [""]
            while events[-1] != "stop":
                events.append(json.loads(os.read(reader, 4096))["event"])
                thread.join(0.1)  # 1.6 s in all
    assert events == ["", *["said"] * 15, "stop"]
    assert capfd.readouterr() == ("", "")


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.integers(0, 1)), min_size=20))
def test_the_last_lines_wait_while_one_a_second_is_taken_and_not_for_ever(steps: List[Tuple[float, int]]) -> None:
    now = taken = last = 0.0
    patience = _Patience(lambda: now, 0)
    for passed, lines in steps:
        now, taken = now + passed, taken + lines
        last = now if lines else last
        if patience.is_over(int(taken)):
            assert (now >= 3.0, now - last >= 1.0)[patience.limit_s == 1.0]
            break
        assert now < 3.0
        assert now - last < 1.0
    else:
        assert now < 3.0


def test_last_lines_that_nobody_reads_are_said_on_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pipe(4096) as (_, writer), desk_with(writer) as desk:
        for _ in range(50):
            desk.reporter.log("said", text="x" * 1000)
        desk.close(reason="SIGTERM")
        lost = desk.dropped()
    assert 40 < lost < 51
    line = f"tsproxy.py: standard output: lines that it did not take within 1 s, and that are lost: {lost}\n"
    assert capfd.readouterr() == ("", line)


@pytest.mark.parametrize("broken", ["full", "gone", "none"])
def test_nobody_waits_for_standard_error(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pipe(4096) as (reader, writer), open("/dev/full", "wb") as full, desk_with(full.fileno()) as desk:
        with os.fdopen(os.dup(writer), "w") as error:
            os.write(writer, b"x" * 4096)
            if broken == "gone":
                os.close(reader)
            monkeypatch.setattr(sys, "stderr", None if broken == "none" else error)
            desk.reporter.log("said")
            desk.close()
            assert desk.dropped() == 1
            monkeypatch.undo()
