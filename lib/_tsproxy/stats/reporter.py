"""The one thread that writes standard output: it adds up, encodes and writes, and nobody waits for it.

Knows the shared counters, the record pipe and the line writer. Knows nothing of sockets, relays or why a thing happened.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import threading
import time
from collections import deque
from typing import Any, Callable, Deque, Dict, Optional, Sequence, Tuple

from _tsproxy.cli import program
from _tsproxy.linux import needs, wakeup
from _tsproxy.stats import encoder, metrics
from _tsproxy.stats.counters import REPORTER_ROW, Counter, SharedCounters
from _tsproxy.stats.endings import WORDS
from _tsproxy.stats.line_writer import LineWriter
from _tsproxy.stats.records import NOTICE_LEVELS, ConnectionRecord, Record, RecordPipe, decode

Fields = Dict[str, Any]
_PACE_MS = 10.0
_LONGEST_MS = 60_000.0
_LINGER_S = 1.0  # how long the last lines may wait for a reader that has stalled


class Reporter:
    """Writes JSON lines to a descriptor. All methods but run() may be called from any thread of this interpreter."""

    def __init__(
        self,
        fd: int,
        shared_counters: SharedCounters,
        pipe: RecordPipe,
        *,
        level: str = "info",
        interval_s: float = 10.0,
        witness_words: Sequence[str] = ("none",),
    ) -> None:
        """`witness_words` turns the witness number in a record into its word."""
        self._counters_of_all, self._pipe, self._interval_s = shared_counters, pipe, interval_s
        self._witness_words = witness_words
        self._threshold = NOTICE_LEVELS.index(level)
        self._outlet = LineWriter(fd, time.monotonic, self._count_dropped, _say_aside)
        self._said: Deque[Tuple[int, str, str, Fields]] = deque()
        self._wakeup = wakeup.create()
        self._closing_until: Optional[float] = None
        self._rest = b""
        self._stamps = encoder.Stamps()
        self._rates = Rates(shared_counters)
        self._next_metrics = time.monotonic() + interval_s if interval_s else float("inf")
        self._poller = select.poll()
        self._poller.register(self._wakeup.reader, select.POLLIN)
        self._records_come = False
        self._thread = threading.Thread(target=self.run, name="reporter", daemon=True)

    def start(self) -> None:
        """Begin writing. Refused if there can't be a thread for it."""
        with needs.needing("poll(2)", "to write the lines"):
            self._poller.poll(0)  # where a sandbox refuses it, that is told here
        needs.start_thread(self._thread, "to write the lines")

    def log(self, event: str, level: str = "info", **fields: Any) -> None:
        """Queue one line. Never blocks."""
        self._said.append((time.time_ns(), level, event, fields))
        self._wakeup.ring()

    def metrics_now(self) -> None:
        """Queue a `metrics` line; its figures are those of the moment it is written."""
        self._said.append((time.time_ns(), "info", "metrics", {}))
        self._wakeup.ring()

    def close(self) -> None:
        """Write what is queued, wait at most a second for a stalled reader, then give up and count the rest."""
        self._closing_until = time.monotonic() + _LINGER_S
        self._wakeup.ring()
        self._thread.join(2 * _LINGER_S)

    def run(self) -> None:
        """The thread: gather, write, wait, until closed and empty."""
        while True:
            self._wakeup.collect()
            # After collect(), which may take the ring of close(); before gathering what was queued before close().
            closing_until = self._closing_until
            self._gather()
            self._outlet.write()
            if closing_until is not None and (self._outlet.is_empty or time.monotonic() > closing_until):
                break
            if closing_until is self._closing_until:
                self._wait()
        self._outlet.give_up()

    def _wait(self) -> None:
        """Sleep until there is something to gather, room to write, or a metrics line is due.

        While records come, they are looked for by the clock: to wake for each one would take the CPU from the relays.
        """
        waiting = {} if self._records_come else {self._pipe.reader: select.POLLIN}
        if self._outlet.wants_room:
            waiting[self._outlet.fd] = select.POLLOUT
        for fd, events in waiting.items():
            self._poller.register(fd, events)
        self._poller.poll(min(self._patience_ms(), _PACE_MS if self._records_come else _LONGEST_MS))
        for fd in waiting:
            self._poller.unregister(fd)

    def _patience_ms(self) -> float:
        """How long to sleep: to the next metrics line, or a look at a stalled writer."""
        wait = self._next_metrics - time.monotonic()
        if not self._outlet.is_empty:
            wait = min(wait, 0.25)
        return max(0.0, wait) * 1000

    def _gather(self) -> None:
        """Turn all that is waiting into lines; records first, so that a last `metrics` or `stop` line comes after them."""
        waiting = len(self._said)
        self._records_come = False
        for data in self._pipe.read():
            self._records_come = True
            records, self._rest = decode(self._rest + data)
            for record in records:
                self._checked(record)
            self._outlet.write()  # a burst may be more than the line writer keeps
        if time.monotonic() >= self._next_metrics:
            self._next_metrics = time.monotonic() + self._interval_s
            self._metrics(time.time_ns())
        for _ in range(waiting):
            at_ns, level, event, fields = self._said.popleft()
            if event == "metrics":
                self._metrics(at_ns)
            else:
                self._line(at_ns, level, event, fields)

    def _checked(self, record: Record) -> None:
        """What a worker wrote is input from outside: whatever is wrong with one record costs that one its line, no more."""
        try:
            self._record(record)
        except Exception as problem:
            message = f"a record can't be told: {problem!r}: {record!r}"
            self._line(time.time_ns(), "error", "error", {"worker": record.worker, "message": message})

    def _record(self, record: Record) -> None:
        if isinstance(record, ConnectionRecord):
            fields = record.fields()
            fields["witness"] = self._witness_words[record.witness]
            self._line(record.closed_at_ns, WORDS[record.ending].level, "connection", fields)
        else:
            event = record.level if record.level in ("warning", "error") else "debug"
            self._line(record.at_ns, record.level, event, {"worker": record.worker, "message": record.message})

    def _metrics(self, at_ns: int) -> None:
        fields = self._rates.fields()
        fields.update(metrics.latencies(self._counters_of_all))
        self._line(at_ns, "info", "metrics", fields)

    def _line(self, at_ns: int, level: str, event: str, fields: Fields) -> None:
        if NOTICE_LEVELS.index(level) < self._threshold:
            return
        timestamp = self._stamps.rfc3339(at_ns)
        line = encoder.line({"timestamp": timestamp, "level": level, "event": event, "pid": os.getpid(), **fields})
        self._outlet.put(line, seldom=event != "connection")

    def _count_dropped(self, lines: int) -> None:
        self._counters_of_all.rows[REPORTER_ROW][Counter.LINES_DROPPED] += lines


