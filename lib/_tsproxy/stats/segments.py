"""How many TCP segments a route sends to the exchange in a second, which is what venues limit, and the warning about it.

A worker looks at each session once a second and adds what it has sent since the last look to a counter. Two looks at a session
are a second apart or more. So in less than a second there is at most one look at each session, and the counter's difference is
what all of them sent in one second, as of those looks. A late sample may hold one more look at each session for each second:
its difference is divided by how many. The figure is never more than that of one look at each session, but for a session that
ends, which is looked at once more. It is up to a tenth less where the looks at hundreds of sessions share out the second, and
less after a late sample.

Knows the shared counters of a route, or of all, and a clock. Knows nothing of sessions, of lines, or of who samples.
"""

from __future__ import annotations

import time
from typing import Callable, Dict, Iterable

from _tsproxy.stats import metrics
from _tsproxy.stats.counters import Counter, SharedCounters

_SAMPLE_S = 0.9  # less than a second also if the caller is 0.1 s late
_LINGER_S = 2.0  # longer than the time in which RecordWriter.wake() says nothing again
_WARNING_S = 60.0
_NEVER = float("inf")


class Segments:
    """The segments that a route sends in a second. `limit` is --segments-warning: more than that are too many; 0: none are.

    One thread only may call its methods.
    """

    def __init__(self, counters: Callable[[], Iterable[SharedCounters]], clock: Callable[[], float] = time.monotonic) -> None:
        """`counters` returns those to add up, the same sum from one call to the next. `clock` is in seconds."""
        self.limit = 0
        self._counters, self._clock = counters, clock
        self._sampled_at = self._told_at = clock()
        self._sampled = self._told = self._total()
        self._awake_until = self._sampled_at  # a session is open, or was a moment ago
        self._is_awake = False
        self._warned_at = -_NEVER
        self._most = 0

    @property
    def next_sample(self) -> float:
        """When sample() is due, by the clock; infinity while no session is open."""
        return self._sampled_at + _SAMPLE_S if self._is_awake else _NEVER

    def sample(self, woken: bool = False) -> str:
        """Take a sample if one is due; the text of a warning, or "". Call it at next_sample, and whenever else is convenient.

        `woken`: records have come from workers, so a session has begun or ended. Call it at once then.
        """
        now = self._clock()
        if woken:
            self._awake_until = now + _LINGER_S
        if now < self._sampled_at + _SAMPLE_S and self._is_awake:
            return ""
        if any(map(metrics.active, self._counters())):
            self._awake_until = now + _LINGER_S
        total = self._total()
        sent = self._sent_in_a_second(total, now)
        self._sampled_at, self._sampled = now, total
        self._is_awake = now < self._awake_until
        return self._warning(sent, now)

    def fields(self) -> Dict[str, int]:
        """The two fields of a metrics line: the rate since the last call, which is at least over a second, and the most."""
        now, total = self._clock(), self._total()
        rate = round((total - self._told) / max(now - self._told_at, 1.0))
        self._told_at, self._told = now, total
        self._sent_in_a_second(total, now)  # what was not sampled yet counts, too
        return {"upstream_segments_per_s": rate, "upstream_segments_per_s_max": self._most}

    def _total(self) -> int:
        return sum([counters.total(Counter.SEGMENTS_SENT) for counters in self._counters()])

    def _sent_in_a_second(self, total: int, now: float) -> int:
        """Segments since the last sample, as of one look at each session. While asleep there was nothing to be late for."""
        looks = int(now - self._sampled_at) + 1 if self._is_awake else 1
        sent = (total - self._sampled) // looks
        self._most = max(self._most, sent)
        return sent

    def _warning(self, sent: int, now: float) -> str:
        if not self.limit or sent <= self.limit or now - self._warned_at < _WARNING_S:
            return ""
        self._warned_at = now
        return f"{sent} segments were sent to the exchange in a second; --segments-warning is {self.limit}"
