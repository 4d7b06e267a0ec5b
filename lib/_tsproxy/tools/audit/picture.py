"""`--svg`: TSval against time. A lane for each clock, in its colour; in it each flow is a line, on the clock's own line.

Flows that share a clock lie on one line, though their ports, addresses and times differ: that is what an observer sees.
A lane has its own scale, since the offsets of two clocks differ by up to 2^32 ticks; a second is equally wide in all.

Knows SVG 1.1, and colours that can be read on light and on dark (prefers-color-scheme). Knows nothing of segments.
"""

from __future__ import annotations

import datetime
import math
import os
from typing import Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple
from xml.sax.saxutils import escape

from _tsproxy.cli import exits
from _tsproxy.cli.config import UsageError
from _tsproxy.cli.exits import Exit
from _tsproxy.tools.audit import observer, verdict
from _tsproxy.tools.audit.clock import Clock
from _tsproxy.tools.audit.flows import Direction
from _tsproxy.tools.audit.observer import Learned
from _tsproxy.tools.audit.report import Report

_WIDTH, _LEFT, _RIGHT = 960, 104, 936
_TOP, _HEADING, _LANE, _BOTTOM = 122, 30, 104, 58
_INSET = 8  # of the lines in their lane
_MOST_LANES = 8
_MOST_POINTS = 40_000  # of all flows together
_MODULUS = 1 << 32
_LINES = (  # in turn, on light and on dark
    ("#0b62c4", "#6cb0ff"),
    ("#c2410c", "#ff9b5e"),
    ("#0f766e", "#4fd6c6"),
    ("#a21caf", "#e98bf5"),
    ("#7a5c00", "#e3c04b"),
    ("#4338ca", "#a5a3ff"),
    ("#be123c", "#ff8aa5"),
    ("#3f6212", "#a8d95b"),
)
_GOOD, _BAD, _OPEN = ("#15703a", "#6fdc97"), ("#b91c1c", "#ff8080"), ("#8a5a00", "#f0c04f")
_VERDICTS = {verdict.LEAK: _BAD, verdict.UNDECIDED: _OPEN, verdict.CONSTANT: _GOOD, verdict.CLEAN: _GOOD}
_INK, _DIM, _RULE, _GROUND = ("#1b1f24", "#eceff3"), ("#57606a", "#9aa4b0"), ("#d5dae0", "#39414b"), ("#ffffff", "#14181d")
_SHAPES = """.flow{fill:none;stroke-width:3;stroke-linecap:round;stroke-linejoin:round}
.clock{fill:none;stroke-width:1;stroke-dasharray:2 5}
.verdict{font-size:28px;font-weight:700}.name{font-weight:600}.number{font-size:11px}"""


class _Lane(NamedTuple):
    """`clock` and `flows` of one clock; without one, flows whose clock can't be told or has no lane of its own."""

    name: str
    rest: str
    colour: str
    clock: Optional[Clock]
    flows: Sequence[Direction]


class _Scale(NamedTuple):
    """Time to x: the same in all lanes."""

    first_ns: int
    last_ns: int

    def x(self, ns: int) -> float:
        """Where in the width."""
        share = (ns - self.first_ns) / max(1, self.last_ns - self.first_ns)
        return _LEFT + _INSET + share * (_RIGHT - _LEFT - 2 * _INSET)


def refuse(path: str) -> None:
    """UsageError now, before anything is read, for what is no place for a file."""
    place = path if os.path.exists(path) else os.path.dirname(path) or "."
    if path == "-" or os.path.isdir(path):
        raise _no_place(path, "it is a directory" if os.path.isdir(path) else "no standard output")
    if not os.access(place, os.W_OK):
        raise _no_place(path, "it can't be written" if os.path.exists(place) else "no such directory")


def write(path: str, report: Report) -> None:
    """UsageError if the file can't be opened, Exit 1 if not all can be written."""
    text = svg(report)
    try:
        file = open(path, "w", encoding="utf-8")
    except OSError as problem:
        raise _no_place(path, problem.strerror or str(problem)) from None
    try:
        with file:
            file.write(text)
    except OSError as problem:
        raise Exit(exits.FAILED, f"can't write {path!r}: {problem.strerror}") from None


def _no_place(path: str, why: str) -> UsageError:
    return UsageError(f"--svg: given {path!r}: {why}; allowed: a file that you may write")


def svg(report: Report) -> str:
    """The whole file. Each flow with TSopt is an element of class `flow`."""
    lanes = _lanes(report)
    height = _TOP + max(1, len(lanes)) * (_HEADING + _LANE) + _BOTTOM
    parts = [*_head(report, height), *_title(report, bool(lanes))]
    parts += _drawn(report, lanes, height - _BOTTOM) if lanes else []
    return "\n".join([*parts, "</svg>", ""])


