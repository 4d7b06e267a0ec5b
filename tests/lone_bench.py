"""A worker's bench without a worker: what test_workbench, test_stream and test_worker work on, in this process."""

from __future__ import annotations

import contextlib
import os
from typing import Any, Iterator, Sequence

from _tsproxy.dataplane.workbench import Rules, Workbench
from _tsproxy.host.addresses import Address
from _tsproxy.host.sockets import Tuning
from _tsproxy.telemetry.counters import Ledger
from _tsproxy.telemetry.records import RecordWriter


@contextlib.contextmanager
def lone_bench(buffer_size: int, sources: Sequence[Address] = (), gate: Any = None, records: int = -1) -> Iterator[Workbench]:
    """`records` is the descriptor that records go to; without one there must be none."""
    ledger = Ledger.create(1)
    row = ledger.worker(0)
    rules = Rules(Tuning(), 0, 0, 0, log_connections=True, log_debug=False, zero_copy=True)
    bench = Workbench(0, rules, gate, lambda syn: None, row, RecordWriter(records, row), sources, buffer_size)
    os.close(ledger.fd)
    yield bench
    bench.close()
    vars(bench).clear()  # the ledger's map goes with its last reference, and its descriptor with it
    del row, ledger
