"""Records: what a worker says arrives whole or is counted, in the order it was said, and nobody ever waits."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
from typing import Any, Dict, Iterator, List, Optional, Tuple

import pytest
from _tsproxy.linux.addresses import PACKED_SIZE, pack
from _tsproxy.stats import connection_line, encoder, records
from _tsproxy.stats.counters import Counter, SharedCounters
from _tsproxy.stats.endings import ENDING_FIELDS, Ending
from _tsproxy.stats.records import NOTICE_LEVELS, ConnectionRecord, Notice, Record, RecordPipe, RecordWriter, decode, encode
from harness import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st
from samples import CONNECTIONS, FULL, HERE, NOTICES, RECORDS, THERE

unhurried = settings(deadline=None)
EMPTY = FULL._replace(
    upstream=None,
    upstream_local=None,
    connect_us=None,
    client_timestamps=None,
    upstream_timestamps=None,
    client_syn_tsval=None,
    upstream_rtt_us=None,
    upstream_retransmits=None,
    upstream_segments_sent=None,
    upstream_segments_received=None,
)


# Frames


@given(CONNECTIONS | NOTICES)
@example(FULL)
@example(EMPTY)
def test_a_record_comes_back_as_it_was_with_the_types_it_had(record: Record) -> None:
    frame = encode(record)
    assert len(frame) <= 4096
    (back,), rest = decode(frame)
    assert (back, rest) == (record, b"")
    assert list(map(type, back)) == list(map(type, record))


@unhurried
@given(RECORDS, st.data())
def test_frames_may_be_cut_at_any_byte(sent: List[Record], data: st.DataObject) -> None:
    stream = b"".join(map(encode, sent))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=5)))
    got: List[Record] = []
    rest = b""
    for start, end in zip([0, *cuts], [*cuts, len(stream)]):
        found, rest = decode(rest + stream[start:end])
        got += found
    assert (got, rest) == (sent, b"")


def test_a_frame_that_comes_byte_by_byte_is_one_record_at_its_last_byte() -> None:
    frame = encode(FULL)
    for length in range(len(frame)):
        assert decode(frame[:length]) == ([], frame[:length])
    assert decode(frame + frame[:1]) == ([FULL], frame[:1])


@unhurried
@given(st.text(max_size=30), st.integers(0, 6000))
@example("\U0001f600", 4100)
@example("a\U0001f600", 4100)
@example("\udcff", 4100)
@example("x", 4082)
@example("x", 4083)
def test_a_long_notice_is_cut_and_not_lost(text: str, times: int) -> None:
    message = (text * times)[:6000]
    frame = encode(Notice(1, 2, "error", message))
    assert len(frame) <= 4096
    (back,), rest = decode(frame)
    assert isinstance(back, Notice)
    whole = message.encode("utf-8", "backslashreplace").decode()
    cut = back.message.rstrip("\ufffd") if len(frame) == 4096 else back.message  # the last character may be cut in two
    assert whole.startswith(cut)
    assert rest == b""
    assert len(frame) == 4096 or cut == whole


def test_a_frame_is_never_longer_than_what_a_pipe_takes_at_once() -> None:
    assert len(encode(Notice(65535, 2**63 - 1, "error", "\U0001f600" * 100_000))) <= pipe_buf()
    assert len(encode(FULL)) <= pipe_buf()


def pipe_buf() -> int:
    """PIPE_BUF as the kernel states it for a pipe."""
    reader, writer = os.pipe()
    try:
        return os.fpathconf(writer, "PC_PIPE_BUF")
    finally:
        os.close(reader)
        os.close(writer)


IMPOSSIBLE = [
    {"closed_at_ns": -1},
    {"duration_us": -1},
    {"connect_us": -2},
    {"client_timestamps": 2},
    {"upstream_timestamps": -2},
    {"client_syn_tsval": 2**32},
    {"upstream_rtt_us": -5},
    {"upstream_retransmits": 2**40},
    {"upstream_segments_sent": -2},
    {"upstream_segments_received": -2},
    {"ending": len(Ending)},
]


@pytest.mark.parametrize("wrong", IMPOSSIBLE, ids=str)
def test_a_number_that_no_worker_can_have_meant_is_said_and_not_shown_as_a_connection(wrong: Dict[str, Any]) -> None:
    (notice,), rest = decode(encode(FULL._replace(**wrong)))
    assert isinstance(notice, Notice)
    assert (notice.level, notice.worker, rest) == ("error", FULL.worker, b"")
    assert notice.message.startswith("a record can't be read: kind 1")


def test_a_notice_of_a_route_that_can_be_none_is_said_to_be_unreadable() -> None:
    (notice,), _ = decode(encode(Notice(3, 0, "error", "so", -2)))
    assert isinstance(notice, Notice) and notice.message.startswith("a record can't be read: kind 2")


# The line


def line_of(record: ConnectionRecord) -> Dict[str, Any]:
    """Its `connection` line without what each line has."""
    fields = json.loads(connection_line.encode(record, "2026-01-01T00:00:00.000000Z", 4711, "sysctl", "default"))
    assert [fields.pop(name) for name in ("timestamp", "event", "pid")] == ["2026-01-01T00:00:00.000000Z", "connection", 4711]
    assert fields.pop("level") == ENDING_FIELDS[record.ending].level
    return dict(fields)


@given(CONNECTIONS)
@example(FULL)
@example(EMPTY)
def test_a_connections_line_is_what_an_encoder_makes_of_its_fields(record: ConnectionRecord) -> None:
    line = connection_line.encode(record, "2026-01-01T00:00:00.000000Z", 4711, "sysctl", "default")
    assert line == encoder.with_json(json.loads(line)) + b"\n"
    assert len(line) < 1500


def test_the_fields_of_a_connection_are_those_of_its_line_in_their_order() -> None:
    assert line_of(FULL) == {
        "connection_id": 77,
        "worker": 3,
        "client_address": "2001:db8::1",
        "client_port": 50000,
        "upstream_address": "192.0.2.1",
        "upstream_port": 443,
        "upstream_local_address": "192.0.2.9",
        "upstream_local_port": 40000,
        "duration_us": 1500,
        "connect_us": 120,
        "rx_bytes": 10,
        "tx_bytes": 20,
        "upstream_tx_bytes": 7,
        "discarded_bytes": 5,
        "unacknowledged_bytes": 1,
        "client_timestamps": True,
        "client_syn_tsval": 2**32 - 1,
        "upstream_timestamps": False,
        "upstream_rtt_us": 40,
        "upstream_retransmits": 1,
        "upstream_segments_sent": 9,
        "upstream_segments_received": 8,
        "reason": "server_reset",
        "termination_state": "SD",
        "witness": "sysctl",
        "route": "default",
    }
    assert list(line_of(EMPTY)) == list(line_of(FULL)) == list(connection_line.NAMES)


def test_what_was_not_there_to_see_is_null_and_not_zero() -> None:
    nothing = {name for name, value in line_of(EMPTY).items() if value is None}
    assert nothing == {
        *(
            "upstream_address",
            "upstream_port",
            "upstream_local_address",
            "upstream_local_port",
            "connect_us",
            "client_timestamps",
            "client_syn_tsval",
        ),
        *("upstream_timestamps", "upstream_rtt_us", "upstream_retransmits"),
        *("upstream_segments_sent", "upstream_segments_received"),
    }
    zeros = FULL._replace(connect_us=0, client_syn_tsval=0, upstream_rtt_us=0, upstream_retransmits=0, client_timestamps=False)
    assert decode(encode(zeros))[0] == [zeros]


def test_every_ending_has_its_fields() -> None:
    assert list(ENDING_FIELDS) == list(Ending)
    for ending, fields in ENDING_FIELDS.items():
        assert fields.reason.isidentifier(), ending
        assert fields.level in NOTICE_LEVELS, ending
    states = {fields.termination_state for fields in ENDING_FIELDS.values()}
    assert states == set("-- CD SD cD sD SC sC RC KC KD PR PD IC ID".split())


# The pipe


@contextlib.contextmanager
def pipe_and_row(size: Optional[int] = None) -> Iterator[Tuple[RecordPipe, memoryview]]:
    """A record pipe, of that size if one is given, and a row to count drops in."""
    pipe, row = RecordPipe.create(), memoryview(bytearray(8 * len(Counter))).cast("Q")
    if size:
        fcntl.fcntl(pipe.writer, records.uapi.F_SETPIPE_SZ, size)
    try:
        yield pipe, row
    finally:
        for fd in set(pipe):
            with contextlib.suppress(OSError):
                os.close(fd)


def all_in(pipe: RecordPipe) -> List[Record]:
    found, rest = decode(b"".join(pipe.read()))
    assert rest == b""
    return found


@unhurried
@given(RECORDS)
def test_what_is_put_in_comes_out_in_order(sent: List[Record]) -> None:
    with pipe_and_row() as (pipe, row):
        writer = RecordWriter(pipe.writer, row)
        for record in sent:
            writer.put(record)
        assert all_in(pipe) == sent
        assert row[Counter.LINES_DROPPED] == 0


def test_an_empty_pipe_is_no_reason_to_wait() -> None:
    with pipe_and_row() as (pipe, _):
        assert list(pipe.read()) == []


def test_a_pipe_without_writers_ends_when_it_is_empty() -> None:
    with pipe_and_row() as (pipe, row):
        RecordWriter(pipe.writer, row).put(FULL)
        os.close(pipe.writer)
        assert all_in(pipe) == [FULL]
        assert list(pipe.read()) == []


def test_a_pipe_is_larger_than_usual_and_blocks_and_leaks_nowhere() -> None:
    with pipe_and_row() as (pipe, _):
        assert fcntl.fcntl(pipe.writer, 1032) >= 65536  # F_GETPIPE_SZ
        for fd in pipe:
            assert not os.get_blocking(fd)
            assert not os.get_inheritable(fd)


def test_a_full_pipe_costs_exactly_the_records_that_did_not_fit() -> None:
    with pipe_and_row(size=4096) as (pipe, row):
        writer = RecordWriter(pipe.writer, row)
        sent = [FULL._replace(connection_id=number) for number in range(1000)]
        for record in sent:
            writer.put(record)
        got = all_in(pipe)
        assert 0 < len(got) < 1000
        assert got == sent[: len(got)]
        assert row[Counter.LINES_DROPPED] == 1000 - len(got)
        writer.put(FULL)
        assert all_in(pipe) == [FULL]


def test_a_notice_that_does_not_fit_leaves_no_half_of_it_behind() -> None:
    with pipe_and_row(size=4096) as (pipe, row):
        writer = RecordWriter(pipe.writer, row)
        long = Notice(1, 2, "error", "x" * 5000)
        writer.put(FULL)
        writer.put(long)
        assert all_in(pipe) == [FULL]
        assert row[Counter.LINES_DROPPED] == 1
        writer.put(long)
        assert len(all_in(pipe)) == 1


def test_a_wake_up_is_bytes_to_read_and_no_record_once_a_second_at_most() -> None:
    with pipe_and_row(size=4096) as (pipe, row):
        writer = RecordWriter(pipe.writer, row)
        second = 1_000_000_000
        for now_ns, wakes in ((0, 1), (second - 1, 0), (second, 1), (3 * second, 1)):
            writer.wake(now_ns)
            found = b"".join(pipe.read())
            assert (len(found) // 3, decode(found)) == (wakes, ([], b""))
        writer.wake(5 * second)
        writer.put(FULL)
        assert all_in(pipe) == [FULL]
        while not row[Counter.LINES_DROPPED]:
            writer.put(FULL)
        writer.wake(7 * second)
        os.close(pipe.reader)
        writer.wake(9 * second)
        assert row[Counter.LINES_DROPPED] == 1, "a wake-up is no line"


def test_a_pipe_that_nobody_reads_any_more_costs_a_line_and_nothing_else() -> None:
    with pipe_and_row() as (pipe, row):
        os.close(pipe.reader)
        RecordWriter(pipe.writer, row).put(FULL)
        assert row[Counter.LINES_DROPPED] == 1


def test_a_reader_gets_what_was_there_and_is_not_kept_by_busy_writers() -> None:
    with pipe_and_row() as (pipe, row):
        writer = RecordWriter(pipe.writer, row)
        for number in range(2000):
            writer.put(FULL._replace(connection_id=number))
        got = b""
        for data in pipe.read():
            got += data
            writer.put(FULL._replace(connection_id=9999))  # one for each piece: without a bound it would never end
            writer.put(FULL._replace(connection_id=9999))
        found, rest = decode(got)
        assert [record.connection_id for record in found if isinstance(record, ConnectionRecord)] == list(range(2000))
        assert rest == b""


@pytest.mark.parametrize("size", [4096, 1 << 20])
def test_several_writers_never_mix_their_frames(size: int) -> None:
    with pipe_and_row(size) as (pipe, _):
        rows = [memoryview(bytearray(8 * len(Counter))).cast("Q") for _ in range(6)]

        def write(worker: int) -> None:
            writer = RecordWriter(pipe.writer, rows[worker])
            for number in range(400):
                text = f"{number}:" + chr(97 + worker) * (number * 37 % 4000)
                writer.put(
                    Notice(worker, number, "error", text) if number % 2 else FULL._replace(worker=worker, connection_id=number)
                )

        threads = [threading.Thread(target=write, args=(worker,)) for worker in range(6)]
        got = read_while(threads, pipe)
        assert_whole_and_in_order(got)
        assert len(got) + sum(row[Counter.LINES_DROPPED] for row in rows) == 6 * 400


def read_while(threads: List[threading.Thread], pipe: RecordPipe) -> List[Record]:
    """All records that come while the threads run."""
    got: List[Record] = []
    rest = b""
    for thread in threads:
        thread.start()
    running = True
    while running:
        running = any(thread.is_alive() for thread in threads)
        for data in pipe.read():
            found, rest = decode(rest + data)
            got += found
    for thread in threads:
        thread.join()
    assert rest == b""
    return got


def assert_whole_and_in_order(got: List[Record]) -> None:
    last: Dict[int, int] = {}
    for record in got:
        number = record.connection_id if isinstance(record, ConnectionRecord) else record.at_ns
        assert number > last.get(record.worker, -1)
        last[record.worker] = number
        if isinstance(record, Notice):
            assert record.message == f"{number}:" + chr(97 + record.worker) * (number * 37 % 4000)
        else:
            assert record == FULL._replace(worker=record.worker, connection_id=number)


PROCESS = """
import sys
from _tsproxy.stats.counters import SharedCounters
from _tsproxy.stats.records import Notice, RecordWriter
fd, ledger, worker = map(int, sys.argv[1:])
writer = RecordWriter(fd, SharedCounters(ledger).worker(worker))
for number in range(2000):
    writer.put(Notice(worker, number, "error", f"{number}:" + chr(97 + worker) * (number * 37 % 4000)))
"""


def test_writers_in_other_processes_are_told_apart_and_counted() -> None:
    shared_counters = SharedCounters.create(3)
    with pipe_and_row() as (pipe, _):
        environment: Dict[str, Any] = {**os.environ, "PYTHONPATH": str(ROOT / "lib")}

        def work(worker: int) -> None:
            words = [sys.executable, "-c", PROCESS, str(pipe.writer), str(shared_counters.fd), str(worker)]
            subprocess.run(words, check=True, pass_fds=(pipe.writer, shared_counters.fd), env=environment)

        got = read_while([threading.Thread(target=work, args=(worker,)) for worker in range(3)], pipe)
        assert_whole_and_in_order(got)
        for worker in range(3):
            dropped = shared_counters.worker(worker)[Counter.LINES_DROPPED]
            assert len([record for record in got if record.worker == worker]) + dropped == 2000
        assert {record.worker for record in got} <= {0, 1, 2}
    os.close(shared_counters.fd)


def test_an_address_of_nowhere_is_no_address_of_anywhere() -> None:
    assert PACKED_SIZE == len(HERE) == len(THERE)
    assert bytes(PACKED_SIZE) != pack(socket.AF_INET, ("0.0.0.0", 0))
