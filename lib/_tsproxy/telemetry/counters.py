"""Counters in shared memory: one row of 64-bit numbers for each writer, so no lock is needed, ever.

A row belongs to one worker (or to the acceptor, or to the reporter); anyone may read it. The memory is a
memfd (memfd_create(2)), so that a worker in another interpreter or process maps the same rows.
"""

from __future__ import annotations

import mmap
import os
from enum import IntEnum, auto

from _tsproxy.telemetry import histogram


class Counter(IntEnum):
    """The slots of a row. Byte counts are by direction; what was sent is what was received less what was withheld."""

    ACCEPTED = 0
    OVERFLOW = auto()
    DENIED = auto()
    ENDED = auto()
    RECEIVED_DOWNSTREAM = auto()
    RECEIVED_UPSTREAM = auto()
    WITHHELD_DOWNSTREAM = auto()  # received from the client and held or discarded
    WITHHELD_UPSTREAM = auto()
    CONNECTS = auto()
    CONNECTS_ENDED = auto()
    CONNECT_FAIL = auto()
    CONNECT_TIMEOUT = auto()
    DOWNSTREAM_TIMESTAMPS = auto()
    UPSTREAM_TIMESTAMPS = auto()
    POLICY_REFUSED = auto()
    PAUSED_DOWNSTREAM = auto()
    PAUSED_UPSTREAM = auto()
    RESET_BY_PEER = auto()
    IDLE_TIMEOUT = auto()
    BUGS = auto()
    TAKEN = auto()  # entries of the inbox
    BEGUN = auto()  # connections that the worker has begun
    LINES_DROPPED = auto()
    WORKER_RESTARTS = auto()


RELAY = len(Counter)  # where the relay_us histogram starts in a row
CONNECT = RELAY + histogram.SLOTS
_SLOTS = CONNECT + histogram.SLOTS
_ROW_BYTES = -(-_SLOTS * 8 // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages: no cache line has two writers

ACCEPTOR_ROW, REPORTER_ROW, FIRST_WORKER_ROW = 0, 1, 2


class Ledger:
    """All rows. `fd` may be handed to another interpreter or process, which attaches to it."""

    def __init__(self, fd: int) -> None:
        """Attach to the memfd `fd`; it stays the caller's to close."""
        self.fd = fd
        size = os.fstat(fd).st_size
        self._map = mmap.mmap(fd, size)
        words = memoryview(self._map).cast("Q")
        step = _ROW_BYTES // 8
        self.rows = [words[start : start + _SLOTS] for start in range(0, size // 8, step)]

    @classmethod
    def create(cls, workers: int) -> Ledger:
        """A new ledger, all zero, for an acceptor, a reporter and `workers` workers."""
        fd = os.memfd_create("tsproxy-counters")
        os.ftruncate(fd, (FIRST_WORKER_ROW + workers) * _ROW_BYTES)
        return cls(fd)

    def worker(self, index: int) -> memoryview:
        """The row that worker `index` writes."""
        return self.rows[FIRST_WORKER_ROW + index]

    def total(self, counter: Counter) -> int:
        """One counter over all rows. Rows may move on while it adds up; each is read once."""
        return sum(row[counter] for row in self.rows)

    def histogram(self, start: int) -> histogram.Counts:
        """The histogram that starts at RELAY or CONNECT, over all workers."""
        return histogram.add(row[start : start + histogram.SLOTS].tolist() for row in self.rows[FIRST_WORKER_ROW:])
