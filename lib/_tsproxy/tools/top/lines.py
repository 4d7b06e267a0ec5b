"""One line of bytes into one typed record.

Knows the fields' names and types, and that a line may hold anything: what it hands on is of the right type, bounded, and
made of characters that a terminal shows in one column each. Knows nothing of other lines, nor of what a field means.
"""

from __future__ import annotations

import json
import math
import re
from datetime import datetime, timezone
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple, Union

from _tsproxy.cli.config import DEFAULT_ROUTE
from _tsproxy.stats.histogram import LIMITS_US

MOST_TEXT = 500
_MOST = 10**21  # far beyond 64 bits, and still printable
_FEW = 16  # items of a list that are looked at
# Latin, Greek, Cyrillic, punctuation, currency, arrows, mathematics, boxes: written left to right, one column
# each. All else (controls, escapes, bidirectional marks, combining and wide characters) could spoil a row.
_STRANGE = re.compile(
    "[^ -~\u00a1-\u00ac\u00ae-\u02ff\u0370-\u0377\u037a-\u037f\u0384-\u038a\u038c\u038e-\u03a1\u03a3-\u0482\u048a-\u052f"
    "\u2010-\u2027\u2030-\u205e\u20a0-\u20bf\u2190-\u22ff\u2500-\u259f]"
)
_TIME = re.compile(r"\d{4}-\d\d-\d\dT(\d\d:\d\d:\d\d)(?:\.\d{1,9})?Z", re.ASCII)
_SAID = ("error", "warning", "resolve", "reload", "timestamps_drift", "drain", "stop", "debug")
_COUNTER = re.compile(r"(?:downstream|upstream|cx|idle|internal|log|worker)_[a-z_]+(?<!_per_s)(?<!_max)", re.ASCII)
_ROUTE = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}", re.ASCII)


class Start(NamedTuple):
    """A `start` line. Lists are joined to a text. `routes`: how many a file has; None for the one of the command line."""

    at: str
    pid: int
    version: str
    listening: str
    targets: str
    mode: str
    static_timestamp: int
    witness: str
    max_connections: Optional[int]
    routes: Optional[int] = None


class RouteStart(NamedTuple):
    """A `route` line: from here on this route is served as it says. Lists are joined to a text."""

    at: str
    pid: int
    route: str
    listening: str
    targets: str
    mode: str
    static_timestamp: int
    witness: str
    max_connections: Optional[int]


class Closed(NamedTuple):
    """A `connection` line. Addresses with their ports; times in microseconds."""

    at: str
    pid: int
    client: str
    upstream: str
    duration_us: Optional[int]
    connect_us: Optional[int]
    rx_bytes: Optional[int]
    tx_bytes: Optional[int]
    client_timestamps: Optional[bool]
    upstream_timestamps: Optional[bool]
    client_syn_tsval: Optional[int]
    rtt_us: Optional[int]
    retransmits: Optional[int]
    witness: str
    reason: str
    termination_state: str
    level: str
    route: Optional[str]


class Latency(NamedTuple):
    """One histogram of a `metrics` line: microseconds, and how many were up to each of `LIMITS_US`; empty if not told."""

    p50: Optional[float]
    p99: Optional[float]
    p999: Optional[float]
    most: Optional[float]
    below: Tuple[int, ...]
    total: int


class Metrics(NamedTuple):
    """A `metrics` line: of a route, or of the whole process (None). `counts` has each counter and gauge that it names."""

    at: str
    pid: int
    start_time: str
    uptime_s: float
    interval_s: float
    rx_per_s: Optional[float]
    tx_per_s: Optional[float]
    counts: Mapping[str, int]
    relay: Latency
    connect: Latency
    route: Optional[str]
    segments_per_s: Optional[float]


class Said(NamedTuple):
    """A line that is text for people: `error`, `warning`, `timestamps_drift`, `resolve`, `reload`, `drain`, `stop`."""

    at: str
    pid: int
    level: str
    event: str
    text: str
    route: Optional[str] = None


class Unread(NamedTuple):
    """A line that could not be used, in a few words why, and its text."""

    why: str
    text: str


