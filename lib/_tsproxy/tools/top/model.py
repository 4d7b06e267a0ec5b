"""What the lines say when they are put together: rates, the latency of the last interval, the newest process, its troubles.

Knows records and their order. Knows nothing of terminals, files or this host's clock. What it keeps is bounded, however
long the stream is.
"""

from __future__ import annotations

from collections import deque
from typing import Counter, Deque, Dict, List, NamedTuple, Optional, Tuple, Union

from _tsproxy.stats.histogram import LIMITS_US
from _tsproxy.tools.top.lines import Closed, Latency, Metrics, Record, Said, Start, Unread, read

_HISTORY = 512  # intervals; more than a terminal has columns
_CLOSED = 200
_MESSAGES = 200
_PROCESSES = 16
_REASONS = 32  # kinds of unusable lines that are told apart
_SHORTEST_S = 0.1  # a rate over less (two SIGUSR1 in a row) would be noise
TOTALS = ("downstream_cx_rx_bytes_total", "downstream_cx_tx_bytes_total", "downstream_cx_total")


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


class Process:
    """One tsproxy: the lines with its pid, since its `start` line or since the first one seen."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.start: Optional[Start] = None
        self.metrics: Optional[Metrics] = None
        self.intervals: Deque[Interval] = deque(maxlen=_HISTORY)
        self.closed: Deque[Closed] = deque(maxlen=_CLOSED)
        self.phase = "relaying"
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
        self.closed.append(closed)
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
        elif self.drifted_since:
            self.drifts[-1] = (self.drifts[-1][0], said.at)


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
        return bool(known and known.metrics and metrics.start_time < known.metrics.start_time)

    def _take(self, record: Union[Start, Closed, Metrics, Said]) -> None:
        if isinstance(record, Start):
            process = self._begin(record.pid)
            process.start, process.witness = record, record.witness
        elif isinstance(record, Closed):
            self._process(record.pid).close(record)
        elif isinstance(record, Metrics):
            self._measured(record).measure(record)
        else:
            self._hear(record)

    def _measured(self, metrics: Metrics) -> Process:
        """Whose totals these are: a successor's if they began anew without a `start` line."""
        process = self._process(metrics.pid)
        if process.metrics and metrics.start_time > process.metrics.start_time:
            return self._begin(metrics.pid)
        return process

    def _hear(self, said: Said) -> None:
        process = self._process(said.pid)
        times = 1
        if self.messages and self.messages[-1].said._replace(at=said.at) == said:
            times += self.messages.pop().times
        self.messages.append(Message(said, times))
        if said.event == "timestamps_drift":
            process.drift(said)
        elif said.event in ("drain", "stop"):
            process.phase = "draining" if said.event == "drain" else "stopped"

    def _process(self, pid: int) -> Process:
        return self.processes.get(pid) or self._begin(pid)

    def _begin(self, pid: int) -> Process:
        """A new process; the oldest one goes if there are too many."""
        self.processes.pop(pid, None)
        self.processes[pid] = Process(pid)
        while len(self.processes) > _PROCESSES:
            del self.processes[next(iter(self.processes))]
        return self.processes[pid]


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
