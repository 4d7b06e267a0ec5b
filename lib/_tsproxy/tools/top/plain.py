"""The lines for people, one for each JSON line: what `top` writes where there is no screen to draw on.

Knows a record and what the model made of it. Knows nothing of sizes.
"""

from __future__ import annotations

from typing import Optional

from _tsproxy.tools.top import verdict, words
from _tsproxy.tools.top.lines import Closed, Latency, Metrics, Record, RouteStart, Said, Start, Unread
from _tsproxy.tools.top.model import Model, Watched


def sentence(record: Record, model: Model) -> str:
    """What a line says, after the model has taken it."""
    if isinstance(record, Unread):
        return f"unusable  {record.why}: {record.text}"
    process = model.processes[record.pid]
    route = None if isinstance(record, Start) else process.route(record.route)
    of = f"route {route.name}  " if route else ""
    return f"{record.at[:19]}Z  pid {record.pid}  {of}{_event(record, route or process)}"


def _event(record: Start | RouteStart | Closed | Metrics | Said, watched: Watched) -> str:
    if isinstance(record, Start):
        where = f"{record.listening} to {record.targets}" if record.routes is None else words.counted(record.routes, "route")
        return f"start  tsproxy {record.version}, {where}; {_judged(watched)}"
    if isinstance(record, RouteStart):
        return f"start  {record.listening} to {record.targets}; {_judged(watched)}"
    if isinstance(record, Closed):
        return f"closed  {_closed(record)}"
    if isinstance(record, Metrics):
        return f"metrics  {_measured(watched)}"
    event = "" if record.event == record.level else f"{record.event}: "
    return f"{record.level}  {event}{record.text}"


def _closed(one: Closed) -> str:
    stamps = {None: "no upstream connection", True: "upstream with timestamps", False: "upstream without timestamps"}
    parts = (
        f"{one.client} to {one.upstream or words.UNKNOWN}",
        words.micros(one.duration_us),
        f"in {words.scaled(one.rx_bytes, 'B')}",
        f"out {words.scaled(one.tx_bytes, 'B')}",
        stamps[one.upstream_timestamps],
        f"{one.reason} {one.termination_state}",
    )
    return ", ".join(parts)


def _measured(watched: Watched) -> str:
    last = watched.last
    parts = (
        f"active {words.count(watched.count('downstream_cx_active'))}",
        f"connections {words.per_second(last.cx_per_s if last else None)}",
        f"in {words.scaled(last.rx_per_s if last else None, 'B/s')}",
        f"out {words.scaled(last.tx_per_s if last else None, 'B/s')}",
        f"relay {_percentiles(last.relay if last else None)}",
        f"connect {_percentiles(last.connect if last else None)}",
        _judged(watched),
    )
    return "; ".join(parts)


def _percentiles(latency: Optional[Latency]) -> str:
    """Upper limits, of the last interval."""
    if latency is None or not latency.total:
        return words.UNKNOWN
    return f"p50 up to {words.micros(latency.p50)}, p99 up to {words.micros(latency.p99)}"


def _judged(watched: Watched) -> str:
    judged = verdict.judge(watched)
    return f"{judged.grade.value}: {judged.text}" + (f" ({judged.basis})" if judged.basis else "")
