"""`audit --lines`: what tsproxy's JSON lines claim, held against a capture."""

from __future__ import annotations

import datetime
import gzip
import json
import subprocess
import tracemalloc
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import pytest
from _tsproxy.tools.audit.lines import Lines
from audit_captures import BEGIN, SECOND, End, flow, write
from harness import CHECKOUT
from hypothesis import given, settings
from hypothesis import strategies as st

PROXY, EXCHANGE, CLIENT = "10.2.0.1", ("10.2.0.2", 443), "10.1.0.1"
LEAKING = tuple(1000 + 1000 * second for second in range(4))
CONSTANT = (7,) * 4


def stamp(ns: int) -> str:
    return f"{datetime.datetime(1970, 1, 1) + datetime.timedelta(microseconds=ns // 1000):%Y-%m-%dT%H:%M:%S.%f}Z"


def connection(port: int, begin: int = BEGIN, seconds: float = 3.5, **fields: Any) -> Dict[str, Any]:
    """A `connection` line of tsproxy's, with the fields that tell where and when it was."""
    return {
        "timestamp": stamp(begin + round(seconds * SECOND)),
        "event": "connection",
        "pid": 17,
        "client_address": CLIENT,
        "client_port": port,
        "upstream_address": EXCHANGE[0],
        "upstream_port": EXCHANGE[1],
        "upstream_local_address": PROXY,
        "upstream_local_port": port,
        "duration_us": round(seconds * 1_000_000),
        "upstream_timestamps": False,
        **fields,
    }


def start(mode: str, pid: int = 17) -> Dict[str, Any]:
    return {"timestamp": stamp(BEGIN), "event": "start", "pid": pid, "timestamps": mode}


def seen(port: int, begin: int = BEGIN, tsvals: Sequence[Optional[int]] = (None,) * 4, **more: Any) -> List[Any]:
    return flow((PROXY, port), EXCHANGE, begin, tsvals, **more)


