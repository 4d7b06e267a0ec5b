"""A worker's context without a worker: what test_worker_context, test_splice and test_worker work on, in this process."""

from __future__ import annotations

import contextlib
import os
from typing import Any, Iterator, Sequence

from _tsproxy.linux.addresses import Address
from _tsproxy.linux.sockets import Tuning
from _tsproxy.proxy.context import SessionSettings, WorkerContext
from _tsproxy.stats.counters import SharedCounters
from _tsproxy.stats.records import RecordWriter


@contextlib.contextmanager
def lone_context(
    buffer_size: int, sources: Sequence[Address] = (), gate: Any = None, records: int = -1
) -> Iterator[WorkerContext]:
    """`records` is the descriptor that records go to; without one there must be none."""
    shared_counters = SharedCounters.create(1)
    row = shared_counters.worker(0)
    settings = SessionSettings(Tuning(), 0, 0, 0, log_connections=True, log_debug=False, zero_copy=True)
    context = WorkerContext(0, settings, gate, lambda syn: None, row, RecordWriter(records, row), sources, buffer_size)
    os.close(shared_counters.fd)
    yield context
    context.close()
    vars(context).clear()  # the counters' map goes with its last reference, and its descriptor with it
    del row, shared_counters
