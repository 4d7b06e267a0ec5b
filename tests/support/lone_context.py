"""A worker's context without a worker: what test_worker_context, test_splice and test_worker work on, in this process."""

from __future__ import annotations

import contextlib
import os
from typing import Any, Iterator, List, Sequence, Tuple

from _tsproxy.linux.addresses import Address
from _tsproxy.linux.sockets import Tuning
from _tsproxy.proxy.context import RouteContext, SessionSettings, WorkerContext
from _tsproxy.stats.counters import SharedCounters
from _tsproxy.stats.records import RecordWriter


class OneRoute:
    """The contexts of a worker that has one route."""

    def __init__(self, context: RouteContext) -> None:
        self._context = context

    def of(self, number: int) -> RouteContext:
        return self._context

    def in_use(self) -> List[RouteContext]:
        return [self._context]

    def add(self, number: int, fd: int) -> None:
        raise AssertionError("there is one")

    def remove(self, number: int) -> None:
        raise AssertionError("it stays")


@contextlib.contextmanager
def lone_worker(
    buffer_size: int, sources: Sequence[Address] = (), gate: Any = None, records: int = -1
) -> Iterator[Tuple[WorkerContext, RouteContext]]:
    """`records` is the descriptor that records go to; without one there must be none."""
    shared_counters = SharedCounters.create(1)
    row = shared_counters.worker(0)
    settings = SessionSettings(Tuning(), 0, 0, 0, log_connections=True, log_debug=False, zero_copy=True)
    worker = WorkerContext(0, row, RecordWriter(records, row))
    context = RouteContext(worker, settings, gate, lambda syn: None, row, sources, buffer_size)
    os.close(shared_counters.fd)
    yield worker, context
    worker.close()
    for kept in (context, worker):
        vars(kept).clear()  # the counters' map goes with its last reference, and its descriptor with it
    del row, shared_counters


@contextlib.contextmanager
def lone_context(buffer_size: int, sources: Sequence[Address] = (), gate: Any = None) -> Iterator[RouteContext]:
    """The route's alone."""
    with lone_worker(buffer_size, sources, gate) as (_, context):
        yield context