def _head(report: Report, height: int) -> Iterator[str]:
    yield f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}"'
    yield " font-family=\"system-ui, 'Segoe UI', 'DejaVu Sans', Helvetica, Arial, sans-serif\" font-size=\"13\">"
    yield f"<title>{report.verdict}: TSval against time</title>"
    dark = f"@media (prefers-color-scheme: dark) {{\n{_colours(report, 1)}\n}}"
    yield f"<style>\n{_colours(report, 0)}\n{_SHAPES}\n{dark}\n</style>"
    yield f'<rect class="ground" width="{_WIDTH}" height="{height}"/>'


def _colours(report: Report, scheme: int) -> str:
    fills = {"ground": _GROUND, "ink": _INK, "dim": _DIM, "verdict": _VERDICTS[report.verdict]}
    strokes = {"rule": _RULE, "none": _DIM, **{f"line{place}": pair for place, pair in enumerate(_LINES)}}
    words = [f".{name}{{fill:{pair[scheme]}}}" for name, pair in fills.items()]
    words += [f".{name}{{stroke:{pair[scheme]}}}" for name, pair in strokes.items()]
    return "".join([*words, *(f".t{name}{{fill:{pair[scheme]}}}" for name, pair in strokes.items() if name != "rule")])


def _text(x: float, y: float, words: str, look: str = "ink", anchor: str = "start") -> str:
    return f'<text class="{look}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _title(report: Report, drawn: bool) -> Iterator[str]:
    stamped = sum(flow.segments_with_timestamps > 0 for flow in report.judged)
    segments = sum(flow.segments_with_timestamps for flow in report.judged)
    total = sum(flow.segments for flow in report.judged)
    flows = f"{stamped:,} of {len(report.judged):,} flows carried a timestamp"
    what = "TSval against time. A line: a flow; its mark: where it begins. A lane and a colour: one clock; dashed: where it is."
    yield _text(_LEFT, 46, report.verdict, "verdict")
    yield _text(_LEFT, 72, f"{flows}, in {segments:,} of {total:,} segments")
    yield _text(_LEFT, 94, what if drawn else "There is no TSval to be drawn.", "dim")


# Which flows are in which lane


def _lanes(report: Report) -> List[_Lane]:
    """The clocks with the most flows, in the order of their numbers; then what has no lane of its own."""
    clocks = _best(report.clocks)
    by_clock: Dict[int, List[Direction]] = {}
    constant: List[Direction] = []
    rest: List[Direction] = []
    for flow, learned in report.clocks.items():
        number = learned.clock_group
        if number is not None and number in clocks:
            by_clock.setdefault(number, []).append(flow)
        else:
            (constant if learned.clock_class == "constant" else rest).append(flow)
    numbers = sorted(by_clock, key=lambda number: (-len(by_clock[number]), number))
    shown, hidden = sorted(numbers[:_MOST_LANES]), numbers[_MOST_LANES:]
    others = [flow for number in hidden for flow in by_clock[number]]
    more = [
        ("constant", f"{_flows(constant)}, one TSval each: no clock to be seen", constant),
        (f"{len(hidden):,} more clocks", _flows(others), others),
        ("no clock told", f"{_flows(rest)}, too short or too strange", rest),
    ]
    lanes = [_of_clock(number, clocks[number], by_clock[number], place) for place, number in enumerate(shown)]
    return lanes + [_Lane(name, words, "none", None, flows) for name, words, flows in more if flows]


def _best(learned: Mapping[Direction, Learned]) -> Dict[Optional[int], Clock]:
    """Of each number the clock that is known best."""
    found: Dict[Optional[int], Clock] = {}
    for what in learned.values():
        if what.clock and what.clock.name and what.clock_group:
            found[what.clock_group] = min(
                found.get(what.clock_group, what.clock), what.clock, key=lambda clock: clock.hz_high - clock.hz_low
            )
    return found


def _of_clock(number: int, clock: Clock, flows: Sequence[Direction], place: int) -> _Lane:
    skew = observer.skew(clock)
    sources = list(dict.fromkeys(flow.source for flow in flows))
    more = f" and {len(sources) - 2} more" if len(sources) > 2 else ""
    words = f"{clock.name}, {f'skew: {skew}, ' if skew else ''}{_flows(flows)} from {', '.join(sources[:2])}{more}"
    return _Lane(f"clock {number}", words, f"line{place}", clock, flows)


def _flows(flows: Sequence[Direction]) -> str:
    return f"{len(flows):,} flow{'s' * (len(flows) != 1)}"


# Lines


