"""The screen as text: what has been heard and a size in, exactly that many rows of that many columns out.

Knows what is worth a row when rows are few. Knows nothing of terminals; no clock but the one it is given.
"""

from __future__ import annotations

from typing import Iterator, List, NamedTuple, Optional, Sequence

from _tsproxy.cli.config import DEFAULT_ROUTE
from _tsproxy.stats.histogram import LIMITS_US
from _tsproxy.tools.terminal import BOLD, DIM, GREEN, RED, YELLOW
from _tsproxy.tools.top import table, verdict, words
from _tsproxy.tools.top.lines import Closed, Latency, Unread, clean, moment
from _tsproxy.tools.top.model import TROUBLES, Message, Model, Process
from _tsproxy.tools.top.rows import PLAIN, REVERSE, Column, Row, Segment, ends, fit, heading, middle, shorten
from _tsproxy.tools.top.verdict import Grade, Verdict

BARS = "▁▂▃▄▅▆▇█"
_BAR_OF = {Grade.GOOD: "30;42", Grade.NOTE: "30;43", Grade.BAD: "1;37;41", Grade.OPEN: REVERSE}
_LABEL, _FIGURE, _SPARK = 13, 12, 38  # columns: where figures begin, how wide each is, where sparklines begin
_PERCENTILE, _COUNT = 9, 8
_COUNTED = _LABEL + 4 * _PERCENTILE + _COUNT  # a number that is cut would be another number
_NARROW, _ROOMY = 60, 100  # columns below which peaks, and the version, are left out
_QUIET = 2.5  # intervals without a line before it is said


class View(NamedTuple):
    """What is looked at, besides the lines themselves. Times are seconds of CLOCK_REALTIME."""

    source: str = ""
    pid: Optional[int] = None  # None: the newest process
    now: float = 0.0
    ended: bool = False  # no more lines will come
    note: str = ""  # about the source: rotated, truncated, waiting
    page: int = 0  # of the table of routes, round and round


class _Ranked(NamedTuple):
    """A row, and how much it is worth when not all fit."""

    worth: int
    row: Row


def chosen(model: Model, view: View) -> Optional[Process]:
    """The process that is shown."""
    newest = next(reversed(model.processes.values()), None)
    return newest if view.pid is None else model.processes.get(view.pid, newest)


def draw(model: Model, view: View, columns: int, rows: int) -> List[Row]:
    """The rows, each exactly `columns` wide. The least worth are left out, the bottom one is always the footer."""
    process = chosen(model, view)
    if process and process.is_routed:
        ranked = [*_with_routes(process, model, view, columns, rows)]
    else:
        ranked = [*_top(process, model, view, columns), *_lists(process, model, columns, rows)]
    room = max(0, rows - 1)
    kept = sorted(range(len(ranked)), key=lambda index: -ranked[index].worth)[:room]
    body = [ranked[index].row for index in sorted(kept)]
    body += [[]] * (room - len(body))
    footer = _footer(process, model, view, columns, rows)
    return [fit(row, columns) for row in [*body, footer][:rows]]


def _top(process: Optional[Process], model: Model, view: View, columns: int) -> Iterator[_Ranked]:
    """All above the lists."""
    yield from _judged(process, model, view, columns)
    yield from _rates(process, columns)
    yield from _latencies(process, columns)


def _judged(process: Optional[Process], model: Model, view: View, columns: int) -> Iterator[_Ranked]:
    """The three rows that are always the first."""
    yield _Ranked(100, _header(process, model, view, columns))
    yield _Ranked(99, _banner(verdict.judge(process), columns))
    yield _Ranked(80, _evidence(process))


_BLOCK = 5  # rows of rates, or of latency, with their heading
_FEW = 3  # rows that are not worth a heading
_NO_TROUBLE = 14  # rows below which the table has all that the verdict leaves


