"""JSON lines: the same bytes from both encoders, never more than a pipe takes at once, whatever the texts are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Dict, List

import pytest
from _tsproxy.stats import encoder
from _tsproxy.stats.encoder import Stamps, line, with_json
from harness import ROOT, examples
from hypothesis import example, given, settings
from hypothesis import strategies as st

unhurried = settings(deadline=None)
Fields = Dict[str, Any]
needs_orjson = pytest.mark.skipif(
    encoder.ENCODER != "orjson", reason="LOUD: no orjson: that both write the same is NOT tested here"
)

SOUND = st.text(st.characters(exclude_categories=["Cs"]))
ANY_TEXT = st.text(st.characters())  # lone surrogates too
FLOATS = st.floats(-(10**9), 10**9).map(lambda value: round(value, 3))
INTEGERS = st.integers(-(2**63), 2**64 - 1)
SCALARS = INTEGERS | FLOATS | st.booleans() | st.none()
NAMES = st.from_regex(r"[a-z][a-z0-9_]{0,30}", fullmatch=True)
SOUND_FIELDS = st.dictionaries(NAMES, SCALARS | SOUND | st.lists(SOUND, max_size=5), max_size=12)
ANY_FIELDS = st.dictionaries(NAMES, SCALARS | ANY_TEXT | st.lists(ANY_TEXT | SCALARS, max_size=5), max_size=12)
EVERY_CONTROL = "".join(map(chr, [*range(0x20), 0x7F, *range(0x80, 0xA0), 0x2028, 0x2029, 0xFEFF, 0xFFFF])) + '"\\/'


def without_surrogates(value: Any) -> Any:
    """What a reader gets for a value."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    return [without_surrogates(item) for item in value] if isinstance(value, (list, tuple)) else value


# The two encoders


@needs_orjson
@unhurried
@given(SOUND_FIELDS)
@example({"text": EVERY_CONTROL})
@example({"text": "\U0001f600\u00e9\u4e2d"})
@example({"low": -(2**63), "high": 2**64 - 1, "zero": -0.0, "none": None, "yes": True, "time": 1073741824.0, "short": 0.25})
@example({"beyond": 2**64, "below": -(2**63) - 1, "far": 3 * 2**70})
@example({})
@example({"list": []})
def test_both_encoders_write_the_same_bytes(fields: Fields) -> None:
    assert encoder.with_orjson(fields) == with_json(fields)


@unhurried
@given(SOUND_FIELDS)
@example({"text": EVERY_CONTROL, "beyond": 2**64})
def test_what_json_wrote_is_read_as_it_was(fields: Fields) -> None:
    assert json.loads(with_json(fields)) == fields


def test_the_program_runs_and_writes_the_same_without_orjson(tmp_path: Path) -> None:
    (tmp_path / "orjson.py").write_text("raise ImportError('not for this Python')\n")
    fields = {"text": EVERY_CONTROL + "\u00e9", "number": 2**63, "none": None, "list": ["a", "\udcff"], "long": "x" * 9000}
    code = f"from _tsproxy.stats import encoder; print(encoder.ENCODER); print(encoder.line({fields!a}))"
    path = os.pathsep.join([str(tmp_path), str(ROOT / "lib")])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.stdout == f"json\n{line(fields)!r}\n"


# Lines


@unhurried
@given(ANY_FIELDS)
@example({"name": "\udcff"})
@example({"name": ["\ud800", "\udc00", "a"]})
@example({"name": "\ud83d\ude00"})  # two halves are no whole
def test_a_line_says_what_it_was_given_and_ends_in_its_only_newline(fields: Fields) -> None:
    made = line(fields)
    assert made.endswith(b"}\n")
    assert made.count(b"\n") == 1
    assert json.loads(made) == {name: without_surrogates(value) for name, value in fields.items()}


LENGTHS = st.integers(0, 12).flatmap(lambda bits: st.integers(0, 2**bits))
LONG_TEXTS = st.builds(lambda text, times: text * times, ANY_TEXT.filter(bool), LENGTHS)
LONG_LISTS = st.lists(LONG_TEXTS, max_size=9) | st.builds(lambda text, times: [text] * times, ANY_TEXT, LENGTHS)
LONG_FIELDS = st.dictionaries(NAMES, LONG_TEXTS | LONG_LISTS | SCALARS, max_size=12)