def _drawn(report: Report, lanes: Sequence[_Lane], bottom: float) -> Iterator[str]:
    stamped = [flow for lane in lanes for flow in lane.flows]
    scale = _Scale(min(flow.first_ns for flow in report.judged), max(flow.last_ns for flow in report.judged))
    points = max(2, _MOST_POINTS // len(stamped))
    yield from _times(scale, bottom)
    for place, lane in enumerate(lanes):
        yield from _lane(lane, scale, _TOP + place * (_HEADING + _LANE), points)


def _lane(lane: _Lane, scale: _Scale, top: float, points: int) -> Iterator[str]:
    yield f'<text class="ink" x="{_LEFT}" y="{top + 21:.0f}"><tspan class="name t{lane.colour}">{lane.name}</tspan>'
    yield f'<tspan dx="10">{escape(lane.rest)}</tspan></text>'
    upper, lower = top + _HEADING, top + _HEADING + _LANE
    yield from (_rule(_LEFT, y, _RIGHT, y) for y in (upper, lower))
    values = {flow: _values(lane.clock, _few(flow.samples, points)) for flow in lane.flows}
    low, high = _range(lane.clock, scale, [value for pairs in values.values() for _, value in pairs])

    def y(value: float) -> float:
        share = (value - low) / (high - low) if high > low else 0.5
        return lower - _INSET - share * (_LANE - 2 * _INSET)

    yield from _marks(low, high, upper, lower)
    yield f'<g class="{lane.colour}">'
    if lane.clock:
        ends = [(scale.x(ns), y(_line(lane.clock, ns))) for ns in (scale.first_ns, scale.last_ns)]
        yield f'<path class="clock" d="{_path(ends)}"/>'
    for flow, pairs in values.items():
        path = _path([(scale.x(ns), y(value)) for ns, value in pairs], mark=6)
        yield f'<path class="flow" d="{path}"><title>{escape(_name(flow))}</title></path>'
    yield "</g>"


def _marks(low: float, high: float, upper: float, lower: float) -> Iterator[str]:
    """The TSvals at the top and at the bottom of a lane."""
    marks = [(high, upper + _INSET + 4), (low, lower - _INSET + 4)] if high > low else [(low, (upper + lower) / 2 + 4)]
    for value, y in marks:
        yield _text(_LEFT - 10, y, str(round(value) % _MODULUS), "number dim", "end")


def _line(clock: Clock, ns: int) -> float:
    """The clock's own TSval then, without wraps."""
    return clock.value + clock.hz * (ns - clock.at_ns) / 1e9


def _values(clock: Optional[Clock], samples: Sequence[Tuple[int, int]]) -> List[Tuple[int, float]]:
    """Times and TSvals, these as many wraps away as the clock's line."""
    if clock is None:
        return [(ns, float(tsval)) for ns, tsval in samples]
    lines = [_line(clock, ns) for ns, _ in samples]
    half = _MODULUS / 2
    return [(ns, line + (tsval - line + half) % _MODULUS - half) for (ns, tsval), line in zip(samples, lines)]


def _range(clock: Optional[Clock], scale: _Scale, values: Sequence[float]) -> Tuple[float, float]:
    line = [_line(clock, ns) for ns in (scale.first_ns, scale.last_ns)] if clock else []
    return min([*values, *line], default=0.0), max([*values, *line], default=0.0)


def _few(samples: Sequence[Tuple[int, int]], most: int) -> List[Tuple[int, int]]:
    """In the order of time, evenly thinned, the first and the last among them."""
    ordered = sorted(samples)
    if len(ordered) <= most:
        return ordered
    return [ordered[place * (len(ordered) - 1) // (most - 1)] for place in range(most)]


def _path(points: Sequence[Tuple[float, float]], mark: float = 0) -> str:
    """Through all points; a lone one is a dot. With a mark across its beginning, so that lines on one line can be told."""
    words = [f"{x:.1f} {y:.1f}" for x, y in points]
    kept = [word for place, word in enumerate(words) if place == 0 or word != words[place - 1]]
    if not kept:
        return ""
    x, y = points[0]
    across = f"M{x:.1f} {y - mark:.1f}v{2 * mark:.1f}" if mark else ""
    return f"{across}M{'L'.join(kept)}" if len(kept) > 1 else f"{across}M{kept[0]}h0"


def _name(flow: Direction) -> str:
    ends = f"{flow.source}:{flow.source_port} to {flow.destination}:{flow.destination_port}"
    return f"{ends}, {flow.segments_with_timestamps:,} of {flow.segments:,} segments with a timestamp"


def _rule(x: float, y: float, to_x: float, to_y: float) -> str:
    return f'<path class="rule" d="{_path([(x, y), (to_x, to_y)])}"/>'


# The axis of time


def _times(scale: _Scale, bottom: float) -> Iterator[str]:
    """A rule and a number for each few seconds."""
    span_s = (scale.last_ns - scale.first_ns) / 1e9
    step = _step(span_s)
    for place in range(int(span_s / step) + 1 if step else 1):
        x = scale.x(scale.first_ns + round(place * step * 1e9))
        yield _rule(x, _TOP + _HEADING, x, bottom)
        yield _text(x, bottom + 18, f"{place * step:.10g}", "number dim", "middle")
    begun = datetime.datetime(1970, 1, 1) + datetime.timedelta(microseconds=scale.first_ns // 1000)
    yield _text(_RIGHT, bottom + 42, f"seconds since {begun:%Y-%m-%d %H:%M:%S.%f} UTC", "dim", "end")


def _step(span_s: float) -> float:
    """1, 2 or 5 times a power of ten, for at most ten numbers; 0 if there is no span."""
    if span_s <= 0:
        return 0.0
    power: float = 10.0 ** math.floor(math.log10(span_s / 10))
    return next(step * power for step in (1, 2, 5, 10) if step * power * 10 >= span_s * 0.999)