def packed(lines: Sequence[Dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def run(*words: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run([*CHECKOUT, "audit", *words], input=stdin, capture_output=True, check=False)
    assert b"Traceback" not in done.stderr
    return done


@pytest.fixture
def counts(tmp_path: Path) -> Any:
    """The four counts of a capture and lines."""

    def of(segments: Sequence[Any], lines: Sequence[Dict[str, Any]], *options: str) -> Tuple[int, ...]:
        capture, told = write(tmp_path / "pcap", segments), tmp_path / "lines"
        told.write_bytes(packed(lines))
        done = run(str(capture), f"--lines={told}", "--json", *options)
        end = json.loads(done.stdout.splitlines()[-1])
        names = ("claimed_clean_seen_clean", "claimed_clean_seen_leaking", "claimed_not_seen", "seen_not_claimed")
        return tuple(end[name] for name in names)

    return of


def test_each_kind_of_agreement_is_counted(counts: Any) -> None:
    segments = [*seen(1), *seen(2), *seen(3, tsvals=LEAKING), *seen(5)]
    assert counts(segments, [connection(port) for port in (1, 2, 3, 4)]) == (2, 1, 1, 1)


def test_without_lines_there_are_no_counts(tmp_path: Path) -> None:
    done = run(str(write(tmp_path / "pcap", seen(1))), "--json")
    assert b"claimed" not in done.stdout
    assert done.returncode == 0


# Time: ports are reused


def test_a_line_of_another_hour_is_of_another_connection_with_the_same_ports(counts: Any) -> None:
    assert counts(seen(1), [connection(1, BEGIN - 3600 * SECOND)]) == (0, 0, 1, 1)


def test_each_line_belongs_to_the_connection_of_its_time_where_ports_are_reused(counts: Any) -> None:
    """At once, as they are where many connections are made to one exchange; the lines come in any order."""
    again = BEGIN + 5 * SECOND
    segments = [*seen(1), *seen(1, again, LEAKING, sequence=9000)]
    lines = [connection(1, again, upstream_timestamps=True), connection(1)]
    assert counts(segments, lines) == (1, 0, 0, 0)
    assert counts(segments, lines[::-1]) == (1, 0, 0, 0)
    assert counts(segments, lines[1:]) == (1, 0, 0, 1)
    assert counts(segments, [connection(1, again)]) == (0, 1, 0, 1)


def test_two_lines_are_not_both_of_one_connection(counts: Any) -> None:
    assert counts(seen(1), [connection(1), connection(1, BEGIN + SECOND)]) == (1, 0, 1, 0)


def test_the_clocks_of_the_tap_and_of_the_host_may_differ_by_seconds(counts: Any) -> None:
    assert counts(seen(1, BEGIN + 4 * SECOND), [connection(1, seconds=0.5)]) == (1, 0, 0, 0)


# Which flows are of a claimed connection


def test_the_clients_leg_and_the_answers_are_of_the_claimed_connection(counts: Any) -> None:
    listener: End = (CLIENT[:-1] + "2", 8080)
    legs = [*seen(1), *flow(EXCHANGE, (PROXY, 1)), *flow((CLIENT, 1), listener, tsvals=LEAKING), *flow(listener, (CLIENT, 1))]
    assert counts(legs, [connection(1)]) == (1, 0, 0, 0)


def test_both_directions_of_an_unclaimed_connection_are_one(counts: Any) -> None:
    assert counts([*seen(9), *flow(EXCHANGE, (PROXY, 9))], []) == (0, 0, 0, 1)


def test_what_is_not_judged_is_not_missed(counts: Any) -> None:
    lines = [connection(1), connection(2, upstream_address="10.2.0.3")]
    segments = [*seen(1), *seen(9)]
    assert counts(segments, lines, "-t", "10.2.0.2:443") == (1, 0, 0, 1)
    assert counts(segments, lines, "--from=10.2.0.0/31", "-t", "10.2.0.3:443") == (0, 0, 1, 0)
    assert counts(segments, lines, "--from=10.9.0.0/16") == (0, 0, 0, 0)


def test_ipv6_addresses_are_joined_however_they_are_spelled(counts: Any) -> None:
    line = connection(1, upstream_local_address="fd02:0::1", upstream_address="FD02::2")
    assert counts(flow(("fd02::1", 1), ("fd02::2", 443)), [line]) == (1, 0, 0, 0)
    line = connection(1, upstream_local_address=f"::ffff:{PROXY}", upstream_address=f"::ffff:{EXCHANGE[0]}")
    assert counts(seen(1), [line]) == (1, 0, 0, 0)


def test_an_undecided_flow_is_neither_clean_nor_leaking_nor_unseen(counts: Any) -> None:
    assert counts(seen(1)[1:], [connection(1)]) == (0, 0, 0, 0)


# What is claimed


def test_a_constant_is_what_rewrite_claims(counts: Any) -> None:
    stamped = connection(1, upstream_timestamps=True)
    assert counts(seen(1, tsvals=CONSTANT), [start("rewrite"), stamped]) == (1, 0, 0, 0)
    assert counts(seen(1, tsvals=LEAKING), [start("rewrite"), stamped]) == (0, 1, 0, 0)
    assert counts(seen(1, tsvals=LEAKING), [start("preserve"), stamped]) == (0, 0, 0, 0)


def test_where_the_start_line_was_rotated_away_a_constant_is_no_contradiction(counts: Any) -> None:
    stamped = connection(1, upstream_timestamps=True)
    assert counts(seen(1, tsvals=CONSTANT), [stamped]) == (1, 0, 0, 0)
    assert counts(seen(1, tsvals=LEAKING), [stamped]) == (0, 0, 0, 0)
    assert counts(seen(2), [stamped]) == (0, 0, 1, 1)


def test_each_process_has_its_own_mode_and_the_latest_start_counts(counts: Any) -> None:
    lines = [
        start("rewrite", pid=1), start("preserve", pid=2), start("preserve", pid=3), start("rewrite", pid=3),
        *(connection(pid, pid=pid, upstream_timestamps=True) for pid in (1, 2, 3)),
    ]  # fmt: skip
    segments = [segment for port in (1, 2, 3) for segment in seen(port, tsvals=CONSTANT)]
    assert counts(segments, lines) == (2, 0, 0, 0)


def of_route(name: str, mode: str, pid: int = 17) -> Dict[str, Any]:
    return {"timestamp": stamp(BEGIN), "event": "route", "pid": pid, "route": name, "timestamps": mode}


def start_of_routes(pid: int = 17) -> Dict[str, Any]:
    return {"timestamp": stamp(BEGIN), "event": "start", "pid": pid, "routes": 2}


def test_each_route_has_its_own_mode_as_its_line_says_and_not_the_start_line(counts: Any) -> None:
    segments = [segment for port in (1, 2, 3) for segment in seen(port, tsvals=CONSTANT)]
    stamped = [connection(port, upstream_timestamps=True, route=name) for port, name in enumerate("abb", 1)]
    modes = [of_route("a", "rewrite"), of_route("b", "preserve")]
    assert counts(segments, [start_of_routes(), *modes, *stamped]) == (1, 0, 0, 0)
    assert counts(segments, [start_of_routes(), *modes[::-1], *stamped]) == (1, 0, 0, 0)
    assert counts(segments, [start_of_routes(), *(of_route(name, "rewrite") for name in "ab"), *stamped]) == (3, 0, 0, 0)


def test_routes_of_one_name_in_two_processes_have_a_mode_each_and_the_latest_lines_count(counts: Any) -> None:
    lines = [
        start_of_routes(1), of_route("a", "rewrite", 1), start_of_routes(2), of_route("a", "preserve", 2),
        start_of_routes(3), of_route("a", "preserve", 3), start_of_routes(3), of_route("a", "rewrite", 3),
        *(connection(pid, pid=pid, upstream_timestamps=True, route="a") for pid in (1, 2, 3)),
    ]  # fmt: skip
    segments = [segment for port in (1, 2, 3) for segment in seen(port, tsvals=CONSTANT)]
    assert counts(segments, lines) == (2, 0, 0, 0)


def test_a_route_whose_line_was_rotated_away_contradicts_no_constant_though_another_route_is_known(counts: Any) -> None:
    stamped = connection(1, upstream_timestamps=True, route="b")
    lines = [start_of_routes(), of_route("b", "preserve"), start_of_routes(), of_route("a", "preserve"), stamped]
    assert counts(seen(1, tsvals=CONSTANT), lines) == (1, 0, 0, 0)  # of an earlier start the `route` lines are no more
    assert counts(seen(1, tsvals=LEAKING), lines) == (0, 0, 0, 0)


def test_lines_of_routes_are_other_events_and_their_connections_are_joined(counts: Any, tmp_path: Path) -> None:
    others = [{"event": "reload", "pid": 17}, {"event": "metrics", "pid": 17, "route": None}]
    lines = [start_of_routes(), of_route("a", "strip"), *others, connection(1, route="a"), connection(2, route="a")]
    assert counts([*seen(1), *seen(2, tsvals=LEAKING)], lines) == (1, 1, 0, 0)
    reader = Lines(str(tmp_path / "lines"))
    assert len(list(reader)) == 2 and reader.skipped == {"other": 4}


def test_a_line_that_saw_no_handshake_claims_nothing(counts: Any) -> None:
    assert counts(seen(1), [connection(1, upstream_timestamps=None)]) == (0, 0, 0, 0)
    assert counts(seen(1), [connection(2, upstream_timestamps=None)]) == (0, 0, 0, 1)


# Files


@pytest.mark.parametrize("form", ["plain", "gzip", "two gzips", "standard input", "standard input, gzip"])
def test_lines_come_from_files_that_are_rotated_packed_and_joined(form: str, tmp_path: Path) -> None:
    capture, told = write(tmp_path / "pcap", [*seen(1), *seen(2)]), tmp_path / "lines"
    halves = [packed([start("strip"), connection(1)]), packed([start("strip"), connection(2), {"event": "stop"}])]
    content = (
        b"".join(halves)
        if "gzip" not in form
        else b"".join(map(gzip.compress, halves if "two" in form else [b"".join(halves)]))
    )
    told.write_bytes(content)
    path = "-" if "input" in form else str(told)
    done = run(str(capture), f"--lines={path}", "--json", stdin=content)
    end = json.loads(done.stdout.splitlines()[-1])
    assert (end["claimed_clean_seen_clean"], end["claimed_not_seen"], end["seen_not_claimed"]) == (2, 0, 0)


def test_what_is_no_line_of_a_connection_is_skipped_and_counted(tmp_path: Path) -> None:
    capture, told = write(tmp_path / "pcap", seen(1)), tmp_path / "lines"
    old = {name: value for name, value in connection(3).items() if "local" not in name}
    nowhere = connection(4, upstream_address=None, upstream_port=None, upstream_local_address=None, upstream_local_port=None)
    junk = [b"no JSON", b"[]", b"1", b'{"event":', b"\xff\xfe", b"[" * 100_000, b"x" * 300_000, b'{"event":"connection"}']
    wrong = [connection(1, timestamp="yesterday"), connection(1, duration_us="long"), connection(1, upstream_port="443")]
    other = [start("strip"), {"event": "metrics"}, {"event": "stop"}]
    told.write_bytes(b"\n".join([*junk, b"", packed([*wrong, *other, old, nowhere, connection(1)])]))
    done = run(str(capture), f"--lines={told}")
    words = " ".join(done.stdout.decode().split())
    for text in (
        "claimed clean and seen clean 1",
        "claimed and not seen 0",
        "lines of other events 3",
        "lines without both ends 3",
        "lines that can't be read 10",
    ):
        assert text in words
    assert all(len(line) <= 80 for line in done.stdout.decode().splitlines() if str(told) not in line)


def test_the_table_names_what_contradicts_a_claim_and_says_which_claims_could_not_be_seen(tmp_path: Path) -> None:
    capture, told = write(tmp_path / "pcap", [*seen(1, tsvals=LEAKING), *seen(2)]), tmp_path / "lines"
    told.write_bytes(packed([connection(1), connection(3), connection(4, BEGIN - 3600 * SECOND)]))
    done = run(str(capture), f"--lines={told}")
    lines = done.stdout.decode().splitlines()
    assert f"Beside the lines of {told}" in lines
    assert "  claimed clean and seen leaking        1" in lines
    assert "  claimed and not seen                  2, 1 of them before or after the capture" in lines
    assert "    10.2.0.1:1 to 10.2.0.2:443, first in frame 1" in lines
    assert "    10.2.0.1:2 to 10.2.0.2:443" in lines
    assert lines[-1].startswith("LEAK: ")
    assert done.returncode == 78


@pytest.mark.parametrize("case", ["missing", "directory", "damaged gzip", "cut gzip", "twice standard input"])
def test_a_file_of_lines_that_can_not_be_read_is_one_line_and_exit_2(case: str, tmp_path: Path) -> None:
    capture, told = write(tmp_path / "pcap", seen(1)), tmp_path / "lines"
    content = gzip.compress(packed([connection(port) for port in range(1, 200)]))
    if case != "missing":
        told.write_bytes(content[:-9] if case == "cut gzip" else content[:12] + b"\0\1\2" + content[15:])
    path = {"directory": str(tmp_path), "twice standard input": "-"}.get(case, str(told))
    done = run("-" if path == "-" else str(capture), f"--lines={path}", stdin=capture.read_bytes())
    assert done.returncode == 2
    assert done.stdout == b""
    line = done.stderr.decode()
    assert line.startswith(f"tsproxy.py: --lines: given {path!r}")
    assert "allowed: " in line
    assert line.count("\n") == 1


def test_a_file_without_a_line_break_is_not_kept_in_memory(tmp_path: Path) -> None:
    told = tmp_path / "lines"
    told.write_bytes(b"x" * (16 << 20))
    tracemalloc.start()
    lines = Lines(str(told))
    assert list(lines) == []
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert lines.skipped == {"unreadable": 1}
    assert peak < 4 << 20


@settings(deadline=None)  # a machine that tests share
@given(st.binary(max_size=400) | st.text(max_size=200).map(str.encode))
def test_any_bytes_are_lines_that_claim_nothing(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any lines"
    path.write_bytes(b"x" + data)
    lines = Lines(str(path))
    assert list(lines) == []
    assert sum(lines.skipped.values()) == len([line for line in (b"x" + data).split(b"\n") if line])


@pytest.mark.parametrize("value", [None, 7, [], {}, "X" * 99])
def test_a_route_line_with_any_values_claims_nothing_and_does_not_raise(value: Any, tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(packed([{"event": "route", name: value} for name in ("route", "pid", "timestamps")]))
    lines = Lines(str(path))
    assert list(lines) == [] and lines.skipped == {"other": 3}


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers(), max_size=2)


@settings(deadline=None)  # a machine that tests share
@given(st.dictionaries(st.sampled_from([*connection(1), "route"]), VALUES))
def test_any_values_of_a_connections_fields_give_a_claim_or_are_counted(
    tmp_path_factory: pytest.TempPathFactory, fields: Dict[str, Any]
) -> None:
    path = tmp_path_factory.getbasetemp() / "any fields"
    path.write_bytes(packed([{**connection(1), **fields}]))
    lines = Lines(str(path))
    assert len(list(lines)) + sum(lines.skipped.values()) == 1
