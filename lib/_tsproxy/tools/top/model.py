"""What the lines say when they are put together: rates, the latency of the last interval, the newest process, its troubles.

Knows records and their order. Knows nothing of terminals, files or this host's clock. What it keeps is bounded, however
long the stream is.
"""

from __future__ import annotations

from collections import deque
from typing import Counter, Deque, Dict, List, Mapping, NamedTuple, Optional, Tuple, Union

from _tsproxy.cli.config import DEFAULT_ROUTE
from _tsproxy.stats.histogram import LIMITS_US
from _tsproxy.tools.top.lines import Closed, Latency, Metrics, Record, RouteStart, Said, Start, Unread, read

_HISTORY = 512  # intervals; more than a terminal has columns
_ROUTES = 1024  # of a process; of more, each line would push another route out
_CLOSED = 200
_MESSAGES = 200
_PROCESSES = 16
_REASONS = 32  # kinds of unusable lines that are told apart
_SHORTEST_S = 0.1  # a rate over less (two SIGUSR1 in a row) would be noise
TOTALS = ("downstream_cx_rx_bytes_total", "downstream_cx_tx_bytes_total", "downstream_cx_total")
TROUBLES = (
    ("internal_errors_total", "internal errors", "error"),
    ("worker_restarts_total", "workers died", "error"),
    ("downstream_cx_lost_with_worker_total", "lost with them", "error"),
    ("upstream_cx_policy_refused_total", "refused by policy", "error"),
    ("upstream_cx_policy_ended_total", "ended by policy", "error"),
    ("log_lines_dropped_total", "lines dropped", "warning"),
    ("upstream_cx_connect_fail", "connects failed", "warning"),
    ("upstream_cx_connect_timeout", "of them timed out", "warning"),
    ("downstream_cx_overflow", "turned away, full", "warning"),
    ("downstream_client_cx_overflow", "over the client limit", "warning"),
    ("downstream_cx_denied", "denied", "warning"),
    ("cx_reset_by_peer_total", "resets", "info"),
    ("idle_timeout_total", "idle ends", "info"),
)
"""Counters of trouble, the worst first: what people call it, and the level of a line that would tell of it."""


class Message(NamedTuple):
    """Something said to people, and how often in a row."""

    said: Said
    times: int


class Interval(NamedTuple):
    """What happened between two `metrics` lines; None where the lines do not tell."""

    seconds: float
    rx_per_s: Optional[float]
    tx_per_s: Optional[float]
    cx_per_s: Optional[float]
    active: Optional[int]
    relay: Optional[Latency]
    connect: Optional[Latency]


class Trouble(NamedTuple):
    """What last went wrong on a route: an `error` or `warning` line, or the worst of the counters of trouble that grew."""

    at: str
    level: str
    text: str
    grown: int = 0  # by how much; 0: it is a line


