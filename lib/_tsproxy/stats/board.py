"""The counters of all routes and of the process, as the fields of the metrics lines.

A route has a name and, after each change of its options, new counters under the same name: what they counted before goes on
in its lines. Knows counters. Knows nothing of lines, or of when a route ends.
"""

from __future__ import annotations

import time
from typing import Callable, Dict, Iterator, List, Optional, Tuple

from _tsproxy.stats import encoder, metrics
from _tsproxy.stats.counters import SharedCounters
from _tsproxy.stats.encoder import Fields
from _tsproxy.stats.metrics import Reading
from _tsproxy.stats.segments import Segments


class Rates:
    """The times of a metrics line, and the rates since the last one."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started = self._last = clock()
        self._start_time = encoder.Stamps().rfc3339(time.time_ns())
        self._totals: Dict[str, int] = {}

    def fields(self, totals: Dict[str, int]) -> Fields:
        """The times, these totals, and their rates."""
        now, before = self._clock(), self._totals
        interval = max(now - self._last, 1e-6)
        fields: Fields = {
            "start_time": self._start_time,
            "uptime_s": round(now - self._started, 3),
            "interval_s": round(interval, 3),
            **totals,
        }
        for rate, total in (("rx", "downstream_cx_rx_bytes_total"), ("tx", "downstream_cx_tx_bytes_total")):
            fields[f"{rate}_bytes_per_s"] = round((totals[total] - before.get(total, 0)) / interval)
        self._last, self._totals = now, totals
        return fields


class Board:
    """See the module. One thread uses it."""

    def __init__(self, process: SharedCounters, many: bool, clock: Callable[[], float] = time.monotonic) -> None:
        """`process` are the counters of no route. `many`: a line for each route, and one for the process; else one for both."""
        self._process, self._many, self._clock = process, many, clock
        self._rates = Rates(clock)
        self._rates_of: Dict[str, Rates] = {}  # by name
        self._counters: Dict[str, Dict[int, SharedCounters]] = {}  # by name and number, the newest last
        self._segments = Segments(self._all_counters, clock=clock)
        self._segments_of: Dict[str, Segments] = {}

    def add(self, number: int, name: str, counters: SharedCounters, segments_warning: int = 0) -> None:
        """A route, or the next version of one."""
        of_name = self._counters.setdefault(name, {})
        of_name[number] = counters
        self._rates_of.setdefault(name, Rates(self._clock))
        self._segments_of.setdefault(name, Segments(of_name.values, clock=self._clock)).limit = segments_warning

    def _all_counters(self) -> List[SharedCounters]:
        """The process's, and those of each version of each route."""
        return [self._process, *(counters for of_name in self._counters.values() for counters in of_name.values())]

    def end(self, number: int, name: str) -> Optional[Fields]:
        """Nobody counts there any more: keep what was counted, for the route if there is a newer version of it.

        If there is none these are the fields of the route's last line.
        """
        of_name = self._counters[name]
        last = self._line(name, self._reading(name)) if len(of_name) == 1 else None
        ended = of_name.pop(number)
        heirs = list(of_name.values()) or [self._process]
        heirs[-1].absorb(ended)
        ended.close()
        if last:
            del self._counters[name], self._rates_of[name], self._segments_of[name]
        return last

    @property
    def next_sample(self) -> float:
        """When sample() is due, by the clock; infinity while no session is open."""
        return min(segments.next_sample for segments in (self._segments, *self._segments_of.values()))

    def sample(self, woken: bool) -> Iterator[Tuple[str, str]]:
        """See Segments.sample(): the name of each route for which a warning is due, and its text."""
        self._segments.sample(woken)
        for name, segments in self._segments_of.items():
            warning = segments.sample(woken)
            if warning:
                yield name, warning

    def lines(self) -> Iterator[Fields]:
        """The fields of each metrics line, the process's last."""
        readings = {name: self._reading(name) for name in self._counters}
        for name in self._counters if self._many else ():
            yield self._line(name, readings[name])
        route = None if self._many else next(iter(self._counters), None)
        whole = metrics.added([metrics.read(self._process), *readings.values()])  # not read again: it is the sum of the lines
        yield {"route": route, **self._rates.fields(whole.totals), **self._segments.fields(), **metrics.latencies(whole)}

    def _reading(self, name: str) -> Reading:
        return metrics.added([metrics.read(counters) for counters in self._counters[name].values()])

    def _line(self, name: str, reading: Reading) -> Fields:
        times = self._rates_of[name].fields(metrics.without_process(reading.totals))
        return {"route": name, **times, **self._segments_of[name].fields(), **metrics.latencies(reading, metrics.OF_ROUTE)}