Record = Union[Start, RouteStart, Closed, Metrics, Said, Unread]


def clean(text: str, most: int = MOST_TEXT) -> str:
    """The text with each character that is no single visible column turned into "?", and its end cut off."""
    return _STRANGE.sub("?", text[:most])


def moment(at: str) -> Optional[float]:
    """Seconds since 1970 of a time in a line; None for one that no calendar has."""
    try:
        return datetime.strptime(at[:19], "%Y-%m-%dT%H:%M:%S").replace(tzinfo=timezone.utc).timestamp()
    except ValueError:
        return None


def read(line: bytes) -> Record:
    """The record in a line; Unread for whatever is none. Never raises."""
    text = line.decode("utf-8", "replace").strip()
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        return Unread("not JSON", clean(text))
    if not isinstance(fields, dict):
        return Unread("no JSON object", clean(text))
    try:
        return _record(_Reader(fields))
    except _Wrong as wrong:
        return Unread(str(wrong), clean(text))


class _Wrong(Exception):
    """Why a JSON object is no line of tsproxy."""


def _record(fields: _Reader) -> Record:
    event = fields.text("event")
    if event == "metrics":
        return _metrics(fields)
    if event == "connection":
        return _closed(fields)
    if event == "start":
        return _start(fields)
    if event == "route":
        return _route_start(fields)
    if event in _SAID:
        return Said(fields.at(), fields.pid(), fields.text("level"), event, _words(fields, event), fields.route(None))
    raise _Wrong(f"unknown event {event!a}" if event else "no event")


class _Reader:
    """The fields of an object by name and type. A field that is missing or null reads as nothing; a wrong one raises."""

    def __init__(self, fields: Dict[str, Any]) -> None:
        self._fields = fields

    def _get(self, name: str, kind: Any) -> Any:
        value = self._fields.get(name)
        # bool is a kind of int to Python, and a kind of its own to JSON
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool)):
            raise _Wrong(f"wrong type of {name}")
        return value

    def text(self, name: str) -> str:
        """A text, clean; empty if there is none."""
        return clean(self._get(name, str) or "")

    def raw(self, name: str) -> str:
        """A text as it is, for what looks at its lines; empty if there is none."""
        return str(self._get(name, str) or "")

    def texts(self, name: str) -> str:
        """A list of texts, joined."""
        items: List[Any] = self._get(name, list) or []
        if not all(isinstance(item, str) for item in items):
            raise _Wrong(f"wrong type of {name}")
        return clean(", ".join(items[:_FEW]))

    def whole(self, name: str) -> Optional[int]:
        """A number that counts something."""
        value: Optional[int] = self._get(name, int)
        if value is not None and not 0 <= value < _MOST:
            raise _Wrong(f"no sensible {name}")
        return value

    def number(self, name: str) -> Optional[float]:
        """A number that measures something."""
        value: Optional[float] = self._get(name, (int, float))
        if value is not None and not (math.isfinite(value) and 0 <= value < _MOST):
            raise _Wrong(f"no sensible {name}")
        return value

    def measured(self, name: str) -> float:
        """The same, and it must be there."""
        value = self.number(name)
        if value is None:
            raise _Wrong(f"no {name}")
        return value

    def flag(self, name: str) -> Optional[bool]:
        """True or false."""
        value: Optional[bool] = self._get(name, bool)
        return value

    def at(self, name: str = "timestamp") -> str:
        """A time as the encoder writes it: RFC 3339, UTC."""
        text = self.text(name)
        if not _TIME.fullmatch(text):
            raise _Wrong(f"no sensible {name}")
        return text

    def route(self, missing: Optional[str]) -> Optional[str]:
        """The route that a line is about. None: the process, which null says too."""
        if self._fields.get("route") is None:
            return None if "route" in self._fields else missing
        name = self.raw("route")
        if not _ROUTE.fullmatch(name):
            raise _Wrong("no sensible route")
        return name

    def pid(self) -> int:
        """Who speaks: it must be there."""
        return int(self.measured("pid"))

    def counts(self) -> Dict[str, int]:
        """Each field whose name is one of a counter or gauge."""
        return {name: self.whole(name) or 0 for name in self._fields if _COUNTER.fullmatch(name)}

    def latency(self, name: str) -> Latency:
        """A histogram. Cumulative counts that fall are none."""
        below = tuple(self.whole(f"{name}_le_{limit}") or 0 for limit in LIMITS_US)
        count = self.whole(f"{name}_count") or 0
        if any(low > high for low, high in zip(below, (*below[1:], count))):
            raise _Wrong(f"no sensible {name}_le_")
        p50, p99, p999, most = (self.number(f"{name}_{part}") for part in ("p50", "p99", "p999", "max"))
        return Latency(p50, p99, p999, most, below, count)