class Watched:
    """A process or one of its routes: what its lines say, put together."""

    start: Optional[Union[Start, RouteStart]] = None

    def __init__(self, history: int) -> None:
        self.metrics: Optional[Metrics] = None
        self.intervals: Deque[Interval] = deque(maxlen=history)
        self.witness = ""
        self.drifts: List[Tuple[str, str]] = []  # the last two: since when it did not hold, and until when ("": still)
        self.drift_count = 0
        self.handshakes = 0  # connections seen to end that had an upstream connection, ...
        self.stamped = 0  # ... those of them whose upstream connection negotiated timestamps, ...
        self.refused = 0  # ... those that the policy refused, ...
        self.refused_early = 0  # ... and those of them that it refused before their SYN
        self._base: Optional[Metrics] = None

    def count(self, name: str) -> Optional[int]:
        """A counter or gauge as of the last `metrics` line."""
        return self.metrics.counts.get(name) if self.metrics else None

    @property
    def last(self) -> Optional[Interval]:
        """The last interval."""
        return self.intervals[-1] if self.intervals else None

    @property
    def drifted_since(self) -> str:
        """Since when the policy has not held; empty if it holds."""
        return self.drifts[-1][0] if self.drifts and not self.drifts[-1][1] else ""

    def count_since(self, name: str) -> int:
        """What a counter has counted."""
        return self.count(name) or 0

    def measure(self, metrics: Metrics) -> None:
        """Take the next totals, and what has happened since the last ones."""
        self.metrics = metrics
        interval = _first(metrics) if self._base is None else _between(self._base, metrics)
        if interval.seconds >= _SHORTEST_S:
            self.intervals.append(interval)
            self._base = metrics
        elif self._base is None:
            self._base = metrics  # lines that come faster than that: several make an interval

    def forget_totals(self) -> None:
        """Lines are missing here: what was counted before is no base for a rate."""
        self._base = None

    def close(self, closed: Closed) -> None:
        """Note one that ended."""
        self.witness = closed.witness or self.witness
        self.handshakes += closed.upstream_timestamps is not None
        self.stamped += closed.upstream_timestamps is True
        self.refused += closed.reason == "policy"
        self.refused_early += closed.reason == "policy" and closed.upstream_timestamps is None

    def drift(self, said: Said) -> None:
        """The policy does not hold any more, or it holds again."""
        if said.level == "error":
            self.drift_count += 1
            self.drifts = [*self.drifts[-1:], (said.at, "")]
        else:
            self.drift_ended(said.at)

    def drift_ended(self, at: str) -> None:
        """The policy holds, as of then."""
        if self.drifted_since:
            self.drifts[-1] = (self.drifts[-1][0], at)


class Route(Watched):
    """One route of a file: the lines with its name, since its first one or since another policy was asked for."""

    def __init__(self, name: str, earlier: Optional[Metrics] = None) -> None:
        """`earlier`: the last totals of another one of this name, which this one's lines go on with unless it was removed."""
        super().__init__(history=1)
        self.name = name
        self.start: Optional[RouteStart] = None
        self.trouble: Optional[Trouble] = None
        self.missed = 0  # metrics lines of the process since the last one of the route
        self._earlier = earlier
        self._before: Optional[Mapping[str, int]] = None if earlier else {}  # what was counted before it

    @property
    def is_gone(self) -> bool:
        """Whether it was removed and its last session has ended: then its lines stop. One of them may be lost.

        While they come, one line of the process stands between two of them.
        """
        return self.missed > 2

    def count_since(self, name: str) -> int:
        """What a counter has counted of this one; nothing before it is told apart from what was there before."""
        return 0 if self._before is None else max(0, super().count_since(name) - self._before.get(name, 0))

    def begin(self, start: RouteStart) -> None:
        """Its `route` line. The policy held when that was written, or the line would not have been."""
        self.start, self.witness, self.missed = start, start.witness, 0
        self.drift_ended(start.at)

    def measure(self, metrics: Metrics) -> None:
        """The same, and what of it is trouble."""
        known = self.metrics or self._earlier
        if known is not None and metrics.start_time > known.start_time:  # removed, and added again: it counts from 0
            self.metrics, self._base, self._before = None, None, {}
        is_first = self.metrics is None and self.start and self._before is not None
        before = self._base.counts if self._base else self._before if is_first else None
        if before is not None:
            self.trouble = _trouble(before, metrics) or self.trouble
        super().measure(metrics)
        self.missed = 0
        if self._before is None:
            self._before = metrics.counts

    def close(self, closed: Closed) -> None:
        """The same, but one that outlives a change from `preserve` to `strip` proves nothing of `strip`."""
        if closed.witness != "none" or not self.start or self.start.mode == "preserve":
            super().close(closed)

    def hear(self, said: Said) -> None:
        """Something was said of it."""
        if said.event == "timestamps_drift":
            self.drift(said)
        if said.level in ("error", "warning"):
            self.trouble = Trouble(said.at, said.level, said.text)


