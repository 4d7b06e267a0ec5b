"""The table of a process's routes: those in trouble stand on top, and what does not fit is counted.

Knows what tells one route from another, and what of it is worth a column when columns are few. Knows nothing of the rest of
the screen.
"""

from __future__ import annotations

from typing import Iterator, List, NamedTuple, Optional, Sequence, Tuple

from _tsproxy.stats.histogram import LIMITS_US
from _tsproxy.tools.terminal import BOLD, DIM, GREEN, RED, YELLOW
from _tsproxy.tools.top import verdict, words
from _tsproxy.tools.top.lines import moment
from _tsproxy.tools.top.model import Interval, Process, Route, Trouble
from _tsproxy.tools.top.rows import PLAIN, Column, Row, heading, middle, shorten
from _tsproxy.tools.top.verdict import Grade

_FRESH_S = 60  # for so long after its trouble a route stands on top
_NAME, _MOST_NAME = 14, 24  # columns
_POLICY = 17
_ROOMY = 112  # columns from which on the last trouble has its own
_MARKS = {Grade.BAD: "!", Grade.OPEN: "?", Grade.NOTE: "*", Grade.GOOD: " "}  # where there are no colours, too
_COLOURS = {Grade.BAD: RED, Grade.OPEN: YELLOW, Grade.NOTE: YELLOW, Grade.GOOD: GREEN}


_COLUMNS = (
    Column("listener", 21, 136),
    Column("port", 6, 58),
    Column("upstream", 24, 172),
    Column("active", 6, 0),
    Column("of", 6, 124),
    Column("new/s", 6, 50),
    Column("in/s", 7, 72),
    Column("out/s", 7, 80),
    Column("segs/s", 7, 120),
    Column("p99", 8, 34),
)
_LEFT = ("listener", "upstream")


class Ranked(NamedTuple):
    """A route as it stands in the table: the lower `order`, the higher."""

    order: int
    route: Route
    judged: verdict.Verdict
    trouble: Optional[Trouble]  # one that is fresh


def ranked(process: Process, last_at: str) -> List[Ranked]:
    """The routes, those in trouble first, else in the order of the file: so they keep their places while all is well."""
    return sorted((_ranked(route, last_at) for route in process.routes), key=lambda one: one.order)


def _ranked(route: Route, last_at: str) -> Ranked:
    judged, trouble = verdict.judge(route), route.trouble
    then, now = moment(trouble.at) if trouble else None, moment(last_at)
    fresh = trouble if then is not None and now is not None and now - then <= _FRESH_S else None
    if judged.grade is Grade.BAD:
        order = 0
    elif fresh:
        order = 1 if fresh.level == "error" else 2
    else:
        order = 3 if judged.grade is Grade.OPEN or _was_bad(route, judged) else 4
    return Ranked(order, route, judged, fresh)


def _was_bad(route: Route, judged: verdict.Verdict) -> bool:
    """Whether a note is about what happened, and not about what was asked for."""
    return judged.grade is Grade.NOTE and verdict.mode_of(route) != "preserve" and route.witness != "trusted"


def rows(process: Process, shown: Sequence[Ranked], title: str, columns: int) -> Iterator[Row]:
    """The heading, the process's own row, then each of these routes."""
    layout = _layout(process, columns)
    width = _name_width(process, layout, columns)
    yield _heading(layout, width, title, columns)
    yield _whole(process, layout, width)
    for one in shown:
        yield _row(one, layout, width, columns)


def _layout(process: Process, columns: int) -> List[Column]:
    has_segments = any(route.metrics and route.metrics.segments_per_s is not None for route in process.routes)
    names = {column.name for column in _COLUMNS if columns >= column.need}
    names -= {"port"} if "listener" in names else set()
    names -= set() if has_segments else {"segs/s"}
    return [column for column in _COLUMNS if column.name in names]


def _name_width(process: Process, layout: Sequence[Column], columns: int) -> int:
    """As long as the longest name, as far as what else there is leaves room."""
    others = sum(column.width + 1 for column in layout) + 2 + _POLICY + (26 if columns >= _ROOMY else 0)
    longest = max((len(route.name) for route in process.routes), default=0)
    return min(max(_NAME, longest), _MOST_NAME, max(_NAME, columns - others))


