"""Line and bar charts out of plain figures. tsproxy stands out; no relay at all is a grey, dashed line."""

from __future__ import annotations

import math
from typing import Dict, Iterator, List, NamedTuple, Sequence, Tuple, Union

from common import svg

WIDTH, MARGIN_LEFT, MARGIN_RIGHT = 900.0, 90.0, 150.0
_HEAD, _TITLE, _PLOT, _FOOT = 64.0, 34.0, 300.0, 58.0
_BAR, _BAR_GAP = 20.0, 7.0
_LABEL_STEP = 15.0
_LETTER = 7.0  # about as wide as one of the font is

Point = Tuple[float, float]

# Okabe and Ito's colours, which the colour-blind can tell apart.
_COLOURS = {
    "direct": "#8a8a8a",
    "naked": "#8a8a8a",
    "tsproxy": "#0072b2",
    "tsproxy-spin": "#56b4e9",
    "haproxy": "#d55e00",
    "nginx": "#009e73",
    "socat": "#cc79a7",
    "threads": "#0072b2",
    "interpreters": "#56b4e9",
    "processes": "#5a3fc0",
}


class Lines(NamedTuple):
    """Some series over one axis; x in any unit, y logarithmic if it spans more than a factor of twenty."""

    title: str
    x_label: str
    y_label: str
    x_ticks: Sequence[Tuple[float, str]]
    series: Dict[str, List[Point]]


class Bars(NamedTuple):
    """A bar for each relay."""

    title: str
    values: Dict[str, float]
    labels: Dict[str, str]


Chart = Union[Lines, Bars]


def document(title: str, subtitle: str, charts: Sequence[Chart]) -> str:
    """All charts in one file, one below the other."""
    parts = [svg.text(24, 30, title, font_size=18, font_weight="bold"), svg.text(24, 50, subtitle, fill=svg.FAINT)]
    y = _HEAD
    for chart in charts:
        drawn, height = _lines(chart, y) if isinstance(chart, Lines) else _bars(chart, y)
        parts += drawn
        y += height
    return svg.document(WIDTH, y + 8, parts)


def _colour(name: str) -> str:
    """By the name, or by its first word."""
    return _COLOURS.get(name) or _COLOURS.get(name.split()[0].rstrip(":"), "#9cc3e0")


class _Scale(NamedTuple):
    """From values to places on the paper."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def at(self, value: float) -> float:
        low, high, value = (math.log(number) if self.is_log else number for number in (self.low, self.high, value))
        return self.start + (value - low) / ((high - low) or 1) * (self.end - self.start)


def nice_steps(low: float, high: float, is_log: bool) -> List[float]:
    """Round numbers that cover low to high: 1, 2, 5 of each decade, or about five equal steps from 0."""
    if is_log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        marks = [mantissa * 10.0**decade for decade in decades for mantissa in (1, 2, 5)]
        below = [mark for mark in marks if mark <= low] or marks[:1]
        above = [mark for mark in marks if mark >= high] or marks[-1:]
        return [mark for mark in marks if below[-1] <= mark <= above[0]]
    size = 10.0 ** math.floor(math.log10(high / 5))
    step = next(size * mantissa for mantissa in (1, 2, 5, 10) if size * mantissa * 6 >= high)
    return [step * number for number in range(math.ceil(high / step) + 1)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:g}"


def _lines(chart: Lines, top: float) -> Tuple[List[str], float]:
    values = [y for points in chart.series.values() for _, y in points if y > 0] or [1.0]
    is_log = max(values) > 20 * min(values)
    marks = nice_steps(min(values), max(values), is_log)
    upper, lower = top + _TITLE, top + _TITLE + _PLOT
    xs = _Scale(chart.x_ticks[0][0], chart.x_ticks[-1][0], MARGIN_LEFT, WIDTH - MARGIN_RIGHT)
    ys = _Scale(marks[0], marks[-1], lower, upper, is_log)
    parts = [svg.text(24, top + 18, chart.title, font_size=14, font_weight="bold")]
    parts += _axes(chart, marks, xs, ys)
    for name, points in chart.series.items():
        parts += _curve(name, [(xs.at(x), ys.at(max(y, marks[0]))) for x, y in points])
    parts += _end_labels({name: ys.at(max(points[-1][1], marks[0])) for name, points in chart.series.items() if points})
    return parts, _TITLE + _PLOT + _FOOT


def _axes(chart: Lines, marks: Sequence[float], xs: _Scale, ys: _Scale) -> Iterator[str]:
    for mark in marks:
        yield svg.line(xs.start, ys.at(mark), xs.end, ys.at(mark))
        yield svg.text(xs.start - 8, ys.at(mark) + 4, _number(mark), "end", fill=svg.FAINT)
    for place, label in chart.x_ticks:
        yield svg.line(xs.at(place), ys.start, xs.at(place), ys.end)
        yield svg.text(xs.at(place), ys.start + 18, label, "middle", fill=svg.FAINT)
    yield svg.line(xs.start, ys.start, xs.end, ys.start, svg.FAINT)
    yield svg.text((xs.start + xs.end) / 2, ys.start + 38, chart.x_label, "middle", fill=svg.FAINT)
    middle = (ys.start + ys.end) / 2
    yield svg.text(0, 0, chart.y_label, "middle", fill=svg.FAINT, transform=f"translate(16 {middle:.1f}) rotate(-90)")


def _curve(name: str, points: List[Point]) -> Iterator[str]:
    yield svg.path(points, _colour(name), 2.6 if name == "tsproxy" else 1.8, "5 4" if name == "direct" else "")
    if len(points) <= 16:
        yield from (svg.dot(x, y, _colour(name)) for x, y in points)


def _end_labels(heights: Dict[str, float]) -> Iterator[str]:
    """Each line's name at its right end; where they would lie on each other, pushed down."""
    last = -math.inf
    for name, y in sorted(heights.items(), key=lambda item: item[1]):
        last = max(y, last + _LABEL_STEP)
        x = WIDTH - MARGIN_RIGHT + 12
        weight = {"font_weight": "bold"} if name == "tsproxy" else {}
        yield svg.line(WIDTH - MARGIN_RIGHT + 2, y, x - 2, last, _colour(name))
        yield svg.text(x, last + 4, name, fill=_colour(name), **weight)


def _bars(chart: Bars, top: float) -> Tuple[List[str], float]:
    left, right = 44 + _LETTER * max(map(len, chart.values), default=0), WIDTH - MARGIN_RIGHT
    xs = _Scale(0, max([*chart.values.values(), 1e-9]), left, right)
    parts = [svg.text(24, top + 18, chart.title, font_size=14, font_weight="bold")]
    y = top + _TITLE
    for name, value in chart.values.items():
        parts.append(svg.text(left - 10, y + 14, name, "end"))
        parts.append(svg.box(left, y, max(1.0, xs.at(value) - left), _BAR, _colour(name)))
        parts.append(svg.text(xs.at(value) + 8, y + 14, chart.labels[name], fill=svg.FAINT))
        y += _BAR + _BAR_GAP
    return parts, y - top + 20