def _with_routes(process: Process, model: Model, view: View, columns: int, rows: int) -> Iterator[_Ranked]:
    """The table gets what room there is; what it leaves goes to the process's rates, latency and ended connections.

    Where each begins depends on the size and on how many routes there are: nothing jumps while the screen is watched.
    """
    room, said = _table_room(rows), _said_rows(rows)
    spare = room - len(process.routes)
    blocks = min(max(0, spare) // _BLOCK, 2)
    left = max(0, spare - blocks * _BLOCK)
    yield from _judged(process, model, view, columns)
    if blocks:
        yield from _rates(process, columns)
    if blocks > 1:
        yield from _latencies(process, columns)
    yield from _routes(process, model, view, columns, room)
    if said:
        yield from _trouble(process, model, columns, said + (left if left < _FEW else 0))
    if left >= _FEW:
        yield from _closed_rows(list(process.closed)[::-1][: left - 1], columns, has_routes=True)


def _said_rows(rows: int) -> int:
    return min(8, 2 + max(0, rows - 24) // 6) if rows >= _NO_TROUBLE else 0


def _table_room(rows: int) -> int:
    """How many routes are shown at once, beside three rows of the verdict, two of the table itself, the trouble, the footer."""
    said = _said_rows(rows)
    return max(1, rows - 6 - (2 + said if said else 0))


def _routes(process: Process, model: Model, view: View, columns: int, room: int) -> Iterator[_Ranked]:
    """A page of the table."""
    routes = table.ranked(process, model.last_at)
    pages = max(1, -(-len(routes) // room))
    begin = view.page % pages * room
    shown = routes[begin : begin + room]
    title = words.counted(len(routes), "route") if pages == 1 else f"routes {begin + 1}-{begin + len(shown)} of {len(routes)}"
    for place, row in enumerate(table.rows(process, shown, title, columns)):
        yield _Ranked((97, 96)[place] if place < 2 else 98, row)


# Who speaks, and the verdict


def _header(process: Optional[Process], model: Model, view: View, columns: int) -> Row:
    if process is None:
        return [(" tsproxy top ", BOLD), (shorten(f"waiting for lines on {clean(view.source)}", columns - 13), PLAIN)]
    start, colour = process.start, {"relaying": GREEN}.get(process.phase, YELLOW)
    name = f" tsproxy {start.version} " if start and columns >= _ROOMY else " tsproxy "
    up = f"  up {words.seconds(process.metrics.uptime_s)}" if process.metrics else ""
    where = f"{start.listening} → {start.targets} " if start else "(its start line is not here) "
    if process.is_routed and start:
        where = f"{words.counted(len(process.routes), 'route')} "
    pid = f" pid {process.pid}  "
    used = len(name + pid + process.phase)
    return [(name, BOLD), (pid, PLAIN), (process.phase, colour), (ends(up, where, columns - used), PLAIN)]


def _banner(judged: Verdict, columns: int) -> Row:
    text, basis = f" {judged.grade.value:<5} {judged.text}", f"{judged.basis} "
    return [(ends(text, basis if len(text) + len(basis) < columns else "", columns), _BAR_OF[judged.grade])]


def _evidence(process: Optional[Process]) -> Row:
    """The figures behind the verdict."""
    if process is None:
        return []
    stamped, refused = verdict.stamped(process), verdict.refused(process)
    clients, upstream = process.count("downstream_cx_timestamps_total"), process.count("upstream_cx_total")
    if upstream is None or upstream < process.handshakes:
        upstream = process.handshakes  # connection lines that came after the last metrics line
    bad = RED if verdict.mode_of(process) == "strip" and not process.is_routed else PLAIN  # which route may, the table says
    return [
        ("       TSopt: upstream ", DIM),
        (f"{words.count(stamped)}/{words.count(upstream)}", bad if stamped else PLAIN),
        (", clients ", DIM),
        (f"{words.count(clients)}/{words.count(process.count('downstream_cx_total'))}", PLAIN),
        (", refused ", DIM),
        (words.count(refused), RED if refused else PLAIN),
        (", drifts ", DIM),
        (words.count(process.drift_count), RED if process.drift_count else PLAIN),
    ]


# Rates


def _rates(process: Optional[Process], columns: int) -> Iterator[_Ranked]:
    intervals = list(process.intervals) if process else []
    limit = process.start.max_connections if process and process.start else None
    spark = columns - _spark_at(columns) - 1
    shown = intervals[-max(1, spark) :]
    yield _Ranked(66, _rates_heading(sum(interval.seconds for interval in shown), columns))
    series = (
        (88, "from clients", [interval.rx_per_s for interval in shown], _bytes_rate),
        (87, "to clients", [interval.tx_per_s for interval in shown], _bytes_rate),
        (89, "connections", [interval.cx_per_s for interval in shown], words.per_second),
        (91, "active", [interval.active for interval in shown], words.count),
    )
    for worth, name, values, say in series:
        now = say(values[-1] if values else None)
        if name == "active" and limit and values:
            now = f"{now}/{words.count(limit)}"
        peak = say(max((value for value in values if value is not None), default=None))
        yield _Ranked(worth, _rate_row(name, now, peak, sparkline(values, spark), columns))


def _bytes_rate(value: Optional[float]) -> str:
    return words.scaled(value, "B/s")


def _spark_at(columns: int) -> int:
    return _SPARK if columns >= _NARROW else _SPARK - _FIGURE


def _rates_heading(span: float, columns: int) -> Row:
    names = [(3, "rates"), (-_LABEL - _FIGURE, "now")]
    if columns >= _NARROW:
        names.append((-_LABEL - 2 * _FIGURE, "peak"))
    names.append((_spark_at(columns) + 2, f"the last {words.seconds(span)}" if span else "no metrics line yet"))
    return heading(columns, *names)


def _rate_row(name: str, now: str, peak: str, bars: str, columns: int) -> Row:
    peak = f"{peak:>{_FIGURE}}" if columns >= _NARROW else ""
    return [(f" {name:<{_LABEL - 1}}", PLAIN), (f"{now:>{_FIGURE}}", BOLD), (f"{peak} ", DIM), (bars, GREEN)]


def sparkline(values: Sequence[Optional[float]], width: int) -> str:
    """The last `width` values from 0 to their maximum, right-aligned; nothing where nothing is known."""
    shown = list(values)[-width:] if width > 0 else []
    most = max((value for value in shown if value is not None), default=0)
    return "".join(" " if value is None else _bar(value, most) for value in shown).rjust(max(0, width))


def _bar(value: float, most: float) -> str:
    """The lowest bar is for 0 alone."""
    return BARS[0] if not value else BARS[1 + min(6, int(7 * value / most))]


# Latency


def _latencies(process: Optional[Process], columns: int) -> Iterator[_Ranked]:
    last, metrics = (process.last, process.metrics) if process else (None, None)
    yield _Ranked(86, _latency_heading(f"latency, {words.seconds(last.seconds)}" if last else "latency", columns))
    yield _Ranked(90, _latency_row("relay", last.relay if last else None, "≤", columns))
    yield _Ranked(75, _latency_row(" since start", metrics.relay if metrics else None, "", columns))
    yield _Ranked(83, _latency_row("connect", last.connect if last else None, "≤", columns))
    yield _Ranked(74, _latency_row(" since start", metrics.connect if metrics else None, "", columns))


def _latency_heading(title: str, columns: int) -> Row:
    names = [(3, title)]
    at = _LABEL
    for name, width in zip(("p50", "p99", "p99.9", "max", "count"), (*[_PERCENTILE] * 4, _COUNT)):
        at += width
        names.append((-at, name))
    names.append((at + 1, "1us───────1ms───────1s"))
    return heading(columns, *names)


def _latency_row(name: str, latency: Optional[Latency], mark: str, columns: int) -> Row:
    """`mark` stands before figures that are upper limits only."""
    figures = (latency.p50, latency.p99, latency.p999, latency.most) if latency else (None,) * 4
    room = max(0, columns - _LABEL) // _PERCENTILE
    texts = [f"{words.at_most(value, mark, LIMITS_US[-1]):>{_PERCENTILE}}" for value in figures[:room]]
    count = words.count(latency.total if latency else None) if columns >= _COUNTED else ""
    bars = _distribution(latency) if latency else ""
    return [(f" {name:<{_LABEL - 1}}", PLAIN), ("".join(texts), BOLD), (f"{count:>{_COUNT}} ", PLAIN), (bars, GREEN)]


def _distribution(latency: Latency) -> str:
    """A bar for each doubling of the time, and one for all beyond; nothing where there was none."""
    upto = (*latency.below, latency.total)
    counts = [after - before for before, after in zip((0, *upto), upto)]
    return "".join(_bar(count, max(counts)) if count else " " for count in counts)


# Trouble, and what ended


def _lists(process: Optional[Process], model: Model, columns: int, rows: int) -> Iterator[_Ranked]:
    """The two lists, the latest first. They share what room the size leaves, however much there is to say: nothing jumps."""
    room = max(0, rows - 17)
    said = max(1, min(12, room // 3))
    yield from _trouble(process, model, columns, said)
    closed = list(process.closed)[::-1][: room - said] if process and room > said else []
    yield from _closed_rows(closed, columns)


def _trouble(process: Optional[Process], model: Model, columns: int, said: int) -> Iterator[_Ranked]:
    yield _Ranked(64, heading(columns, (3, "trouble")))
    yield _Ranked(85, _troubles(process, model, columns))
    for place, row in enumerate(_said(model, said, columns)):
        yield _Ranked(60 - place if place else 84, row)


def _troubles(process: Optional[Process], model: Model, columns: int) -> Row:
    """The counters that are not 0, the worst first, as far as they fit."""
    counts = [
        (words.count(value), name, _COLOURS.get(level, PLAIN))
        for key, name, level in TROUBLES
        for value in [_of(process, key)]
        if value
    ]
    unread = sum(model.unread.values())
    if unread:
        counts.insert(0, (words.count(unread), "unusable line" + "s" * (unread > 1), YELLOW))
    if not counts:
        return [(" none counted" if process and process.metrics else " nothing counted yet", DIM)]
    out: List[Segment] = []
    for count, name, code in counts:
        text = f" {count} {name}" if not out else f", {count} {name}"
        if sum(len(segment[0]) for segment in out) + len(text) > columns and out:
            break
        out.append((text, code))
    return out


def _of(process: Optional[Process], name: str) -> int:
    return (process.count(name) or 0) if process else 0


def _said(model: Model, count: int, columns: int) -> List[Row]:
    """That many rows: the last messages, and under them the last line that could not be used."""
    several, strange = len(model.processes) > 1, model.last_unread
    last = [_strange(strange, columns)] if strange and (count > 1 or not model.messages) else []
    rows = [_message(message, several, columns) for message in list(model.messages)[::-1][: count - len(last)]]
    return [*rows, *last, *[[]] * (count - len(rows) - len(last))]


def _message(message: Message, several: bool, columns: int) -> Row:
    said, times = message
    head = f" {said.at[11:19]} {_NAMES.get(said.event, said.event):<8}"
    text = ": ".join(filter(None, (f"pid {said.pid}" if several else "", _route(said.route), said.text)))
    if times > 1:
        text = f"({words.count(times)} times) {text}"
    return [(head, _COLOURS.get(said.level, PLAIN)), (shorten(text, columns - len(head)), PLAIN)]


def _route(name: Optional[str]) -> str:
    """Its name where it tells something."""
    return "" if name in (None, DEFAULT_ROUTE) else str(name)


def _strange(line: Unread, columns: int) -> Row:
    head = f" {'unusable':<8} {'line':<8}"
    return [(head, YELLOW), (shorten(f"{line.why}: {line.text}", columns - len(head)), PLAIN)]


_NAMES = {"timestamps_drift": "drift"}
_COLOURS = {"error": RED, "warning": YELLOW}


_COLUMNS = (
    Column("time", 8, 58),
    Column("client", 21, 0),
    Column("upstream", 21, 102),
    Column("lasted", 7, 0),
    Column("connect", 7, 110),
    Column("in", 7, 66),
    Column("out", 7, 74),
    Column("rtt", 7, 118),
    Column("resent", 6, 126),
    Column("offered", 10, 138),
    Column("ts", 2, 48),
)
_ROUTE = Column("route", 14, 70)
_BY_ROUTE = tuple(
    part
    for column in _COLUMNS
    for part in ([column, _ROUTE] if column.name == "client" else [column._replace(need=column.need + _ROUTE.width + 2)])
)
_WIDER = 190  # from here on there is room for whole IPv6 addresses
_IPV6 = 26  # how much more they take


def _closed_rows(closed: Sequence[Closed], columns: int, has_routes: bool = False) -> Iterator[_Ranked]:
    """The last ones that ended; how it ended takes what width is left."""
    layout = [column for column in (_BY_ROUTE if has_routes else _COLUMNS) if columns >= column.need]
    if columns >= _WIDER:
        layout = [column._replace(width=column.width + _IPV6) if column.width == 21 else column for column in layout]
    names, at = [], 1
    for column in layout:
        names.append((at if column.name in _LEFT else -at - column.width, column.name))
        at += column.width + 1
    title = [(3, "closed"), *[name for name in names if name[1] not in ("time", "client")], (at, "end")]
    yield _Ranked(55, heading(columns, *title))
    for place, one in enumerate(closed):
        yield _Ranked(54 - min(place, 50), _closed_row(one, layout))


_LEFT = ("time", "client", "route", "upstream", "ts")


def _closed_row(one: Closed, layout: Sequence[Column]) -> Row:
    cells = {
        "time": one.at[11:19],
        "client": one.client,
        "route": one.route or words.UNKNOWN,
        "upstream": one.upstream or words.UNKNOWN,
        "lasted": words.micros(one.duration_us),
        "connect": words.micros(one.connect_us),
        "in": words.scaled(one.rx_bytes, "B"),
        "out": words.scaled(one.tx_bytes, "B"),
        "rtt": words.micros(one.rtt_us),
        "resent": words.count(one.retransmits),
        "offered": words.UNKNOWN if one.client_syn_tsval is None else str(one.client_syn_tsval),
        "ts": {None: words.UNKNOWN, True: "TS", False: "no"}[one.upstream_timestamps],
    }
    row: List[Segment] = []
    for name, width, _ in layout:
        text = middle(cells[name], width)
        row.append((f" {text:<{width}}" if name in _LEFT else f" {text:>{width}}", PLAIN))
    return [*row, (f" {one.termination_state:<2} {one.reason}", _COLOURS.get(one.level, PLAIN))]


# The last row


def _footer(process: Optional[Process], model: Model, view: View, columns: int, rows: int) -> Row:
    keys = " q quit"
    if len(model.processes) > 1 and process:
        place = list(model.processes).index(process.pid) + 1
        keys += f"   n next process ({place} of {len(model.processes)}{', the newest' if view.pid is None else ''})"
    if process and len(process.routes) > _table_room(rows):
        keys += "   space more routes"
    if view.ended:
        return [(ends(" END OF INPUT: the last state; q quits", f"{_last(model, view)} ", columns), REVERSE)]
    code = YELLOW if _is_quiet(process, model, view) else DIM
    right = "; ".join(part for part in (clean(view.note), _last(model, view)) if part)
    return [(keys, DIM), (f"{shorten(right, columns - len(keys) - 2):>{max(0, columns - len(keys) - 1)}} ", code)]


def _last(model: Model, view: View) -> str:
    """When the last line was written, by its own clock, and how long ago that is by ours."""
    if not model.last_at:
        return "no line yet"
    ago = age(model.last_at, view.now)
    return f"last line {model.last_at[11:19]}Z" + (f", {words.seconds(int(ago))} ago" if ago is not None and ago >= 0 else "")


def _is_quiet(process: Optional[Process], model: Model, view: View) -> bool:
    """Whether lines should have come and have not."""
    ago = age(model.last_at, view.now)
    if ago is None or process is None or process.last is None or process.phase == "stopped":
        return False
    return ago > _QUIET * max(interval.seconds for interval in list(process.intervals)[-8:])


def age(at: str, now: float) -> Optional[float]:
    """Seconds since an RFC 3339 time; None for one that no calendar has."""
    then = moment(at)
    return None if then is None else now - then