def _heading(layout: Sequence[Column], width: int, title: str, columns: int) -> Row:
    names, at = [(3, title)], 1 + width
    for column in layout:
        begin = at + 1 if column.name in _LEFT else -(at + 1 + column.width)
        at += 1 + column.width
        if column.name != "port" and at - len(column.name) > len(title) + 4:
            names.append((begin, column.name))
    names.append((at + 1, "policy"))
    if columns >= _ROOMY:
        names.append((at + _POLICY + 2, "last trouble"))
    return heading(columns, *names)


def _cells(layout: Sequence[Column], values: Sequence[Tuple[str, str]]) -> str:
    texts = dict(values)
    return "".join(f" {_cell(column, texts.get(column.name, ''))}" for column in layout)


def _cell(column: Column, text: str) -> str:
    width = column.width
    return f"{middle(text, width):<{width}}" if column.name in _LEFT else f"{text[:width]:>{width}}"


def _figures(last: Optional[Interval], segments: Optional[float]) -> List[Tuple[str, str]]:
    """What a process has as well as a route."""
    p99 = last.relay.p99 if last and last.relay else None
    return [
        ("new/s", words.UNKNOWN if last is None or last.cx_per_s is None else words.scaled(last.cx_per_s, "")),
        ("in/s", words.scaled(last.rx_per_s if last else None, "B")),
        ("out/s", words.scaled(last.tx_per_s if last else None, "B")),
        ("segs/s", words.scaled(segments, "")),
        ("p99", words.at_most(p99, "≤", LIMITS_US[-1])),
    ]


def _whole(process: Process, layout: Sequence[Column], width: int) -> Row:
    segments = process.metrics.segments_per_s if process.metrics else None
    active = words.few(process.count("downstream_cx_active"))
    figures = _cells(layout, [("active", active), *_figures(process.last, segments)])
    return [(f" {'process':<{width}}{figures}", BOLD)]


def _row(one: Ranked, layout: Sequence[Column], width: int, columns: int) -> Row:
    route, start = one.route, one.route.start
    listener = start.listening if start else ""
    values = [
        ("listener", listener or words.UNKNOWN),
        ("port", f":{listener.rpartition(':')[2]}" if listener else words.UNKNOWN),
        ("upstream", (start.targets if start else "") or words.UNKNOWN),
        ("active", words.few(route.count("downstream_cx_active"))),
        ("of", words.few(start.max_connections if start else None)),
        *_figures(route.last, route.metrics.segments_per_s if route.metrics else None),
    ]
    name = f"{_MARKS[one.judged.grade]}{middle(route.name, width):<{width}}"
    colour = _COLOURS[one.judged.grade] if one.judged.grade is not Grade.GOOD else PLAIN
    row = [(name, colour), (f"{_cells(layout, values)} ", PLAIN), *_state(one, columns)]
    text, code = row[-1]
    return [*row[:-1], (shorten(text.rstrip(), columns - sum(len(before) for before, _ in row[:-1])), code)]


def _state(one: Ranked, columns: int) -> Row:
    """The policy, and the last trouble; where there is no room for both, that there is a fresh one in the policy's place."""
    policy = (f"{shorten(_policy(one), _POLICY):<{_POLICY}} ", _COLOURS[one.judged.grade])
    trouble = one.route.trouble
    if columns >= _ROOMY:
        if trouble is None:
            return [policy]
        return [policy, (f"{trouble.at[11:19]} {_words(trouble)}", _LEVELS[trouble.level] if one.trouble else DIM)]
    if one.trouble is None or one.judged.grade is Grade.BAD:
        return [policy]
    text = _words(one.trouble) if one.trouble.grown else f"{one.trouble.level:<7} {one.trouble.at[11:19]}"
    return [(text, _LEVELS[one.trouble.level])]


_LEVELS = {"error": RED, "warning": YELLOW}


def _words(trouble: Trouble) -> str:
    return f"{words.count(trouble.grown)} {trouble.text}" if trouble.grown else trouble.text


def _policy(one: Ranked) -> str:
    """What leaves, and what that rests on; or since when new connections are refused."""
    route = one.route
    if route.drifted_since:
        return f"REFUSED {route.drifted_since[11:19]}"
    if one.judged.grade is Grade.BAD:
        return f"{words.few(verdict.stamped(route))} WITH TSOPT"
    mode = verdict.mode_of(route)
    if not mode:
        return "not known"
    return mode if mode == "preserve" or not route.witness else f"{mode} {route.witness}"