def _say_aside(problem: str) -> None:
    """What can't be said on standard output, on standard error, if that takes it now: nobody waits for it."""
    if sys.stderr is None:
        return
    with contextlib.suppress(OSError):
        room = select.poll()
        room.register(sys.stderr, select.POLLOUT)
        if room.poll(0):
            os.write(sys.stderr.fileno(), f"{program.name()}: standard output: {problem}\n".encode())


class Rates:
    """The totals now, and the rates since the last time they were asked for."""

    def __init__(self, shared_counters: SharedCounters, clock: Callable[[], float] = time.monotonic) -> None:
        self._counters_of_all, self._clock = shared_counters, clock
        self._started = self._last = clock()
        self._start_time = encoder.Stamps().rfc3339(time.time_ns())
        self._totals = metrics.totals(shared_counters)

    def fields(self) -> Fields:
        """The head and the counters of a metrics line."""
        now, totals, before = self._clock(), metrics.totals(self._counters_of_all), self._totals
        interval = max(now - self._last, 1e-6)
        fields: Fields = {
            "start_time": self._start_time,
            "uptime_s": round(now - self._started, 3),
            "interval_s": round(interval, 3),
            **totals,
        }
        for rate, total in (("rx", "downstream_cx_rx_bytes_total"), ("tx", "downstream_cx_tx_bytes_total")):
            fields[f"{rate}_bytes_per_s"] = round((totals[total] - before[total]) / interval)
        self._last, self._totals = now, totals
        return fields