class Process(Watched):
    """One tsproxy: the lines with its pid, since its `start` line or since the first one seen."""

    def __init__(self, pid: int) -> None:
        super().__init__(_HISTORY)
        self.pid = pid
        self.start: Optional[Start] = None
        self.closed: Deque[Closed] = deque(maxlen=_CLOSED)
        self.phase = "relaying"
        self.is_routed = False  # its routes are those of a file, and lines say of which they are
        self._routes: Dict[str, Route] = {}

    @property
    def routes(self) -> List[Route]:
        """Those that are there, in the order of their lines."""
        return [route for route in self._routes.values() if not route.is_gone]

    def is_itself(self, route: Optional[str]) -> bool:
        """Whether a line of that route is of the whole process."""
        return route is None or (route == DEFAULT_ROUTE and not self.is_routed)

    def route(self, name: Optional[str]) -> Optional[Route]:
        """The route of that name, a new one if need be; None where the process itself is meant."""
        if name is None or self.is_itself(name):
            return None
        self.is_routed = True
        return self._routes.get(name) or self._add(Route(name))

    def begin_route(self, start: RouteStart) -> None:
        """A `route` line: a new one, or another of the same name. Its facts go on only if the policy is the same."""
        self.is_routed = True
        route = self._routes.get(start.route)
        if route is None or route.is_gone or route.start is None or route.start.mode != start.mode:
            route = self._add(Route(start.route, route.metrics if route else None))
        route.begin(start)

    def _add(self, route: Route) -> Route:
        """If there are too many, one that is gone leaves, or the oldest."""
        self._routes[route.name] = route
        while len(self._routes) > _ROUTES:
            del self._routes[next((name for name, one in self._routes.items() if one.is_gone), next(iter(self._routes)))]
        return route

    def forget_totals(self) -> None:
        """The same for its routes."""
        super().forget_totals()
        for route in self._routes.values():
            route.forget_totals()

    def measure(self, metrics: Metrics) -> None:
        """Totals of the process, or of a route."""
        route = self.route(metrics.route)
        if route:
            route.measure(metrics)
            return
        self.is_routed = self.is_routed or metrics.route is None
        super().measure(metrics)
        for each in self._routes.values():
            each.missed += 1

    def close(self, closed: Closed) -> None:
        """Note one that ended, for its route too."""
        super().close(closed)
        self.closed.append(closed)
        route = self.route(closed.route)
        if route:
            route.close(closed)

    def hear(self, said: Said) -> None:
        """Something was said to people."""
        route = self.route(said.route)
        if route:
            route.hear(said)
        if said.event == "timestamps_drift":
            if route is None:
                self.drift(said)
            else:
                self.drift_count += said.level == "error"
        elif said.event in ("drain", "stop"):
            self.phase = "draining" if said.event == "drain" else "stopped"