def _start(fields: _Reader) -> Start:
    return Start(fields.at(), fields.pid(), fields.text("version"), *_served(fields), fields.whole("routes"))


def _route_start(fields: _Reader) -> RouteStart:
    name = fields.route(None)
    if name is None:
        raise _Wrong("no route")
    return RouteStart(fields.at(), fields.pid(), name, *_served(fields))


def _served(fields: _Reader) -> Tuple[str, str, str, int, str, Optional[int]]:
    """From `listening` to `max_connections`."""
    limit = re.search(r"\bmax_connections=(\d{1,9})\b", fields.texts("limits"), re.ASCII)
    return (
        _address(fields, "listen"),
        fields.texts("targets"),
        fields.text("timestamps"),
        fields.whole("static_timestamp") or 0,
        fields.text("witness"),
        int(limit[1]) if limit else None,
    )


def _closed(fields: _Reader) -> Closed:
    return Closed(
        fields.at(),
        fields.pid(),
        _address(fields, "client"),
        _address(fields, "upstream"),
        fields.whole("duration_us"),
        fields.whole("connect_us"),
        fields.whole("rx_bytes"),
        fields.whole("tx_bytes"),
        fields.flag("client_timestamps"),
        fields.flag("upstream_timestamps"),
        fields.whole("client_syn_tsval"),
        fields.whole("upstream_rtt_us"),
        fields.whole("upstream_retransmits"),
        fields.text("witness"),
        fields.text("reason"),
        fields.text("termination_state"),
        fields.text("level"),
        fields.route(DEFAULT_ROUTE),
    )


def _metrics(fields: _Reader) -> Metrics:
    return Metrics(
        fields.at(),
        fields.pid(),
        fields.at("start_time"),
        fields.measured("uptime_s"),
        fields.measured("interval_s"),
        fields.number("rx_bytes_per_s"),
        fields.number("tx_bytes_per_s"),
        fields.counts(),
        fields.latency("relay_us"),
        fields.latency("connect_us"),
        fields.route(DEFAULT_ROUTE),
        fields.number("upstream_segments_per_s"),
    )


def _address(fields: _Reader, name: str) -> str:
    """Address and port as people write them; empty if there was none."""
    ip, port = fields.text(f"{name}_address"), fields.whole(f"{name}_port")
    host = f"[{ip}]" if ":" in ip else ip
    return f"{host}:{port}" if ip and port is not None else host


def _words(fields: _Reader, event: str) -> str:
    """What a line says to people. Of a traceback, its last line, which is what happened."""
    if event == "drain":
        left, limit = fields.whole("active_connections") or 0, fields.number("drain_timeout_s") or 0
        return f"{left} connections may finish within {limit:g} s"
    if event == "stop":
        return f"{fields.text('reason')}; connections cut: {fields.whole('killed_connections') or 0}"
    if event == "reload" and fields.text("level") != "error":
        counts = ", ".join(f"{fields.whole(name) or 0} {name}" for name in ("added", "removed", "changed", "unchanged"))
        return "; ".join(filter(None, (counts, clean(fields.text("message")))))
    told = [line.strip() for line in fields.raw("message").splitlines() if line.strip()]
    if len(told) > 1:
        first = "its traceback is in the line" if told[0].startswith("Traceback") else told[0]
        return f"{clean(told[-1])} ({clean(first)})"
    return clean("".join(told))
