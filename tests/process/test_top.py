"""`top`: any lines in, an honest picture of exactly the terminal's size out, and the terminal given back however it ends."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import pytest
from _tsproxy.stats import encoder, histogram
from _tsproxy.tools.terminal import Style
from _tsproxy.tools.top import picture, plain, verdict, words
from _tsproxy.tools.top.lines import Closed, Metrics, RouteStart, Said, Start, Unread, clean, read
from _tsproxy.tools.top.model import Model
from _tsproxy.tools.top.picture import View
from _tsproxy.tools.top.rows import shorten
from _tsproxy.tools.top.source import Cutter, Follower
from _tsproxy.tools.top.verdict import Grade
from harness import CHECKOUT, Exchange, Proxy, children, examples, receive_exactly, wait_until
from hypothesis import example, given, settings
from hypothesis import strategies as st
from namespaces import Namespace
from pty_session import PtySession
from samples import row_of
from wcwidth import wcwidth

Line = Dict[str, Any]
unhurried = settings(deadline=None)
SECOND = 1_000_000_000
BEGAN = 1_790_000_000  # 2026-09-21T14:13:20Z


def at(second: float) -> str:
    return encoder.Stamps().rfc3339(int((BEGAN + second) * SECOND))


def head(event: str, second: float, level: str = "info", pid: int = 100) -> Line:
    return {"timestamp": at(second), "level": level, "event": event, "pid": pid}


def start(mode: str = "strip", witness: str = "sysctl", pid: int = 100, **fields: Any) -> Line:
    return {
        **head("start", 0, pid=pid),
        "version": "0.1.0",
        "listen_address": "127.0.0.1",
        "listen_port": 8080,
        "targets": ["exchange.example:443"],
        "timestamps": mode,
        "static_timestamp": 0,
        "witness": witness,
        "limits": ["max_connections=1000", "on_full=reject"],
        **fields,
    }


def connection(second: float = 1, pid: int = 100, **fields: Any) -> Line:
    return {
        **head("connection", second, pid=pid),
        "connection_id": 1,
        "worker": 0,
        "client_address": "10.0.0.1",
        "client_port": 50001,
        "upstream_address": "192.0.2.1",
        "upstream_port": 443,
        "duration_us": 5321,
        "connect_us": 284,
        "rx_bytes": 78,
        "tx_bytes": 190,
        "upstream_tx_bytes": 78,
        "discarded_bytes": 0,
        "unacknowledged_bytes": 0,
        "client_timestamps": True,
        "client_syn_tsval": 4294967295,
        "upstream_timestamps": False,
        "upstream_rtt_us": 14,
        "upstream_retransmits": 0,
        "upstream_segments_sent": 6,
        "upstream_segments_received": 5,
        "reason": "closed",
        "termination_state": "--",
        "witness": "sysctl",
        **fields,
    }


def metrics(second: float, pid: int = 100, relays: Tuple[int, ...] = (), began: float = 0, **fields: Any) -> Line:
    """As of `second`; the interval reaches back to the last whole ten. `relays`: all times so far, in nanoseconds."""
    interval = second % 10 or min(10, second)
    return {
        **head("metrics", second, pid=pid),
        "start_time": at(began),
        "uptime_s": second,
        "interval_s": interval,
        "downstream_cx_total": 0,
        "upstream_cx_total": 0,
        "downstream_cx_rx_bytes_total": 0,
        "downstream_cx_tx_bytes_total": 0,
        "downstream_cx_active": 0,
        "upstream_cx_timestamps_total": 0,
        "downstream_cx_timestamps_total": 0,
        "upstream_cx_policy_refused_total": 0,
        "rx_bytes_per_s": 0,
        "tx_bytes_per_s": 0,
        **histogram.summary("relay_us", histogram.add([row_of(relays)]), max(relays, default=0)),
        **histogram.summary("connect_us", [], 0),
        **fields,
    }


def said(event: str, message: str, second: float = 2, level: str = "error", pid: int = 100) -> Line:
    return {**head(event, second, level, pid), "message": message}


def start_of_routes(count: int, pid: int = 100) -> Line:
    """The `start` line of a process whose routes are in a file."""
    own = {name: value for name, value in start(pid=pid).items() if name not in ("targets", "timestamps", "witness")}
    return {**own, "routes": count, "listen_address": None, "listen_port": None, "limits": ["nofile=1024"]}


def route(name: str, mode: str = "strip", witness: str = "sysctl", second: float = 0, pid: int = 100, **fields: Any) -> Line:
    served = {name: start(mode, witness)[name] for name in ("listen_address", "targets", "timestamps", "static_timestamp")}
    limits = ["max_connections=4", "on_full=reject"]
    return {
        **head("route", second, pid=pid),
        "route": name,
        **served,
        "listen_port": 9001,
        "witness": witness,
        "limits": limits,
        **fields,
    }


def model_of(*lines: Line | bytes) -> Model:
    model = Model()
    for line in lines:
        model.feed(line if isinstance(line, bytes) else encoder.line(line))
    return model


def drawn(model: Model, columns: int = 80, rows: int = 24, **view: Any) -> List[str]:
    seen = View(**{"source": "lines.json", "now": BEGAN + 12.0, **view})
    return ["".join(text for text, _ in row) for row in picture.draw(model, seen, columns, rows)]


def row(rows: List[str], name: str) -> str:
    (found,) = [text for text in rows if text.startswith(f" {name}")]
    return found


# Any lines

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from([2**64, -1, 10**30, "", []]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
SOUND = st.sampled_from(
    [
        start(),
        start("rewrite", "nftables", static_timestamp=7, pid=101),
        start("preserve", "none", pid=102),
        connection(),
        connection(upstream_timestamps=True),
        connection(
            reason="policy", termination_state="PR", upstream_timestamps=None, upstream_address=None, upstream_port=None
        ),
        metrics(10, relays=(8000, 9000)),
        metrics(20, relays=(8000, 9000, 70_000_000), downstream_cx_total=5, upstream_cx_timestamps_total=1),
        metrics(10, began=50, pid=101),
        said("error", "worker 1 died\n\x1b[2J"),
        said("timestamps_drift", "it does not hold"),
        said("timestamps_drift", "it holds again", level="info"),
        said("resolve", "upstream addresses are now 192.0.2.1:443", level="info"),
        start_of_routes(3),
        route("oe"),
        route("md", "preserve", "none"),
        metrics(10, route=None, downstream_cx_active=3),
        metrics(10, route="oe", downstream_cx_overflow=7, upstream_segments_per_s=12.5),
        connection(route="oe", reason="policy", upstream_timestamps=False),
        {**said("timestamps_drift", "it does not hold"), "route": "md"},
        {**head("reload", 12), "added": 1, "removed": 0, "changed": 2, "unchanged": 3, "message": "read again"},
        said("reload", "routes.ini:7: no", level="error"),
        {**head("drain", 30), "active_connections": 3, "drain_timeout_s": 30.0},
        {**head("stop", 31), "reason": "SIGTERM", "drained": True, "killed_connections": 0, "uptime_s": 31.0},
    ]
)


def spoilt(line: Line, changes: List[Tuple[int, Any]]) -> Line:
    """The line with some of its values replaced."""
    names = list(line)
    return {**line, **{names[number % len(names)]: value for number, value in changes}}


def dumped(line: Any) -> bytes:
    return json.dumps(line).encode()


OBJECTS = st.builds(spoilt, SOUND, st.lists(st.tuples(st.integers(0, 99), JSON), max_size=2)).map(dumped)
CUT = st.builds(lambda line, length: line[: length % len(line)], SOUND.map(dumped), st.integers(0))
ANY = st.one_of(OBJECTS, SOUND.map(dumped), CUT, JSON.map(dumped), st.binary(max_size=40))
STREAMS = st.lists(ANY, max_size=12)


@settings(unhurried, max_examples=examples(600))
@given(STREAMS)
@example([b"[" * 100_000, b'{"event":"metrics","pid":' + b"9" * 5000 + b"}"])
@example([b'{"event":"\\ud800"}', b"\xff\xfe", b"", b"null", b"NaN"])
def test_any_bytes_as_lines_are_read_or_counted_and_never_raise(lines: List[bytes]) -> None:
    model = Model()
    unread = 0
    for line in lines:
        record = model.feed(line)
        unread += isinstance(record, Unread)
        sentence = plain.sentence(record, model)
        assert sentence.isprintable() and "\x1b" not in sentence
    assert sum(model.unread.values()) == unread
    assert len(model.processes) <= 16


@settings(unhurried, max_examples=examples(600))
@given(
    *(STREAMS, st.integers(0, 210), st.integers(0, 70), st.text(max_size=30), st.booleans()),
    *(st.none() | st.integers(99, 103), st.integers(0, 3)),
)
@example([], 80, 24, "", False, None, 0)
@example([dumped(route(f"r{number}")) for number in range(40)], 80, 24, "", False, None, 2)
def test_any_state_at_any_size_is_exactly_as_many_rows_and_columns(
    lines: List[bytes], columns: int, rows: int, source: str, ended: bool, pid: Optional[int], page: int
) -> None:
    view = View(source, pid, time.time(), ended, source, page)
    model = model_of(*lines)
    shown = picture.draw(model, view, columns, rows)
    assert len(shown) == rows
    for painted in shown:
        text = "".join(part for part, _ in painted)
        assert len(text) == columns
        assert all(wcwidth(character) == 1 for character in text), ascii(text)
        plainly = "".join(Style(False, False).fit(part) for part, _ in painted)
        assert len(plainly) == columns and plainly.isascii() and (plainly.isprintable() or not plainly)


@unhurried
@given(st.lists(st.sampled_from([0, 1, 3, 65_535, 65_536, 65_537, 140_000]), max_size=6), st.integers(1000, 100_000))
def test_pieces_of_any_size_become_the_same_lines_and_an_endless_one_is_cut(lengths: List[int], size: int) -> None:
    lines = [b"%d" % (number % 10) * length for number, length in enumerate(lengths)]
    stream = b"".join(line + b"\n" for line in lines)
    cutter = Cutter()
    found = [line for begin in range(0, len(stream), size) for line in cutter.cut(stream[begin : begin + size])]
    assert found == [line[:65_536] for line in lines]
    assert list(cutter.end()) == []


def test_an_endless_stream_takes_no_more_memory_than_a_long_one() -> None:
    model = Model()

    def feed(begin: int, count: int) -> int:
        for number in range(begin, begin + count):
            model.feed(dumped(connection(pid=1000 + number % 4, client_port=number % 65536, reason=f"r{number}")))
            model.feed(dumped({**head(f"event{number}", 1), "x": number}))
            model.feed(dumped(said("error", f"trouble {number}")))
            model.feed(dumped(said("timestamps_drift", f"drift {number}")))
            model.feed(dumped({**metrics(number), "pid": 1000, "route": f"r{number}"}))
        for number in range(begin, begin + count):
            model.feed(dumped({**head("metrics", number), "start_time": at(0), "uptime_s": number, "interval_s": 1}))
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = feed(0, 1100)
        after = feed(1100, 1100)
    finally:
        tracemalloc.stop()
    assert after - before < 100_000
    for pid in range(1000):
        model.feed(dumped(said("error", "x", pid=pid)))
    assert list(model.processes) == list(range(984, 1000))


# What the lines say


def test_each_event_is_read_into_a_record_of_its_kind() -> None:
    kinds = {
        Start: start(),
        RouteStart: route("oe"),
        Closed: connection(),
        Metrics: metrics(10),
        Said: said("warning", "x", level="warning"),
    }
    for kind, line in kinds.items():
        assert type(read(encoder.line(line))) is kind


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"a human's word", "not JSON"),
        (encoder.line(start())[:80], "not JSON"),
        (b"", "not JSON"),
        (b"[1]", "no JSON object"),
        (b"{}", "no event"),
        (dumped(head("rumour", 1)), "unknown event 'rumour'"),
        (dumped({**connection(), "pid": True}), "wrong type of pid"),
        (dumped({**connection(), "pid": None}), "no pid"),
        (dumped({**connection(), "rx_bytes": "7"}), "wrong type of rx_bytes"),
        (dumped({**connection(), "rx_bytes": -7}), "no sensible rx_bytes"),
        (dumped({**connection(), "upstream_timestamps": 1}), "wrong type of upstream_timestamps"),
        (dumped({**connection(), "timestamp": "yesterday"}), "no sensible timestamp"),
        (dumped({**metrics(10), "uptime_s": float("nan")}), "no sensible uptime_s"),
        (dumped({**metrics(10), "relay_us_le_4": 9}), "no sensible relay_us_le_"),
        (dumped({**start(), "targets": [1]}), "wrong type of targets"),
        (dumped(route("oe", route=7)), "wrong type of route"),
        (dumped(route("oe", route=None)), "no route"),
        (dumped(connection(route="\x1b[2Joe")), "no sensible route"),
        (dumped(metrics(10, route="")), "no sensible route"),
        (dumped({**said("error", "x"), "route": "r" * 64}), "no sensible route"),
        (dumped({**head("reload", 1), "added": "two"}), "wrong type of added"),
    ],
)
def test_a_line_that_can_not_be_used_says_why_and_is_counted(line: bytes, why: str) -> None:
    model = model_of(line, line)
    assert model.unread == {why: 2}
    rows = drawn(model)
    assert " 2 unusable lines" in "\n".join(rows)
    assert any(shown.startswith(f" unusable line    {why}:") for shown in rows)


def test_unusable_lines_do_not_crowd_the_errors_out() -> None:
    rows = drawn(model_of(start(), said("error", "worker 1 died"), *[b"noise"] * 300))
    assert "worker 1 died" in "\n".join(rows)
    assert "300 unusable lines" in "\n".join(rows)


def test_an_escape_sequence_in_a_text_is_shown_as_question_marks() -> None:
    rows = drawn(model_of(start(), said("error", "a\x1b]0;b\x07c\x9bd\u202ee\u0301\u4e2d")))
    assert "a?]0;b?c?d?e??" in "\n".join(rows)
    assert clean("b\u00f6rse \u2192 \u03b1") == "b\u00f6rse \u2192 \u03b1"


def test_each_character_that_is_let_through_is_one_visible_column() -> None:
    every = "".join(map(chr, range(0x110000)))
    shown = clean(every, len(every))
    assert len(shown) == len(every)
    assert shown.isprintable() and all(wcwidth(character) == 1 for character in shown)
    assert sum(before == after for before, after in zip(every, shown)) > 1000


def test_an_address_of_ipv6_stands_in_brackets_and_is_cut_in_its_middle() -> None:
    line = connection(client_address="2001:db8:85a3:1234:5678:8a2e:370:7334", upstream_address="fd01::2")
    for columns, client in ((80, " [2001:db8:85…4]:50001 "), (200, " [2001:db8:85a3:1234:5678:8a2e:370:7334]:50001 ")):
        (shown,) = [shown for shown in drawn(model_of(line), columns) if "50001" in shown]
        assert client in shown
    assert " [fd01::2]:443 " in shown


def test_rates_are_made_of_the_totals_and_the_time_between() -> None:
    first = metrics(10, downstream_cx_rx_bytes_total=1000, downstream_cx_total=10)
    second = metrics(20, downstream_cx_rx_bytes_total=21_000, downstream_cx_total=60, downstream_cx_active=7)
    rows = drawn(model_of(start(), first, second))
    assert re.fullmatch(r" from clients +2.00 kB/s +2.00 kB/s +▁█ ", row(rows, "from clients"))
    assert re.fullmatch(r" connections +5 /s +5 /s +▃█ ", row(rows, "connections"))
    assert re.fullmatch(r" active +7/1,000 +7 +▁█ ", row(rows, "active"))


def test_two_metrics_lines_in_a_row_make_no_wild_rate() -> None:
    lines = [metrics(second, downstream_cx_rx_bytes_total=int(second * 100)) for second in (10, 20, 20.001, 20.002)]
    assert row(drawn(model_of(start(), *lines)), "from clients").split()[2:6] == ["100", "B/s", "100", "B/s"]


def test_lines_that_come_faster_than_a_rate_is_made_are_joined_to_intervals() -> None:
    ticks = [metrics(number / 20, interval_s=0.05, downstream_cx_rx_bytes_total=50 * number) for number in range(1, 21)]
    process = model_of(start(), *ticks).processes[100]
    assert len(process.intervals) >= 5
    assert process.last
    assert process.last.rx_per_s == pytest.approx(1000)
    assert not any("no metrics line yet" in row for row in drawn(model_of(start(), *ticks)))


def test_a_stream_that_is_joined_late_shows_what_the_line_says_and_no_invented_rate() -> None:
    late = metrics(1000, rx_bytes_per_s=70, downstream_cx_total=5_000, relays=(9000,))
    rows = drawn(model_of(late))
    assert row(rows, "from clients").split()[2:4] == ["70", "B/s"]
    assert row(rows, "connections").split()[1] == "-"
    assert row(rows, "relay").split()[1:6] == ["-"] * 5
    assert "(its start line is not here)" in rows[0]


def test_where_lines_were_left_out_no_rate_reaches_across_the_gap() -> None:
    model = model_of(start(), metrics(10))
    model.skipped()
    model.feed(encoder.line(metrics(1000, downstream_cx_total=99_000, rx_bytes_per_s=5)))
    assert row(drawn(model), "connections").split()[1] == "-"


TIMES = st.lists(st.integers(0, 3 * 10**9), max_size=40)


@unhurried
@given(TIMES, TIMES)
@example([], [2 * 10**9])
@example([5_000_000], [10])
def test_the_last_intervals_percentiles_are_the_limits_of_the_buckets_they_lie_in(before: List[int], then: List[int]) -> None:
    process = model_of(metrics(10, relays=tuple(before)), metrics(20, relays=tuple(before + then))).processes[100]
    assert process.last and process.last.relay
    assert process.last.relay.total == len(then)
    counts = histogram.add([row_of(then)])
    for share, shown in ((0.5, process.last.relay.p50), (0.99, process.last.relay.p99), (1.0, process.last.relay.most)):
        exact = histogram.percentile(counts, share)
        if exact is None:
            assert shown is None
            continue
        limits = [limit for limit in histogram.LIMITS_US if limit >= exact]
        most = max(before + then) / 1000
        assert shown == min(limits[0] if limits else float("inf"), most)
        assert shown >= min(exact, most)


def test_latency_shows_the_last_interval_as_limits_and_the_whole_as_it_is() -> None:
    rows = drawn(model_of(start(), metrics(10, relays=(33_200,) * 9), metrics(20, relays=(33_200,) * 9 + (900_000,))))
    assert "── latency, 10 s ─ p50 " in "\n".join(rows)
    assert row(rows, "relay").split()[1:6] == ["≤900", "us", "≤900", "us", "≤900"]
    since = rows[rows.index(row(rows, "relay")) + 1]
    assert since.split()[2:8] == ["33.2", "us", "900", "us", "900", "us"] and since.split()[10] == "10"


def test_a_restart_with_the_same_pid_begins_anew() -> None:
    old = [start(), metrics(10, downstream_cx_total=500), said("timestamps_drift", "gone")]
    model = model_of(*old, {**start(), "timestamp": at(100)}, metrics(10, began=100, downstream_cx_total=20))
    assert row(drawn(model), "connections").split()[1] == "2"
    assert verdict.judge(model.processes[100]).grade is Grade.GOOD


def test_a_restart_whose_start_line_is_not_here_begins_anew_too() -> None:
    old = [metrics(10), metrics(20, downstream_cx_total=500, rx_bytes_per_s=9), said("timestamps_drift", "gone")]
    model = model_of(*old, metrics(10, began=100, downstream_cx_total=20))
    assert row(drawn(model), "connections").split()[1:4] == ["2", "/s", "2"]
    assert model.processes[100].drift_count == 0


def test_a_pid_that_begins_again_is_the_newest() -> None:
    rows = drawn(model_of(start(pid=100), start(pid=200), start(pid=100)))
    assert "pid 100" in rows[0] and "(2 of 2, the newest)" in rows[-1]


def test_an_older_process_with_the_same_pid_is_told_apart() -> None:
    model = model_of(metrics(10, began=100, downstream_cx_total=20), metrics(90, began=20), metrics(20, began=100))
    assert model.unread == {"of an older process with the same pid": 1}
    assert model.processes[100].metrics and model.processes[100].metrics.uptime_s == 20


def test_the_process_that_began_last_is_shown_and_how_many_there_are() -> None:
    rows = drawn(model_of(start(pid=100), start(pid=200, listen_port=8081), connection(pid=100)))
    assert "pid 200" in rows[0]
    assert "n next process (2 of 2, the newest)" in rows[-1]
    older = drawn(model_of(start(pid=100), start(pid=200), connection(pid=100)), pid=100)
    assert "pid 100" in older[0] and "(1 of 2)" in older[-1]
    assert "10.0.0.1:50001" in "\n".join(older) and "10.0.0.1:50001" not in "\n".join(rows)


def test_the_same_message_again_and_again_takes_one_row() -> None:
    rows = drawn(
        model_of(start(), *[said("error", "accept: EMFILE", second) for second in range(1, 8)], said("error", "other"))
    )
    latest = rows.index(next(shown for shown in rows if shown.startswith(" 14:13:22 error   other")))
    assert rows[latest + 1].startswith(" 14:13:27 error   (7 times) accept: EMFILE")


def test_of_a_traceback_what_happened_is_shown() -> None:
    text = "Traceback (most recent call last):\n  File 'x'\nKeyError: 3\n"
    assert "KeyError: 3 (its traceback is in the line)" in "\n".join(drawn(model_of(said("error", text))))


def test_only_the_counters_of_trouble_that_are_not_zero_are_shown_the_worst_first() -> None:
    counts = {
        "upstream_cx_connect_fail": 2,
        "worker_restarts_total": 1,
        "log_lines_dropped_total": 3,
        "cx_reset_by_peer_total": 0,
    }
    assert " 1 workers died, 3 lines dropped, 2 connects failed " in "\n".join(drawn(model_of(metrics(10, **counts))))
    assert " none counted" in "\n".join(drawn(model_of(metrics(10))))
    assert " nothing counted yet" in "\n".join(drawn(model_of(start())))


def test_the_last_ones_that_ended_stand_first_with_how_they_ended() -> None:
    late = connection(9, client_port=50002, reason="half_close_timeout", termination_state="cD", upstream_timestamps=None)
    rows = drawn(model_of(start(), connection(), late))
    ended = [shown for shown in rows if ":5000" in shown]
    assert ended[0].rstrip() == " 14:13:29 10.0.0.1:50002        5.32 ms    78 B   190 B -  cD half_close_timeout"
    assert ended[1].rstrip() == " 14:13:21 10.0.0.1:50001        5.32 ms    78 B   190 B no -- closed"


def test_the_fewer_rows_there_are_the_more_they_are_worth() -> None:
    model = model_of(start(), metrics(10), connection(), said("error", "x"))
    small = drawn(model, 40, 10)
    for name in ("tsproxy", "OK", "from clients", "to clients", "connections", "active", "relay", "q quit"):
        row(small, name)
    narrow = drawn(model_of(start(), metrics(10, relays=(33_200,))), 45, 24)
    assert row(narrow, "relay").split()[1:] == ["≤33.2", "us"] * 3  # no figure is cut in two
    assert "q quit" in drawn(model, 40, 1)[0]
    for rows in range(4, 60):
        assert {line.split()[0] for line in drawn(model, 80, rows)[:2]} == {"tsproxy", "OK"}


def test_lines_that_should_have_come_and_have_not_are_missed() -> None:
    model = model_of(start(), metrics(10), metrics(20))
    for now, colour in ((BEGAN + 30, picture.DIM), (BEGAN + 60, picture.YELLOW)):
        footer = picture.draw(model, View(now=now), 80, 24)[-1]
        assert footer[1][1] == colour
        assert footer[1][0].strip() == f"last line 14:13:40Z, {now - BEGAN - 20} s ago"


# Timestamps: no more than the lines show

REFUSED = {"reason": "policy", "termination_state": "PR"}
DRIFTED = said("timestamps_drift", "sysctl is 1", 3)
HELD = said("timestamps_drift", "holds again", 9, "info")
VERDICTS: List[Tuple[List[Line], Grade, str]] = [
    ([], Grade.OPEN, "No line yet that tells of timestamps"),
    ([start(), metrics(10)], Grade.GOOD, "No TCP timestamp has left, as far as these lines show"),
    ([start(witness="nftables")], Grade.GOOD, "No TCP timestamp has left, as far as these lines show"),
    ([connection()], Grade.GOOD, "No TCP timestamp has left, as far as these lines show"),
    ([start(witness="trusted")], Grade.NOTE, "No timestamp negotiated; that none left is the user's word"),
    ([start(), DRIFTED], Grade.BAD, "The policy does not hold since 14:13:23: new connections are refused"),
    ([start(), DRIFTED, HELD], Grade.NOTE, "No timestamp negotiated; the policy did not hold 14:13:23 to 14:13:29"),
    ([start(), HELD], Grade.GOOD, "No TCP timestamp has left, as far as these lines show"),
    (
        [start(), metrics(10, upstream_cx_timestamps_total=2)],
        Grade.BAD,
        "2 handshakes with a timestamp; reset before a byte was relayed",
    ),
    (
        [start(), connection(upstream_timestamps=True, **REFUSED)],
        Grade.BAD,
        "1 handshake with a timestamp; reset before a byte was relayed",
    ),
    (
        [start(), metrics(10, upstream_cx_policy_refused_total=1)],
        Grade.NOTE,
        "No timestamp negotiated; the SYN of 1 refused connection may have had one",
    ),
    (
        [start(), connection(upstream_timestamps=False, **REFUSED)],
        Grade.NOTE,
        "No timestamp negotiated; the SYN of 1 refused connection may have had one",
    ),
    (
        [start(), connection(upstream_timestamps=False, **REFUSED), metrics(10, upstream_cx_policy_refused_total=1)],
        Grade.NOTE,
        "No timestamp negotiated; the SYN of 1 refused connection may have had one",
    ),
    (
        [start(), connection(upstream_timestamps=None, **REFUSED), metrics(10, upstream_cx_policy_refused_total=1)],
        Grade.GOOD,
        "No TCP timestamp has left, as far as these lines show",
    ),
    ([connection(witness="none")], Grade.NOTE, "Timestamps may leave; no connection has negotiated them yet"),
    ([start("preserve", "none")], Grade.NOTE, "Timestamps may leave; no connection has negotiated them yet"),
    (
        [start("preserve", "none"), metrics(10, upstream_cx_timestamps_total=1200)],
        Grade.NOTE,
        "Timestamps leave: 1,200 upstream connections with them",
    ),
    (
        [start("rewrite", "nftables", static_timestamp=7), metrics(10, upstream_cx_timestamps_total=9)],
        Grade.GOOD,
        "TSval 7 is all that leaves, as far as these lines show",
    ),
    (
        [start("rewrite", "nftables", static_timestamp=7), DRIFTED, HELD],
        Grade.NOTE,
        "TSval 7 is what leaves now; the policy did not hold at times",
    ),
    (
        [start("rewrite", "trusted", static_timestamp=7)],
        Grade.NOTE,
        "That TSval 7 is all that leaves is the user's word",
    ),
    (
        [connection(witness="nftables", upstream_timestamps=True)],
        Grade.OPEN,
        "Mode not known, for its start line is not here; 1 upstream connection with timestamps",
    ),
    ([said("warning", "x", level="warning")], Grade.OPEN, "No line yet that tells of timestamps"),
]


@pytest.mark.parametrize(("lines", "grade", "text"), VERDICTS, ids=[f"{number}" for number in range(len(VERDICTS))])
def test_the_verdict_says_what_the_lines_show_and_no_more(lines: List[Line], grade: Grade, text: str) -> None:
    model = model_of(*lines)
    judged = verdict.judge(picture.chosen(model, View()))
    assert (judged.grade, judged.text) == (grade, text)
    assert f" {grade.value:<5} {text}"[:79] in drawn(model)[1]


def test_the_figures_behind_the_verdict_count_what_ended_since_the_last_metrics_line() -> None:
    counts = {"upstream_cx_total": 1, "downstream_cx_timestamps_total": 1, "downstream_cx_total": 1}
    ended = [connection(upstream_timestamps=True)] * 3
    rows = drawn(model_of(start("preserve", "none"), metrics(10, **counts), *ended))
    assert rows[2].split("upstream")[1].rstrip() == " 3/3, clients 1/1, refused 0, drifts 0"


# Routes


def routed(*names: str, pid: int = 100) -> List[Line]:
    return [start_of_routes(len(names), pid), *(route(name, pid=pid) for name in names)]


def refusal(name: str, second: float = 3, level: str = "error", pid: int = 100) -> Line:
    return {**said("timestamps_drift", "sysctl is 1", second, level, pid), "route": name}


def table_of(rows: List[str]) -> Dict[str, str]:
    """The rows of the table by the names of the routes, from the top."""
    begin = next(number for number, shown in enumerate(rows) if shown.startswith(" process"))
    end = next(number for number, shown in enumerate(rows) if number > begin and shown[:1] == "─")
    return {shown[1:].split()[0]: shown for shown in rows[begin + 1 : end]}


def names_of(rows: List[str]) -> List[str]:
    return list(table_of(rows))


def test_the_table_has_a_row_for_each_route_and_one_for_the_process() -> None:
    counts = {"downstream_cx_active": 2, "downstream_cx_total": 10, "downstream_cx_rx_bytes_total": 5000}
    before = [metrics(10, route="oe-primary"), metrics(10, route="oe-backup"), metrics(10, route=None)]
    after = [
        metrics(20, route="oe-primary", relays=(33_200,) * 9, **counts),
        metrics(20, route="oe-backup", downstream_cx_tx_bytes_total=20_000),
        metrics(20, route=None, relays=(33_200,) * 9, **{**counts, "downstream_cx_tx_bytes_total": 20_000}),
    ]
    model = model_of(*routed("oe-primary", "oe-backup"), *before, *after)
    rows = drawn(model)
    assert rows[0].startswith(" tsproxy  pid 100  relaying  up 20 s") and rows[0].rstrip().endswith("2 routes")
    figures = ["2", "1", "500", "B", "0", "B", "≤33.2", "us"]
    assert table_of(rows)["oe-primary"].split() == ["oe-primary", ":9001", *figures, "strip", "sysctl"]
    assert table_of(rows)["oe-backup"].split()[2:9] == ["0", "0", "0", "B", "2.00", "kB", "-"]
    assert row(rows, "process").split() == ["process", "2", "1", "500", "B", "2.00", "kB", "≤33.2", "us"]
    assert row(rows, "from clients").split()[2:4] == ["500", "B/s"]
    wide = row(drawn(model, 172, 40), "oe-primary")
    assert " 127.0.0.1:9001 " in wide and " exchange.example:443 " in wide and re.search(" 2 +4 ", wide)


def test_each_figure_of_a_row_ends_where_its_heading_does() -> None:
    lines = [metrics(10, route="oe", upstream_segments_per_s=1234.5), metrics(10, route=None)]
    for columns in (34, 50, 58, 72, 80, 112, 120, 124, 136, 172, 200):
        rows = drawn(model_of(*routed("oe"), *lines), columns)
        heading = next(shown for shown in rows if "── 1 route" in shown)
        shown = table_of(drawn(model_of(*routed("oe"), *lines), columns))["oe"]
        if "policy" in heading:
            at = heading.index("policy")
            assert shown[at:].startswith(shorten("strip sysctl", columns - at))
        for name, figure in (("active", "0"), ("p99", "-"), ("segs/s", "1.23k"), ("of", "4")):
            if f" {name} " in heading:
                end = heading.index(f" {name} ") + 1 + len(name)
                assert shown[:end].endswith(f" {figure}"), (columns, name)


def test_a_route_that_refuses_stands_on_top_and_in_the_verdict_and_no_other() -> None:
    lines = routed(*(f"r{number}" for number in range(12)))
    model = model_of(*lines, refusal("r7"))
    shown = picture.draw(model, View(now=BEGAN + 12), 80, 24)
    rows = ["".join(text for text, _ in painted) for painted in shown]
    assert rows[1].startswith(" ALARM r7 refuses new connections: not held since 14:13:23") and "11 of 12 OK" in rows[1]
    assert names_of(rows) == ["r7", *(f"r{number}" for number in range(12) if number != 7)]
    (worst,) = [painted for painted in shown if painted[0][0].startswith("!")]
    assert worst[0][1] == worst[2][1] == picture.RED and worst[2][0].startswith("REFUSED 14:13:23")
    model.feed(encoder.line(refusal("r7", 9, "info")))
    assert " NOTE  r7: No timestamp negotiated; the policy did not hold 14:13:23 to 14:13:29" in drawn(model)[1]


ALL_GOOD = "No TCP timestamp has left by any of 3 routes, as far as these lines show"
STAMPED = metrics(10, route="a", upstream_cx_timestamps_total=2)
UNKNOWN = "d: Mode not known, for its route line is not here; 0 upstream connections with timestamps"
MAY_LEAVE = "c: Timestamps may leave; no connection has negotiated them yet"
OF_A_REMOVED_ONE = metrics(10, route=None, upstream_cx_policy_refused_total=2)
BY_ROUTE: List[Tuple[List[Line], Grade, str, str]] = [
    ([], Grade.GOOD, ALL_GOOD, "strip by sysctl"),
    ([refusal("b")], Grade.BAD, "b refuses new connections: not held since 14:13:23", "2 of 3 OK"),
    ([refusal("b"), refusal("c")], Grade.BAD, "2 of 3 routes refuse new connections since 14:13:23: b, c", "1 of 3 OK"),
    ([refusal("b"), STAMPED], Grade.BAD, "2 of 3 routes in alarm: a, b", "1 of 3 OK"),
    ([STAMPED], Grade.BAD, "a: 2 handshakes with a timestamp; reset before a byte was relayed", "2 of 3 OK"),
    ([DRIFTED], Grade.BAD, "The policy does not hold since 14:13:23: new connections are refused", ""),
    ([connection(route="d", witness="nftables")], Grade.OPEN, UNKNOWN, "3 of 4 OK"),
    ([route("c", "preserve", "none")], Grade.NOTE, MAY_LEAVE, "2 of 3 OK"),
    ([route(name, "strip", "trusted") for name in "abc"], Grade.NOTE, "3 of 3 routes with a note: a, b, c", "0 of 3 OK"),
    ([OF_A_REMOVED_ONE], Grade.GOOD, ALL_GOOD, "strip by sysctl"),
]  # fmt: skip


@pytest.mark.parametrize(("lines", "grade", "text", "basis"), BY_ROUTE, ids=[f"{number}" for number in range(len(BY_ROUTE))])
def test_the_verdict_on_a_process_is_that_on_the_worst_of_its_routes(
    lines: List[Line], grade: Grade, text: str, basis: str
) -> None:
    judged = verdict.judge(model_of(*routed("a", "b", "c"), *lines).processes[100])
    assert (judged.grade, judged.text) == (grade, text)
    assert judged.basis == basis or not basis


def test_a_fresh_trouble_lifts_a_route_for_a_minute_and_says_what_it_is() -> None:
    quiet = [metrics(10, route=name) for name in "abc"]
    model = model_of(*routed("a", "b", "c"), *quiet, metrics(20, route="b", upstream_cx_connect_fail=3))
    assert names_of(drawn(model)) == ["b", "a", "c"]
    assert "3 connects failed" in table_of(drawn(model))["b"]
    model.feed(encoder.line({**said("error", "can't accept", 21), "route": "c"}))
    assert names_of(drawn(model)) == ["c", "b", "a"]
    assert "error   14:13:41" in table_of(drawn(model))["c"]
    assert "c: can't accept" in "\n".join(drawn(model))
    assert "14:13:40 3 connects failed" in table_of(drawn(model, 150, 40))["b"]
    model.feed(encoder.line(metrics(100, route="a")))
    assert names_of(drawn(model)) == ["a", "b", "c"]
    assert "strip sysctl" in table_of(drawn(model))["b"]
    assert "14:13:40 3 connects failed" in table_of(drawn(model, 150, 40))["b"]  # its last one, however long ago


def test_what_was_counted_before_the_first_line_that_is_seen_is_no_fresh_trouble() -> None:
    late = metrics(1000, route="b", downstream_cx_overflow=9)
    assert names_of(drawn(model_of(metrics(1000, route="a"), late, metrics(1000, route=None)))) == ["a", "b"]


@unhurried
@given(st.lists(st.sampled_from("abcdefgh"), unique=True, min_size=1), st.sets(st.sampled_from("abcdefgh")), st.integers(1, 40))
def test_of_any_routes_those_that_refuse_come_first_and_all_keep_their_order(
    names: List[str], refusing: Any, rows: int
) -> None:
    shown: List[str] = []
    model = model_of(*routed(*names), *(refusal(name) for name in names if name in refusing))
    wanted = sorted(names, key=lambda name: name not in refusing)
    for page in range(len(names)):
        page_rows = drawn(model, 80, 24 if rows > 24 else 14 + rows % 3, page=page)
        shown += [name for name in names_of(page_rows) if name not in shown]
    assert shown == wanted


PAGES = [(0, "1-14", range(14)), (1, "15-28", range(14, 28)), (2, "29-30", range(28, 30)), (3, "1-14", range(14))]


@pytest.mark.parametrize(("page", "heading", "numbers"), PAGES)
def test_more_routes_than_rows_are_turned_over_by_page(page: int, heading: str, numbers: range) -> None:
    model = model_of(*routed(*(f"r{number:02}" for number in range(30))))
    rows = drawn(model, page=page)
    assert f"── routes {heading} of 30 " in "\n".join(rows)
    assert names_of(rows) == [f"r{number:02}" for number in numbers]
    assert "space more routes" in rows[-1]
    assert "space" not in drawn(model, 80, 60)[-1]
    assert "── 30 routes " in "\n".join(drawn(model, 80, 60))


def test_a_removed_route_goes_when_its_lines_have_stopped_and_one_lost_line_removes_none() -> None:
    model = model_of(*routed("a", "b"), {**head("reload", 5), "added": 0, "removed": 1, "changed": 0, "unchanged": 1})
    for second, told in ((10, "ab"), (20, "a"), (30, "ab"), (40, "a")):
        for name in told:
            model.feed(encoder.line(metrics(second, route=name, downstream_cx_active=1)))
        model.feed(encoder.line(metrics(second, route=None)))
    assert names_of(drawn(model)) == ["a", "b"]
    for name in ("a", None):
        model.feed(encoder.line(metrics(50, route=name)))
    assert names_of(drawn(model)) == ["a"]
    assert "reload" in "\n".join(drawn(model)) and "1 removed" in "\n".join(drawn(model))
    model.feed(encoder.line(route("b", second=60, listen_port=9100)))
    assert ":9100" in table_of(drawn(model))["b"]


def test_a_route_that_is_refused_and_removed_leaves_the_verdict() -> None:
    model = model_of(*routed("a", "b"), refusal("b"), metrics(10, route="a"), metrics(10, route=None))
    assert verdict.judge(model.processes[100]).grade is Grade.BAD
    for second in (20, 30, 40):
        for name in ("a", None):
            model.feed(encoder.line(metrics(second, route=name)))
    assert verdict.judge(model.processes[100]).grade is Grade.GOOD


def test_a_route_line_for_a_known_route_changes_what_it_says_and_ends_its_refusal() -> None:
    model = model_of(*routed("a", "b"), refusal("a"), route("a", second=9, listen_port=9100, targets=["other:1"]))
    assert ":9100" in table_of(drawn(model))["a"]
    judged = verdict.judge(model.processes[100].routes[0])
    assert (judged.grade, judged.text) == (Grade.NOTE, "No timestamp negotiated; the policy did not hold 14:13:23 to 14:13:29")


def test_a_route_that_changes_from_preserve_to_strip_is_not_blamed_for_what_was_preserved() -> None:
    preserved = [route("a", "preserve", "none"), metrics(10, route="a", upstream_cx_timestamps_total=5)]
    model = model_of(start_of_routes(1), *preserved, route("a", second=11))
    for line in (
        metrics(20, route="a", upstream_cx_timestamps_total=6),  # one more before the change
        connection(21, route="a", upstream_timestamps=True, witness="none"),  # outlived it
        metrics(30, route="a", upstream_cx_timestamps_total=6),
    ):
        model.feed(encoder.line(line))
        assert verdict.judge(model.processes[100]).grade is Grade.GOOD
    model.feed(encoder.line(metrics(40, route="a", upstream_cx_timestamps_total=7)))
    assert verdict.judge(model.processes[100]).text == "a: 1 handshake with a timestamp; reset before a byte was relayed"


@pytest.mark.parametrize("absent", [0, 5], ids=["soon", "after it has left the table"])
def test_a_route_that_was_removed_and_is_added_again_begins_anew(absent: int) -> None:
    """Its totals are from 0 again: what it does shows at once, not when it has counted more than before."""
    counted = {"downstream_cx_total": 900, "downstream_cx_rx_bytes_total": 9000, "upstream_cx_connect_fail": 50}
    model = model_of(*routed("a", "b"))
    for second in (1000, 1010, *(1020 + 10 * number for number in range(absent))):
        lines = [metrics(second, route=name, **counted) for name in ("ab", "b")[second > 1010]]
        for line in (*lines, metrics(second, route=None)):
            model.feed(encoder.line(line))
    model.feed(encoder.line(route("a", second=1085)))
    for uptime in (5, 15):
        again = {"downstream_cx_rx_bytes_total": 20 * (uptime - 5), "upstream_cx_connect_fail": 3}
        line = metrics(uptime, route="a", began=1085, **again)
        model.feed(encoder.line({**line, "timestamp": at(1085 + uptime)}))
    shown = table_of(drawn(model, 112))["a"]
    assert shown.split()[2:7] == ["0", "0", "20", "B", "0"] and "3 connects failed" in shown


def test_routes_of_two_processes_are_told_apart_by_pid() -> None:
    old, new = routed("a", "b"), routed("b", "c", pid=200)
    model = model_of(*old, refusal("b"), *new, connection(5, pid=100, route="b"), metrics(10, pid=200, route="b"))
    assert names_of(drawn(model)) == ["b", "c"] and " OK " in drawn(model)[1]
    older = drawn(model, pid=100)
    assert names_of(older) == ["b", "a"] and " ALARM b refuses" in older[1]
    assert "pid 100: b: sysctl is 1" in "\n".join(drawn(model))
    model.feed(encoder.line(start_of_routes(1)))
    assert model.processes[100].routes == []  # the same pid began anew


def test_a_file_may_call_a_route_default_and_a_command_line_makes_no_table() -> None:
    model = model_of(*routed("default", "a"), metrics(10, route="default", downstream_cx_active=1), metrics(10, route=None))
    assert names_of(drawn(model)) == ["default", "a"]
    alone = [start(), metrics(10, route="default", downstream_cx_active=1), connection(route="default"), refusal("default")]
    rows = drawn(model_of(*alone))
    assert rows[1].startswith(" ALARM The policy does not hold since 14:13:23")
    assert row(rows, "active").split()[1] == "1/1,000"
    assert not any("default" in shown or "policy ─" in shown for shown in rows)


def test_whose_start_lines_are_not_here_is_known_by_the_metrics_lines() -> None:
    rows = drawn(model_of(metrics(1000, route="a", rx_bytes_per_s=70), metrics(1000, route=None, rx_bytes_per_s=90)))
    assert row(rows, "process").split()[3:5] == ["90", "B"]
    shown = table_of(rows)["a"]
    assert shown[0] == "?" and shown.split()[4:6] == ["70", "B"] and "not known" in shown
    assert rows[1].startswith(" ?     a: Mode not known, for its route line is not here")


def test_a_connection_that_ended_says_of_which_route_it_was() -> None:
    rows = drawn(model_of(*routed("oe-primary", *"abcd"), connection(route="oe-primary")))
    assert " 14:13:21 10.0.0.1:50001        oe-primary     5.32 ms no -- closed" in [shown.rstrip() for shown in rows]


# Figures


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (words.scaled(0, "B/s"), "0 B/s"),
        (words.scaled(999, "B"), "999 B"),
        (words.scaled(999.6, "B"), "1.00 kB"),
        (words.scaled(9000, "B"), "9.00 kB"),
        (words.scaled(12_345_678, "B/s"), "12.3 MB/s"),
        (words.scaled(None, "B"), "-"),
        (words.count(999_999), "999,999"),
        (words.count(1_000_000), "1.00M"),
        (words.per_second(0.5), "0.50 /s"),
        (words.per_second(12_345), "12,345 /s"),
        (words.micros(33.75), "33.8 us"),
        (words.micros(999.6), "1.00 ms"),
        (words.micros(5321), "5.32 ms"),
        (words.micros(1_200_000), "1.20 s"),
        (words.micros(123_000_000), "2m 3s"),
        (words.seconds(0.21), "0.2 s"),
        (words.seconds(59.6), "1m 0s"),
        (words.seconds(8040), "2h 14m"),
        (words.seconds(100 * 3600), "4d 4h"),
    ],
)
def test_figures_read_as_people_write_them(shown: str, expected: str) -> None:
    assert shown == expected


@unhurried
@given(st.lists(st.none() | st.floats(0, 1e12), max_size=30), st.integers(-1, 20))
def test_a_sparkline_has_its_width_and_its_lowest_bar_is_zero_alone(values: List[Optional[float]], width: int) -> None:
    bars = picture.sparkline(values, width)
    assert len(bars) == max(0, width)
    for value, bar in zip(values[::-1], bars[::-1]):
        assert (bar == " ") == (value is None)
        assert (bar == "▁") == (value == 0)
    known = [value for value in values[-width:] if value is not None] if width > 0 else []
    assert not any(known) or "█" in bars


# Where lines come from


@pytest.fixture
def follow(tmp_path: Path) -> Iterator[Callable[[], Tuple[Path, Follower]]]:
    """Follow a new file that holds one line."""
    with contextlib.ExitStack() as stack:

        def begin() -> Tuple[Path, Follower]:
            path = tmp_path / "lines.json"
            path.write_bytes(b"one\n")
            follower = stack.enter_context(contextlib.closing(Follower(str(path))))
            assert follower.read() == [b"one"]
            assert follower.read() == []
            return path, follower

        yield begin


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def read_until(follower: Follower, count: int) -> List[bytes]:
    """That many lines, in as many reads as it takes."""
    found: List[bytes] = []
    wait_until(lambda: found.extend(follower.read()) or len(found) >= count, f"{count} lines")
    return found


def test_a_file_that_grows_gives_its_new_lines_when_they_are_whole(follow: Any) -> None:
    path, follower = follow()
    append(path, b"two\nthr")
    assert read_until(follower, 1) == [b"two"]
    append(path, b"ee\n")
    assert read_until(follower, 1) == [b"three"]
    assert follower.waits_for is None


def test_a_file_that_is_truncated_is_read_from_its_beginning(follow: Any) -> None:
    path, follower = follow()
    append(path, b"cut")
    follower.read()
    path.write_bytes(b"2\n")
    assert read_until(follower, 2) == [b"cut", b"2"]
    assert follower.note == "truncated"


def test_a_file_that_is_rotated_is_read_to_its_end_and_then_its_successor(follow: Any) -> None:
    path, follower = follow()
    path.rename(path.with_suffix(".1"))
    assert follower.read() == []
    assert follower.note == "the file is gone; waiting for it"
    append(path.with_suffix(".1"), b"last\n")
    path.write_bytes(b"first\n")
    assert follower.read() == [b"last"]
    assert follower.read() == []
    append(path.with_suffix(".1"), b"and a very last\n")
    assert read_until(follower, 2) == [b"and a very last", b"first"]
    assert follower.note == "rotated"


def test_of_a_long_file_the_beginning_and_the_end_are_read(tmp_path: Path) -> None:
    path = tmp_path / "lines.json"
    with path.open("wb") as file:
        file.write(encoder.line(start()))
        for number in range(40_000):
            file.write(b'{"n":%d,"fill":"%s"}\n' % (number, b"%05d" % number * 56))
    with contextlib.closing(Follower(str(path))) as follower:
        found: List[bytes] = []
        gaps = 0
        while lines := follower.read():
            found += lines
            gaps += follower.gap
        assert "bytes left out" in follower.note
    assert json.loads(found[0])["event"] == "start"
    assert gaps == 1
    numbers = [json.loads(line)["n"] for line in found[1:]]
    assert all(json.loads(line)["fill"] == f"{number:05}" * 56 for line, number in zip(found[1:], numbers))
    assert numbers[-1] == 39_999
    jumps = [(low, high) for low, high in zip(numbers, numbers[1:]) if high != low + 1]
    assert len(jumps) == 1 and jumps[0][0] < 4000 and jumps[0][1] > 10_000


def test_a_fifo_is_followed_from_writer_to_writer(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    with contextlib.closing(Follower(str(path))) as follower:
        assert follower.read() == []
        for name in (b"one", b"two"):
            with path.open("wb") as writer:
                writer.write(name + b"\n")
            assert read_until(follower, 1) == [name]
            assert follower.read() == []
            assert (follower.note, follower.ended) == ("no writer", False)


# In a terminal

WRAPPER = """trap : INT QUIT; before=$(stty -g </dev/tty); "$@"; code=$?
[ "$(stty -g </dev/tty)" = "$before" ] && echo "given back, code $code" || echo "CHANGED, code $code"
"""
AFTER = re.compile(r"given back, code (\d+)")
CONSUMED, BACK = b"\x1b[?1049h", b"\x1b[0m\x1b[?7h\x1b[?25h\x1b[?1049l"


def watch(*words: str, command: List[str] = CHECKOUT, **session: Any) -> PtySession:
    """`top` under a shell that says whether the terminal is as it was before."""
    return PtySession(["sh", "-c", WRAPPER, "sh", *command, "top", *words], **session)


def program(session: PtySession) -> int:
    """The pid of `top` itself."""
    (pid,) = wait_until(lambda: children(session.process.pid), "the program is started")
    return int(pid)


def assert_given_back(session: PtySession, code: int) -> None:
    """It has ended with that code, and the terminal is as it was before."""
    session.wait()
    shown, _, after = session.output.rpartition(BACK)
    assert CONSUMED in shown and b"\x1b" not in after, session.output[-500:]
    (ended,) = AFTER.findall(after.decode())
    assert (int(ended), after.count(b"\n")) == (code, 1 + (code == 130)) or int(ended) == code
    assert b"Traceback" not in session.output


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """A file of lines, as they were half a minute ago."""
    path = tmp_path / "lines.json"
    path.write_bytes(b"".join(map(encoder.line, (start(), connection(), metrics(10), said("error", "a trouble"), metrics(20)))))
    return path


def test_a_file_is_drawn_and_q_gives_the_terminal_back(form: Tuple[List[str], Any], lines: Path) -> None:
    command, cwd = form
    with watch(str(lines), command=command, cwd=cwd) as session:
        rows = session.wait_for("No TCP timestamp has left", "a trouble", "10.0.0.1:50001")
        assert rows[0].startswith(" tsproxy  pid 100  relaying  up 20 s") and rows[23].startswith(" q quit")
        session.press(b"q")
        assert_given_back(session, 0)


def test_each_of_200_routes_keeps_its_place_and_its_refusal(tmp_path: Path) -> None:
    """Also of a long file: their `route` lines are more than 64 KiB of its beginning."""
    names = [f"r{number:03}" for number in range(200)]
    filled = [{**line, "knobs": ["x" * 300]} for line in routed(*names)]
    told = [metrics(second, route=name) for second in (20, 30, 40) for name in (*names, None)]
    path = tmp_path / "lines.json"
    early, late = (b"".join(map(encoder.line, lines)) for lines in (filled, [refusal("r000", 15), *told]))
    assert len(early) > 1 << 16
    path.write_bytes(early + (b"x" * 60_000 + b"\n") * 180 + late)
    with watch(str(path), columns=120) as session:
        rows = session.wait_for("ALARM r000 refuses new connections", "bytes left out")
        assert rows[0].rstrip().endswith("200 routes") and "199 of 200 OK" in rows[1]
        assert names_of(rows)[:3] == names[:3]


def test_across_what_is_left_out_of_a_long_file_there_is_no_rate(tmp_path: Path) -> None:
    path = tmp_path / "lines.json"
    early, late = encoder.line(metrics(10)), encoder.line(metrics(1000, downstream_cx_total=99_000))
    path.write_bytes(encoder.line(start()) + early + (b"x" * 60_000 + b"\n") * 180 + late)
    with watch(str(path)) as session:
        rows = session.wait_for("up 16m 40s", "bytes left out", "unusable lines")
        assert row(rows, "connections").split()[1] == "-"


def test_it_follows_the_file(lines: Path) -> None:
    with watch(str(lines)) as session:
        session.wait_for("a trouble")
        append(lines, encoder.line(said("error", "more of it", 21)))
        session.wait_for("more of it")
        lines.rename(lines.with_suffix(".1"))
        lines.write_bytes(encoder.line(start(pid=222)))
        session.wait_for("pid 222", "rotated")


@pytest.mark.parametrize(("columns", "rows"), [(120, 40), (40, 10), (200, 60), (20, 3), (1, 1)])
def test_a_resize_is_followed_at_once(lines: Path, columns: int, rows: int) -> None:
    with watch(str(lines)) as session:
        session.wait_for("No TCP timestamp has left")
        session.resize(columns, rows)

        def fits() -> bool:
            shown = session.rows
            banner = rows < 3 or shown[1].startswith(" OK    No TCP timestamp has left"[: columns - 1])
            return banner and shown[-1].startswith(" q quit"[:columns])

        wait_until(fits, "the picture fits")
        assert len(session.rows) == rows
        session.press(b"q")
        assert_given_back(session, 0)


def test_ctrl_c_ends_it_and_gives_the_terminal_back(lines: Path) -> None:
    with watch(str(lines)) as session:
        session.wait_for("q quit")
        session.press(b"\x03")
        assert_given_back(session, 130)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_and_gives_the_terminal_back(lines: Path, number: signal.Signals) -> None:
    with watch(str(lines)) as session:
        session.wait_for("q quit")
        os.kill(program(session), number)
        assert_given_back(session, 128 + number)


def test_an_exception_gives_the_terminal_back(lines: Path) -> None:
    code = "import sys; from _tsproxy.tools import top; top.picture.draw = lambda *_: 1 / 0; top.run(sys.argv[2])"
    with watch(str(lines), command=[sys.executable, "-c", code]) as session:
        session.wait()
        shown, _, after = session.output.rpartition(BACK)
        assert CONSUMED in shown and b"ZeroDivisionError" in after and b"given back, code 1" in after


def test_ctrl_z_gives_the_terminal_back_until_it_goes_on(lines: Path) -> None:
    script = 'set -m; "$@"; echo "stopped with $?"; read -r _; fg >/dev/null; echo "ended with $?"'
    with PtySession(["bash", "-c", script, "bash", *CHECKOUT, "top", str(lines)]) as session:
        session.wait_for("q quit")
        session.press(b"\x1a")
        session.wait_for("stopped with 148")
        assert session.output.count(BACK) == 1
        session.press(b"\n")
        wait_until(lambda: session.rows and session.output.count(CONSUMED) == 2, "it is drawn again")
        session.wait_for("q quit", "No TCP timestamp has left")
        session.press(b"q")
        session.wait_for("ended with 0")


def test_lines_from_a_pipe_are_drawn_while_keys_come_from_the_terminal() -> None:
    reader, writer = os.pipe()
    with watch(stdin=reader) as session, os.fdopen(writer, "wb", buffering=0) as pipe:
        os.close(reader)
        session.wait_for("waiting for lines on standard input", "no line yet")
        pipe.write(encoder.line(start()))
        session.wait_for("pid 100")
        session.press(b"x\x1b[A\x0c")
        pipe.write(b"not a line\n" + encoder.line(start(pid=200)))
        session.wait_for("pid 200", "1 unusable line", "(2 of 2, the newest)")
        session.press(b"n")
        session.wait_for("pid 100", "(1 of 2)")
        session.press(b"n")
        session.wait_for("pid 200", "(2 of 2, the newest)")
        session.press(b"\x1bq")  # Alt-q, as cursor keys are: no key of ours
        pipe.write(encoder.line(start(pid=300)))
        session.wait_for("pid 300", "q quit")
        session.press(b"q")
        assert_given_back(session, 0)


def test_space_turns_the_routes_over(tmp_path: Path) -> None:
    path = tmp_path / "lines.json"
    path.write_bytes(b"".join(map(encoder.line, [*routed(*(f"r{number:02}" for number in range(20))), refusal("r17")])))
    with watch(str(path)) as session:
        rows = session.wait_for("ALARM r17 refuses", "routes 1-14 of 20")
        assert names_of(rows)[:2] == ["r17", "r00"]
        session.press(b" ")
        assert names_of(session.wait_for("routes 15-20 of 20"))[-1] == "r19"
        session.press(b" ")
        session.wait_for("routes 1-14 of 20")
        append(path, encoder.line(refusal("r17", 9, "info")))
        session.wait_for("NOTE  r17: No timestamp negotiated")
        session.press(b"q")
        assert_given_back(session, 0)


def test_at_the_end_of_a_pipe_the_last_state_stays_until_q() -> None:
    reader, writer = os.pipe()
    with watch(stdin=reader) as session:
        os.close(reader)
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(encoder.line(start()) + encoder.line(connection())[:60])
        session.wait_for("END OF INPUT: the last state; q quits", "pid 100", "not JSON", "last line 14:13:20Z")
        assert session.process.poll() is None
        session.press(b"q")
        assert_given_back(session, 0)


def test_why_tsproxy_did_not_start_stays_to_be_read() -> None:
    """The terminal is not taken before there is a line, or it has been waited for."""
    words = " ".join(map(shlex.quote, CHECKOUT))
    with PtySession(["bash", "-c", f"{words} -t exchange.example:0 | {words} top; echo ended with $?"]) as session:
        session.wait()
        assert CONSUMED not in session.output
        first, second, third = session.output.decode().splitlines()
        assert first.startswith("tsproxy.py: --target: given 'exchange.example:0'")
        assert (second, third) == ("tsproxy.py: standard input: ended before its first line", "ended with 1")


def test_a_pipe_that_ends_without_a_line_after_a_while_ends_it() -> None:
    reader, writer = os.pipe()
    with watch(stdin=reader) as session:
        os.close(reader)
        session.wait_for("waiting for lines on standard input")
        os.close(writer)
        assert_given_back(session, 1)
        assert b"tsproxy.py: standard input: ended before its first line" in session.output.rpartition(BACK)[2]


def test_where_there_are_no_keys_it_ends_with_the_lines(lines: Path) -> None:
    with lines.open("rb") as stdin, PtySession(["setsid", "-w", *CHECKOUT, "top"], stdin=stdin) as session:
        assert session.wait() == 0
        assert b"END OF INPUT" in session.output


def test_it_rests_while_nothing_comes(lines: Path) -> None:
    with watch(str(lines)) as session:
        session.wait_for("q quit")
        stat = Path(f"/proc/{program(session)}/stat")

        def used() -> int:
            return sum(map(int, stat.read_text().rsplit(")", 1)[1].split()[11:13]))

        session.wait_for("ago")
        begun, before = time.monotonic(), used()
        shown = len(session.output)
        wait_until(lambda: session.rows and time.monotonic() - begun > 2, "two seconds pass, the subject of this test")
        assert used() - before <= 0.1 * (time.monotonic() - begun) * os.sysconf("SC_CLK_TCK")
        assert len(session.output) - shown < 1000


@pytest.mark.parametrize(("no_colour", "coloured"), [("", True), ("1", False)])
def test_colours_unless_no_color_says_no(lines: Path, no_colour: str, coloured: bool) -> None:
    with watch(str(lines), env={"NO_COLOR": no_colour}) as session:
        session.wait_for("No TCP timestamp has left")
        assert (b"\x1b[30;42m" in session.output) == coloured
        assert bool(re.search(rb"\x1b\[[1-9][0-9;]*m", session.output)) == coloured


@pytest.mark.parametrize("env", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C"}], ids=["encoding", "locale"])
def test_a_terminal_that_is_not_utf_8_gets_ascii(lines: Path, env: Dict[str, str]) -> None:
    inherited = [] if "PYTHONIOENCODING" in env else ["env", "-u", "PYTHONIOENCODING"]
    with watch(str(lines), command=[*inherited, *CHECKOUT], env=env) as session:
        session.wait_for("-- rates --", "No TCP timestamp has left", "127.0.0.1:8080 > exchange.example:443")
        session.press(b"q")
        assert_given_back(session, 0)
        assert session.output.isascii()


# Without a screen


def run_plain(stdin: bytes, *words: str, **env: str) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8", **env}
    return subprocess.run(
        [*CHECKOUT, "top", *words], input=stdin, capture_output=True, timeout=60, check=False, env=environment
    )


def test_without_a_terminal_each_line_becomes_one_that_people_read(lines: Path) -> None:
    done = run_plain(lines.read_bytes() + b"\x1b[2J junk\n")
    assert (done.returncode, done.stderr) == (0, b"")
    said = done.stdout.decode().splitlines()
    assert said[0] == (
        "2026-09-21T14:13:20Z  pid 100  start  tsproxy 0.1.0, 127.0.0.1:8080 to exchange.example:443; "
        "OK: No TCP timestamp has left, as far as these lines show (strip by sysctl)"
    )
    assert said[1] == (
        "2026-09-21T14:13:21Z  pid 100  closed  10.0.0.1:50001 to 192.0.2.1:443, 5.32 ms, in 78 B, out 190 B, "
        "upstream without timestamps, closed --"
    )
    assert said[2].startswith("2026-09-21T14:13:30Z  pid 100  metrics  active 0; connections 0 /s; in 0 B/s; out 0 B/s; ")
    assert said[3] == "2026-09-21T14:13:22Z  pid 100  error  a trouble"
    assert said[5:] == ["unusable  not JSON: ?[2J junk"]


def test_plain_lines_say_of_which_route_they_are() -> None:
    lines = [
        *routed("oe-primary"),
        refusal("oe-primary"),
        connection(4, route="oe-primary"),
        metrics(10, route="oe-primary", downstream_cx_active=3),
        metrics(10, route=None, downstream_cx_active=3),
        {**head("reload", 11), "added": 2, "removed": 1, "changed": 0, "unchanged": 9, "message": "workers need a restart"},
        said("reload", "routes.ini:7: [x]: port: given 'y'", 12),
    ]
    told = run_plain(b"".join(map(encoder.line, lines))).stdout.decode().splitlines()
    good = "OK: No TCP timestamp has left, as far as these lines show (strip by sysctl)"
    bad = "ALARM: oe-primary refuses new connections: not held since 14:13:23 (0 of 1 OK)"
    for shown, begins, ends in zip(
        told,
        (
            "20Z  pid 100  start  tsproxy 0.1.0, 1 route; ?: ",
            f"20Z  pid 100  route oe-primary  start  127.0.0.1:9001 to exchange.example:443; {good}",
            "23Z  pid 100  route oe-primary  error  timestamps_drift: sysctl is 1",
            "24Z  pid 100  route oe-primary  closed  10.0.0.1:50001 to 192.0.2.1:443, ",
            "30Z  pid 100  route oe-primary  metrics  active 3; ",
            "30Z  pid 100  metrics  active 3; ",
            "31Z  pid 100  info  reload: 2 added, 1 removed, 0 changed, 9 unchanged; workers need a restart",
            "32Z  pid 100  error  reload: routes.ini:7: [x]: port: given 'y'",
        ),
        ("", good, "", "closed --", "new connections are refused (strip by sysctl)", bad, "", ""),
    ):
        assert shown.startswith(f"2026-09-21T14:13:{begins}") and shown.endswith(ends), shown
    assert len(told) == len(lines)


@pytest.mark.parametrize("term", ["dumb", ""])
def test_a_dumb_terminal_gets_plain_lines(lines: Path, term: str) -> None:
    with lines.open("rb") as stdin, PtySession([*CHECKOUT, "top"], stdin=stdin, env={"TERM": term}) as session:
        assert session.wait() == 0
        assert b"\x1b" not in session.output
        assert session.output.count(b"pid 100") == 5


def test_plain_lines_come_as_they_are_written(lines: Path) -> None:
    process = subprocess.Popen([*CHECKOUT, "top", str(lines)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with process:
        assert process.stdout and process.stderr
        assert b"start" in process.stdout.readline()
        for _ in range(4):
            process.stdout.readline()
        append(lines, encoder.line(said("error", "later")))
        assert b"later" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert process.stderr.read() == b""


def test_who_stops_reading_plain_lines_is_no_traceback(lines: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer) as stdout, lines.open("rb") as stdin:
        done = subprocess.run([*CHECKOUT, "top"], stdin=stdin, stdout=stdout, stderr=subprocess.PIPE, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (1, b"")


def test_a_file_that_can_not_be_read_is_one_line_and_2(tmp_path: Path) -> None:
    missing, closed = str(tmp_path / "missing"), str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(closed)
        for path, why in (
            (missing, "No such file"),
            (str(tmp_path), "a directory"),
            (closed, "No such device"),
            ("", "No such"),
        ):
            done = run_plain(b"", path)
            assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (2, b"", 1)
            assert done.stderr.decode().startswith(f"tsproxy.py: FILE: given {path!r}") and why in done.stderr.decode()


def test_no_file_and_nothing_piped_in_is_one_line_and_2() -> None:
    with PtySession([*CHECKOUT, "top"]) as session:
        assert session.wait() == 2
        assert session.output.count(b"\n") == 1 and session.output.startswith(
            b"tsproxy.py: FILE: given nothing, and standard input"
        )


# A real tsproxy


@contextlib.contextmanager
def piped(*options: str, command: List[str] = CHECKOUT) -> Iterator[Tuple[PtySession, Proxy]]:
    """tsproxy | top"""
    reader, writer = os.pipe()
    proxy = Proxy(command, "-p0", "--metrics-interval=200ms", *options, stdout=writer)
    os.close(writer)
    with contextlib.closing(proxy), watch(stdin=reader) as session:
        os.close(reader)
        yield session, proxy


def port_of(session: PtySession) -> int:
    shown = session.wait_for(" → 127.0.0.1:")[0]
    return int(re.search(r"127\.0\.0\.1:(\d+) →", shown)[1])  # type: ignore[index]


def test_a_real_tsproxy_is_watched_under_load_and_outlives_q(echoing: Exchange) -> None:
    with piped("-t", echoing.target, "--timestamps=preserve") as (session, proxy):
        port = port_of(session)
        done = threading.Event()

        def load() -> None:
            while not done.is_set():
                with socket.create_connection(("127.0.0.1", port)) as client:
                    for _ in range(20):
                        client.sendall(b"x" * 500)
                        receive_exactly(client, 500)

        clients = [threading.Thread(target=load, daemon=True) for _ in range(3)]
        for client in clients:
            client.start()
        try:
            rows = session.wait_for("Timestamps leave: ", "-- closed", "10 kB   10 kB TS", "█")
            assert re.search(r" from clients +[0-9.]+ [kM]B/s ", row(rows, "from clients"))
            assert re.search(r" relay +≤[0-9.]+ [um]s +≤", row(rows, "relay"))
            assert "unusable" not in "\n".join(rows)
            session.press(b"q")
            assert_given_back(session, 0)
            assert proxy.process.poll() is None
        finally:
            done.set()
            for client in clients:
                client.join()
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"still")
            assert receive_exactly(client, 5) == b"still"
        assert proxy.stop() == 0


def test_each_line_of_a_real_tsproxy_is_understood(start: Any, echoing: Exchange) -> None:
    proxy = start(echoing, "--log-level=debug")
    with proxy.connect() as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
    proxy.line("connection")
    proxy.metrics()
    assert proxy.stop() == 0
    model = model_of(*proxy.lines)
    assert not model.unread
    assert {line["event"] for line in proxy.lines} >= {"start", "connection", "metrics", "drain", "stop"}
    process = model.processes[proxy.process.pid]
    assert (process.phase, process.count("downstream_cx_total"), len(process.closed)) == ("stopped", 1, 1)
    assert process.start and process.start.max_connections == 1000


ROUTES = """
[oe-primary]
port = 0
target = {0}
[md]
port = 0
target = {0}
timestamps = {1}
"""


def test_each_line_of_real_routes_is_understood(tmp_path: Path, echoing: Exchange) -> None:
    path, text = tmp_path / "routes.ini", ROUTES.format(echoing.target, "preserve")
    options = [f"--routes={path}", "--timestamps=preserve", "--metrics-interval=0", "--workers=1"]
    path.write_text(text)

    def names() -> List[str]:
        proxy.metrics()
        return [one.name for one in model_of(*proxy.lines).processes[proxy.process.pid].routes]

    with contextlib.closing(Proxy([*CHECKOUT, *options])) as proxy:
        opened = proxy.line("route", lambda line: line["route"] == "md")
        with socket.create_connection((opened["listen_address"], opened["listen_port"])) as client:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
        assert proxy.line("connection")["route"] == "md"
        for contents, level in ((text.replace("[md]", "[md-b]"), "info"), ("[x", "error")):
            path.write_text(contents)
            proxy.process.send_signal(signal.SIGHUP)
            proxy.line("reload", lambda line, level=level: line["level"] == level)
        wait_until(lambda: names() == ["oe-primary", "md-b"], "the removed route has gone")
        assert proxy.stop() == 0
    model = model_of(*proxy.lines)
    assert not model.unread
    process = model.processes[proxy.process.pid]
    assert process.is_routed and process.count("downstream_cx_total") == 1
    assert {line["event"] for line in proxy.lines} >= {"start", "route", "reload", "connection", "metrics", "drain", "stop"}


@pytest.mark.root
def test_a_drift_of_one_route_is_an_alarm_by_its_name_and_the_other_one_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "routes.ini"
    with contextlib.closing(Namespace(tcp_timestamps="0")) as clean_one:
        with clean_one:
            far = Exchange()
        path.write_text(ROUTES.format(far.target, "preserve"))
        reader, writer = os.pipe()
        command = [*clean_one.enter, *CHECKOUT, f"--routes={path}", "--metrics-interval=200ms"]
        with (
            contextlib.closing(far),
            contextlib.closing(Proxy(command, stdout=writer)) as proxy,
            watch(stdin=reader) as session,
        ):
            os.close(reader)
            os.close(writer)
            rows = session.wait_for("NOTE  md: Timestamps may leave", "strip sysctl", " preserve")
            assert names_of(rows) == ["oe-primary", "md"]
            clean_one.sysctl("tcp_timestamps", "1")
            rows = session.wait_for("ALARM oe-primary refuses new connections: not held since", "!oe-primary")
            assert " REFUSED " in table_of(rows)["oe-primary"] and " preserve" in table_of(rows)["md"]
            clean_one.sysctl("tcp_timestamps", "0")
            session.wait_for("NOTE  2 of 2 routes with a note: oe-primary, md", "*oe-primary")
            proxy.stop()
            session.wait_for("END OF INPUT", "stopped")
            session.press(b"q")
            assert_given_back(session, 0)


@pytest.mark.root
def test_a_drift_raises_the_alarm_and_its_end_is_told() -> None:
    clean_one = Namespace(tcp_timestamps="0")
    try:
        with clean_one:
            far = Exchange()
            command = ["nsenter", f"--net={clean_one.path}", "--", *CHECKOUT]
        with piped("-t", far.target, command=command) as (session, proxy):
            session.wait_for("OK    No TCP timestamp has left", "strip by sysctl", "latency, ")
            clean_one.sysctl("tcp_timestamps", "1")
            session.wait_for("ALARM The policy does not hold since", "drifts 1", "drift   new connections are refused")
            clean_one.sysctl("tcp_timestamps", "0")
            session.wait_for("NOTE  No timestamp negotiated; the policy did not hold", "drift   the policy holds again")
            proxy.stop()
            session.wait_for("END OF INPUT", "stopped")
            session.press(b"q")
            assert_given_back(session, 0)
        far.close()
    finally:
        clean_one.close()
