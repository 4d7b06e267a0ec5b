"""The reporter thread, the only writer of standard output: reads records, sums counters, encodes lines. Nothing waits for it.

Knows the shared counters, the record pipe and the line writer. Knows nothing of sockets, sessions or the cause of an event.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import threading
import time
from collections import deque
from functools import partial
from typing import Any, Callable, Deque, Dict, Optional, Sequence, Tuple

from _tsproxy.cli import program
from _tsproxy.linux import needs, wakeup
from _tsproxy.stats import connection_line, encoder
from _tsproxy.stats.board import Board
from _tsproxy.stats.counters import REPORTER_ROW, Counter, SharedCounters
from _tsproxy.stats.encoder import Fields
from _tsproxy.stats.endings import ENDING_FIELDS
from _tsproxy.stats.line_writer import RESERVE, LineWriter
from _tsproxy.stats.records import NOTICE_LEVELS, ConnectionRecord, Record, RecordPipe, decode

_POLL_INTERVAL_MS = 10.0
_MAX_TIMEOUT_MS = 60_000.0
_STALLED_S = 1.0  # the last lines wait no longer for a reader that takes none
_SLOW_S = 3.0  # nor for one that takes some
_STUCK_S = 2.0  # a reporter that makes no line, and has none taken, for so long at the end is in a write(2) that blocks
_RESERVES = {"metrics": RESERVE // 2}  # so that a line of each of many routes does not displace `stop`
_LATE_NAMES = 65536  # of ended routes that stay known


class Reporter:
    """Writes JSON lines to a descriptor. Any thread of this interpreter may call all methods but run()."""

    def __init__(
        self,
        fd: int,
        shared_counters: SharedCounters,
        pipe: RecordPipe,
        *,
        level: str = "info",
        interval_s: float = 10.0,
        witness_names: Sequence[str] = ("none",),
        many: bool = False,
    ) -> None:
        """`shared_counters` are the process's. `witness_names` has this field of a line, by the number in its record.

        `many`: there is a file of routes, and a metrics line for each.
        """
        self._shared_counters, self._pipe, self._interval_s = shared_counters, pipe, interval_s
        self._witness_names = witness_names
        self._route_names: Dict[int, str] = {}  # by the number in a record
        self._board = Board(shared_counters, many)
        self._board_changes: Deque[Callable[[], None]] = deque()
        self._threshold = NOTICE_LEVELS.index(level)
        self._line_writer = LineWriter(fd, time.monotonic, self._count_dropped, _log_to_stderr)
        self._log_queue: Deque[Tuple[int, str, str, Fields]] = deque()
        self._wakeup = wakeup.create()
        self._metrics_wanted = False  # by metrics_now()
        self._metrics_end = 0  # LineWriter.lines_put after the last metrics lines
        self._stop_fields: Optional[Fields] = None  # once close() was called; empty: no `stop` line
        self._partial_record = b""
        self._stamps = encoder.Stamps()
        self._next_metrics = time.monotonic() + interval_s if interval_s else float("inf")
        self._poller = select.poll()
        self._poller.register(self._wakeup.reader, select.POLLIN)
        self._records_arriving = False
        self._thread = threading.Thread(target=self.run, name="reporter", daemon=True)

    def start(self) -> None:
        """Start the thread. Refused if it can't be started."""
        with needs.needing("poll(2)", "to write the lines"):
            self._poller.poll(0)  # fails here if a sandbox refuses poll(2)
        needs.start_thread(self._thread, "to write the lines")

    def log(self, event: str, level: str = "info", **fields: Any) -> None:
        """Queue one line. Never blocks."""
        self._log_queue.append((time.time_ns(), level, event, fields))
        self._wakeup.wake()

    def add_route(self, number: int, name: str, counters: SharedCounters, segments_warning: int = 0) -> None:
        """Tell of a route too, before a record of it can come. `counters` are the reporter's to close, after end_route()."""
        self._route_names[number] = name
        self._board_changes.append(partial(self._board.add, number, name, counters, segments_warning))

    def end_route(self, number: int) -> None:
        """Its last session has ended. Its name stays known, for a record that is late."""
        self._board_changes.append(partial(self._put_last, number, self._route_names[number]))
        self._route_names.pop(number - _LATE_NAMES, None)
        self._wakeup.wake()  # without metrics lines it might sleep for long, with the route's memory

    def metrics_now(self) -> None:
        """Have a `metrics` line made for each route, with the counters of then, once those made before are written.

        Calls until then are one, as signals of one kind are while they are pending (signal(7)).
        """
        if not self._metrics_wanted:
            self._metrics_wanted = True
            self._wakeup.wake()

    def close(self, **stop: Any) -> None:
        """Write what is queued and, with fields for it, a `stop` line; `uptime_s` is added. Nothing comes behind it.

        Waits while lines are read, 3 seconds at most, but 1 second while none is; then the rest is dropped, counted, and said
        on standard error.
        """
        self._stop_fields, progress = stop, (-1, -1)
        self._wakeup.wake()
        while self._thread.is_alive() and progress != self._line_writer.progress:
            progress = self._line_writer.progress
            self._thread.join(_STUCK_S)
        if self._thread.is_alive():
            _log_to_stderr(f"it took no line for {_STUCK_S:g} s; the last ones are lost")

    def run(self) -> None:
        """The thread: encode, write, wait, until close() was called and all lines are written."""
        patience: Optional[_Patience] = None
        while not (patience and patience.is_over(self._line_writer.lines_taken)):
            self._wakeup.collect()
            # Read it after collect(), which may clear the wake-up of close(), and before encoding what was queued until then.
            stop = self._stop_fields
            if stop is None:
                self._encode_waiting()
            elif patience is None:
                self._encode_last(stop)
                patience = _Patience(time.monotonic, self._line_writer.lines_taken)
            self._line_writer.write()
            if stop is not None and self._line_writer.is_empty:
                return
            if stop is self._stop_fields:
                self._wait()
        lost = self._line_writer.discard_queue()
        _log_to_stderr(f"lines that it did not take within {patience.limit_s:g} s, and that are lost: {lost:,}")

    def _wait(self) -> None:
        """poll(2) until there is something to encode, POLLOUT, or a metrics line or a sample of segments is due.

        While records arrive, the pipe is read every 10 ms instead: a wake-up for each record would take CPU time from workers.
        """
        waiting = {} if self._records_arriving else {self._pipe.reader: select.POLLIN}
        if self._line_writer.awaits_pollout:
            waiting[self._line_writer.fd] = select.POLLOUT
        for fd, events in waiting.items():
            self._poller.register(fd, events)
        self._poller.poll(min(self._timeout_ms(), _POLL_INTERVAL_MS if self._records_arriving else _MAX_TIMEOUT_MS))
        for fd in waiting:
            self._poller.unregister(fd)

    def _timeout_ms(self) -> float:
        """Until the next metrics line or sample of segments is due; at most 250 ms while lines are queued."""
        if self._may_answer:
            return 0.0
        wait = min(self._next_metrics, self._board.next_sample) - time.monotonic()
        if not self._line_writer.is_empty:
            wait = min(wait, 0.25)
        return max(0.0, wait) * 1000

    def _encode_last(self, stop: Fields) -> None:
        """Encode all that is queued, metrics lines that were asked for, however many lines there are, and the `stop` line."""
        self._metrics_end = 0
        self._encode_waiting()
        if stop:
            self._put_line(time.time_ns(), "info", "stop", {**stop, "uptime_s": self._board.uptime_s})

    def _encode_waiting(self) -> None:
        """Encode all that is queued: records, events, and metrics lines, which are as of now, and so come last."""
        waiting = len(self._log_queue)
        while self._board_changes:
            self._board_changes.popleft()()
        self._records_arriving = False
        for data in self._pipe.read():
            self._records_arriving = True
            records, self._partial_record = decode(self._partial_record + data)
            for record in records:
                self._put_checked(record)
            self._line_writer.write()  # a burst may be more lines than the line writer queues
        self._sample_segments()
        for _ in range(waiting):
            self._put_line(*self._log_queue.popleft())
        is_due = time.monotonic() >= self._next_metrics
        if is_due:
            self._next_metrics = time.monotonic() + self._interval_s
        if is_due or self._may_answer:
            self._put_metrics()

    def _put_checked(self, record: Record) -> None:
        """A record is untrusted input: one that can't be encoded becomes an `error` line, and the others are written."""
        try:
            self._put_record(record)
        except Exception as problem:
            message = f"a record can't be told: {problem!r}: {record!r}"
            self._put_line(time.time_ns(), "error", "error", {"worker": record.worker, "message": message})

    def _put_record(self, record: Record) -> None:
        if isinstance(record, ConnectionRecord):
            self._put_connection(record)
        else:
            event = record.level if record.level in ("warning", "error") else "debug"
            about = {} if record.route is None else {"route": self._route_names[record.route]}
            self._put_line(record.at_ns, record.level, event, {**about, "worker": record.worker, "message": record.message})

    def _put_connection(self, record: ConnectionRecord) -> None:
        if NOTICE_LEVELS.index(ENDING_FIELDS[record.ending].level) >= self._threshold:
            timestamp = self._stamps.rfc3339(record.closed_at_ns)
            names = self._witness_names[record.witness], self._route_names[record.route]
            self._line_writer.put(connection_line.encode(record, timestamp, os.getpid(), *names))

    def _put_last(self, number: int, name: str) -> None:
        """The last metrics line of a route that is gone."""
        fields = self._board.end(number, name)
        if fields:
            self._put_line(time.time_ns(), "info", "metrics", fields)

    def _sample_segments(self) -> None:
        for route, warning in self._board.sample(woken=self._records_arriving):
            self._put_line(time.time_ns(), "warning", "warning", {"route": route, "message": warning})

    @property
    def _may_answer(self) -> bool:
        """Whether metrics lines were asked for, and those made before are written: more would displace other lines."""
        return self._metrics_wanted and self._line_writer.lines_taken >= self._metrics_end

    def _put_metrics(self) -> None:
        self._metrics_wanted = False  # before the counters are read: who asks meanwhile gets others
        at_ns = time.time_ns()
        for fields in self._board.lines():
            self._put_line(at_ns, "info", "metrics", fields)
            self._line_writer.write()  # many routes are more lines than a pipe holds
        self._metrics_end = self._line_writer.lines_put

    def _put_line(self, at_ns: int, level: str, event: str, fields: Fields) -> None:
        if NOTICE_LEVELS.index(level) < self._threshold:
            return
        timestamp = self._stamps.rfc3339(at_ns)
        line = encoder.line({"timestamp": timestamp, "level": level, "event": event, "pid": os.getpid(), **fields})
        self._line_writer.put(line, _RESERVES.get(event, RESERVE))

    def _count_dropped(self, lines: int) -> None:
        self._shared_counters.rows[REPORTER_ROW][Counter.LINES_DROPPED] += lines


class _Patience:
    """How long the last lines wait for their reader: while it takes some, and not for ever. `clock` is in seconds."""

    def __init__(self, clock: Callable[[], float], taken: int) -> None:
        self._clock, self._taken = clock, taken
        self._slow_at = clock() + _SLOW_S
        self._stalled_at = clock() + _STALLED_S

    def is_over(self, taken: int) -> bool:
        """`taken`: how many lines were taken until now."""
        if taken != self._taken:
            self._taken, self._stalled_at = taken, self._clock() + _STALLED_S
        return self._clock() >= min(self._slow_at, self._stalled_at)

    @property
    def limit_s(self) -> float:
        """The one that comes first."""
        return _SLOW_S if self._slow_at < self._stalled_at else _STALLED_S


def _log_to_stderr(problem: str) -> None:
    """Write why standard output failed to standard error, if poll(2) says that it does not block."""
    if sys.stderr is None:
        return
    with contextlib.suppress(OSError):
        poller = select.poll()
        poller.register(sys.stderr, select.POLLOUT)
        if poller.poll(0):
            os.write(sys.stderr.fileno(), f"{program.name()}: standard output: {problem}\n".encode())