@settings(unhurried, max_examples=examples(300))
@given(LONG_FIELDS)
@example({"targets": ["x" * 1000] * 7})
@example({"targets": ["x" * 9000]})
@example({"targets": ["x" * 9000, "y"]})
@example({"targets": [["x" * 9000], 1]})
@example({"targets": ["\0"] * 4000, "message": "\0" * 4000})
@example({f"name_{number}": "1234567" for number in range(600)})
@example({f"name_{number}": 2**63 for number in range(600)})
@example({f"name_{number}": ["ab", "c"] for number in range(600)})
@example({"text": "\0" * 8 + "a" * 4080})
@example({"text": "\U0001f600" * 1022})
def test_a_line_is_never_longer_than_a_pipe_takes_at_once(fields: Fields) -> None:
    made = line(fields)
    assert len(made) <= 4096
    assert made.endswith(b"}\n")
    assert made.count(b"\n") == 1
    back = json.loads(made)
    assert list(back) == list(fields)[: len(back)]


@pytest.mark.parametrize("length", range(4080, 4100))
def test_a_text_is_cut_only_when_the_line_would_be_too_long(length: int) -> None:
    made = line({"x": "a" * length})
    whole = len('{"x":""}\n') + length
    assert (len(made) == whole) is (whole <= 4096)
    assert (json.loads(made)["x"] == "a" * length) is (whole <= 4096)


def test_only_the_longest_text_is_cut_and_the_cut_is_marked() -> None:
    fields = {"event": "error", "pid": 1, "message": "m" * 9000, "targets": ["a:1"] * 20, "worker": 3}
    back = json.loads(line(fields))
    assert {name: back[name] for name in fields if name != "message"} == {n: v for n, v in fields.items() if n != "message"}
    assert back["message"].lstrip("m") == "..."
    assert len(back["message"]) > 1000


def test_a_list_keeps_its_first_items_and_says_that_there_were_more() -> None:
    items = [f"exchange-{number}.example:443" for number in range(500)]
    back = json.loads(line({"event": "start", "targets": items, "version": "1"}))
    assert back["targets"] == [*items[: len(back["targets"]) - 1], "..."]
    assert len(back["targets"]) > 20
    assert back["version"] == "1"


def test_a_list_loses_no_more_than_there_is_no_room_for() -> None:
    knobs = [f"knob_{number}={number}" for number in range(20)]
    allow = "allow=" + ",".join(f"10.{number}.0.0/16" for number in range(256))
    back = json.loads(line({"event": "start", "knobs": [*knobs[:10], allow, *knobs[10:]], "limits": knobs}))
    assert [knob for knob in back["knobs"] if not knob.startswith("allow=")] == knobs
    assert back["limits"] == knobs
    made = line({"targets": [f"exchange-{number}.example:443" for number in range(200)], "limits": knobs})
    assert 4096 - 64 <= len(made) <= 4096
    assert 4096 - 16 <= len(line({"message": "m" * 5000})) <= 4096


def test_numbers_stay_whole_beside_texts_that_are_cut() -> None:
    numbers = {f"counter_{number}": 2**63 - number for number in range(60)}
    back = json.loads(line({**numbers, "message": "x" * 5000}))
    assert {name: back[name] for name in numbers} == numbers


@given(st.lists(ANY_TEXT, max_size=4))
def test_a_tuple_is_written_as_a_list(texts: List[str]) -> None:
    assert line({"x": tuple(texts)}) == line({"x": texts})


def test_a_line_does_not_change_the_fields_it_was_given() -> None:
    fields = {"text": "x" * 9000, "list": ["\udcff"]}
    line(fields)
    assert fields == {"text": "x" * 9000, "list": ["\udcff"]}


# Times


@given(st.integers(0, 253_402_300_799_999_999_999))
@example(0)
@example(999)
@example(1_700_000_000_000_000_000)
@example(1_699_999_999_999_999_999)
@example(951_827_696_000_001_000)
def test_a_time_is_utc_with_six_digits_rounded_down(at_ns: int) -> None:
    text = Stamps().rfc3339(at_ns)
    micros = datetime(1970, 1, 1, tzinfo=timezone.utc) + timedelta(microseconds=at_ns // 1000)
    assert datetime.strptime(text, "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=timezone.utc) == micros
    assert len(text) == len("2001-02-03T04:05:06.123456Z")


@given(st.integers(0, 2**62), st.integers(0, 2**62))
def test_times_sort_as_their_texts_do(one: int, other: int) -> None:
    assert (Stamps().rfc3339(one) < Stamps().rfc3339(other)) is (one // 1000 < other // 1000)


@given(st.lists(st.integers(0, 2**33), min_size=2))
def test_a_time_does_not_depend_on_the_ones_before(moments: List[int]) -> None:
    stamps = Stamps()
    assert [stamps.rfc3339(at_ns) for at_ns in moments] == [Stamps().rfc3339(at_ns) for at_ns in moments]


def test_the_time_does_not_depend_on_the_time_zone() -> None:
    code = "from _tsproxy.stats.encoder import Stamps; print(Stamps().rfc3339(1_700_000_000_123_456_789))"
    environment = {**os.environ, "TZ": "Asia/Kathmandu", "PYTHONPATH": str(ROOT / "lib")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "2023-11-14T22:13:20.123456Z\n"