class Model:
    """All that has been said so far."""

    def __init__(self) -> None:
        self.processes: Dict[int, Process] = {}  # the one that began last, or was first heard of last, at the end
        self.messages: Deque[Message] = deque(maxlen=_MESSAGES)
        self.unread: Counter[str] = Counter()
        self.last_unread: Optional[Unread] = None  # the others are counted only: they must not crowd the messages out
        self.last_at = ""

    def feed(self, line: bytes) -> Record:
        """Take one line, whatever is in it; what was read in it."""
        record = read(line)
        if isinstance(record, Metrics) and self._is_of_another(record):
            record = Unread("of an older process with the same pid", "metrics")
        if isinstance(record, Unread):
            self.unread[record.why if len(self.unread) < _REASONS else "unusable"] += 1
            self.last_unread = record
        else:
            self.last_at = record.at
            self._take(record)
        return record

    def skipped(self) -> None:
        """Some lines were left out between the last one and the next."""
        for process in self.processes.values():
            process.forget_totals()

    def _is_of_another(self, metrics: Metrics) -> bool:
        """In containers each tsproxy may be pid 1: the one that began later is the one shown."""
        known = self.processes.get(metrics.pid)
        if known is None or known.metrics is None or not known.is_itself(metrics.route):
            return False
        return metrics.start_time < known.metrics.start_time

    def _take(self, record: Union[Start, RouteStart, Closed, Metrics, Said]) -> None:
        if isinstance(record, Start):
            process = self._begin(record.pid)
            process.start, process.witness, process.is_routed = record, record.witness, record.routes is not None
        elif isinstance(record, RouteStart):
            self._process(record.pid).begin_route(record)
        elif isinstance(record, Closed):
            self._process(record.pid).close(record)
        elif isinstance(record, Metrics):
            self._measured(record).measure(record)
        else:
            self._hear(record)

    def _measured(self, metrics: Metrics) -> Process:
        """Whose totals these are: a successor's if they began anew without a `start` line."""
        process = self._process(metrics.pid)
        if process.metrics and process.is_itself(metrics.route) and metrics.start_time > process.metrics.start_time:
            return self._begin(metrics.pid)
        return process

    def _hear(self, said: Said) -> None:
        times = 1
        if self.messages and self.messages[-1].said._replace(at=said.at) == said:
            times += self.messages.pop().times
        self.messages.append(Message(said, times))
        self._process(said.pid).hear(said)

    def _process(self, pid: int) -> Process:
        return self.processes.get(pid) or self._begin(pid)

    def _begin(self, pid: int) -> Process:
        """A new process; the oldest one goes if there are too many."""
        self.processes.pop(pid, None)
        self.processes[pid] = Process(pid)
        while len(self.processes) > _PROCESSES:
            del self.processes[next(iter(self.processes))]
        return self.processes[pid]


def _trouble(before: Mapping[str, int], metrics: Metrics) -> Optional[Trouble]:
    """The worst counter of trouble that has grown."""
    for name, text, level in TROUBLES:
        grown = metrics.counts.get(name, 0) - before.get(name, 0)
        if grown > 0 and level != "info":
            return Trouble(metrics.at, level, text, grown)
    return None


def _first(metrics: Metrics) -> Interval:
    """Without totals before these: what the line says itself; all of it, if this is the first interval since the start."""
    whole = metrics.interval_s >= 0.98 * metrics.uptime_s
    begun = metrics.counts.get("downstream_cx_total")
    return Interval(
        metrics.interval_s,
        metrics.rx_per_s,
        metrics.tx_per_s,
        begun / metrics.interval_s if whole and begun is not None and metrics.interval_s > 0 else None,
        metrics.counts.get("downstream_cx_active"),
        metrics.relay if whole else None,
        metrics.connect if whole else None,
    )


def _between(before: Metrics, after: Metrics) -> Interval:
    took = after.uptime_s - before.uptime_s
    rx, tx, cx = (_rate(before, after, name, took) for name in TOTALS)
    relay, connect = _since(before.relay, after.relay), _since(before.connect, after.connect)
    return Interval(took, rx, tx, cx, after.counts.get("downstream_cx_active"), relay, connect)


def _rate(before: Metrics, after: Metrics, name: str, took: float) -> Optional[float]:
    old, new = before.counts.get(name), after.counts.get(name)
    if old is None or new is None or took < _SHORTEST_S:
        return None
    return max(0, new - old) / took


def _since(before: Latency, after: Latency) -> Latency:
    """The histogram of what came between two cumulative ones.

    A percentile is its bucket's upper limit, or infinite beyond the last one, but no more than the maximum since the start.
    """
    below = tuple(max(0, new - old) for old, new in zip(before.below, after.below))
    total = max(0, after.total - before.total)
    p50, p99, p999, most = (_limit(below, total, share, after.most) for share in (0.5, 0.99, 0.999, 1.0))
    return Latency(p50, p99, p999, most, below, total)


def _limit(below: Tuple[int, ...], total: int, share: float, most: Optional[float]) -> Optional[float]:
    if not total:
        return None
    within = (float(limit) for limit, reached in zip(LIMITS_US, below) if reached >= share * total)
    limit = next(within, float("inf"))
    return limit if most is None else min(limit, most)
