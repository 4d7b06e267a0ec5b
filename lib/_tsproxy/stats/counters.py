"""Counters in shared memory: one row of 64-bit numbers for each writer, so no lock is needed, ever.

A row belongs to one worker (or to the acceptor, or to the reporter); anyone may read it. The memory is a
memfd (memfd_create(2)), so that a worker in another interpreter or process maps the same rows.
"""

from __future__ import annotations

import mmap
import os
import sys
from enum import IntEnum, auto
from typing import Tuple

from _tsproxy.linux import memory
from _tsproxy.stats import histogram


class Counter(IntEnum):
    """The slots of a row. Each only ever grows."""

    ACCEPTED = 0
    OVERFLOW = auto()
    DENIED = auto()
    CLIENT_OVERFLOW = auto()  # the client address has its share already
    ENDED = auto()
    RECEIVED_DOWNSTREAM = auto()
    RECEIVED_UPSTREAM = auto()
    ACKNOWLEDGED_DOWNSTREAM = auto()  # by the client's kernel, as of the last look
    ACKNOWLEDGED_UPSTREAM = auto()
    CONNECTS = auto()
    CONNECTS_ENDED = auto()
    CONNECT_FAIL = auto()
    CONNECT_TIMEOUT = auto()
    DOWNSTREAM_TIMESTAMPS = auto()
    UPSTREAM_TIMESTAMPS = auto()
    POLICY_REFUSED = auto()  # before a byte was relayed
    POLICY_ENDED = auto()  # later
    PAUSED_DOWNSTREAM = auto()
    PAUSED_UPSTREAM = auto()
    RESET_BY_PEER = auto()
    IDLE_TIMEOUT = auto()
    BUGS = auto()
    CONSUMED = auto()  # entries of the inbox
    BEGUN = auto()  # connections that the worker has begun
    LINES_DROPPED = auto()
    WORKER_RESTARTS = auto()
    LOST_WITH_WORKER = auto()  # connections whose worker died: nobody wrote a line for them


# Where the histograms start in a row; behind each stands the longest time itself, in nanoseconds.
RELAY = len(Counter)
CONNECT = RELAY + histogram.SLOTS + 1
LOOP_LAG = CONNECT + histogram.SLOTS + 1
LONGEST_RELAY = RELAY + histogram.SLOTS
# Where a worker's pairs start, one for a client address: its connections begun, and ended. The acceptor has none; in
# their place stands how many there are, for who attaches.
_CLIENTS = LOOP_LAG + histogram.SLOTS + 1

ACCEPTOR_ROW, REPORTER_ROW, FIRST_WORKER_ROW = 0, 1, 2


class SharedCounters:
    """All rows. `fd` may be handed to another interpreter or process, which attaches to it."""

    def __init__(self, fd: int) -> None:
        """Attach to the memfd `fd`; it stays the caller's to close."""
        self.fd = fd
        size = os.fstat(fd).st_size
        self._map = mmap.mmap(fd, size)
        words = memoryview(self._map).cast("Q")
        used, step = _widths(words[_CLIENTS])
        self.rows = [words[start : start + used] for start in range(0, size // 8, step)]

    @classmethod
    def create(cls, workers: int, client_slots: int = 0) -> SharedCounters:
        """New counters, all zero, for an acceptor, a reporter and `workers` workers; pages take memory once written."""
        fd = memory.create("tsproxy-counters", bytes_for(workers, client_slots))
        if client_slots:
            os.pwrite(fd, client_slots.to_bytes(8, sys.byteorder), _CLIENTS * 8)
        return cls(fd)

    def worker(self, index: int) -> memoryview:
        """The row that worker `index` writes."""
        return self.rows[FIRST_WORKER_ROW + index]

    def total(self, counter: Counter) -> int:
        """One counter over all rows. Rows may move on while it adds up; each is read once."""
        return sum([row[counter] for row in self.rows])

    def client_ended(self, pair: int) -> int:
        """How many connections have ended of the client whose pair that is, over all workers."""
        return sum(row[pair + 1] for row in self.rows[FIRST_WORKER_ROW:])

    def write_off(self, worker: int) -> int:
        """A dead worker's connections are closed: count them as ended; how many. Its row must have no other writer now.

        One that accepts by itself may have been killed after it had counted a client, and before it began with it.
        """
        row = self.worker(worker)
        begun = max(row[Counter.BEGUN], row[Counter.ACCEPTED])
        lost = int(begun - row[Counter.ENDED])
        row[Counter.ENDED] = begun
        row[Counter.CONNECTS_ENDED] = row[Counter.CONNECTS]
        row[_CLIENTS + 1 :: 2] = row[_CLIENTS::2]
        return lost

    def histogram(self, start: int) -> histogram.Counts:
        """The histogram that starts at RELAY, CONNECT or LOOP_LAG, over all workers."""
        return histogram.add(row[start : start + histogram.SLOTS] for row in self.rows[FIRST_WORKER_ROW:])

    def longest_ns(self, start: int) -> int:
        """The longest time in that histogram, over all workers."""
        return max(row[start + histogram.SLOTS] for row in self.rows[FIRST_WORKER_ROW:])


def note(row: memoryview, start: int, took_ns: int) -> None:
    """Count a time in one of the histograms of the caller's own row."""
    row[start + histogram.SLOTS] = max(row[start + histogram.SLOTS], took_ns)
    row[start + histogram.slot(took_ns)] += 1


def bytes_for(workers: int, client_slots: int) -> int:
    """How large the memfd is."""
    return (FIRST_WORKER_ROW + workers) * _widths(client_slots)[1] * 8


def slot_offset(slot: int) -> int:
    """Where in a worker's row the pair of a client address stands: connections begun, and behind it connections ended."""
    return _CLIENTS + 2 * slot


def _widths(client_slots: int) -> Tuple[int, int]:
    """How many words a row uses, and how many it takes: whole pages, so that no cache line has two writers."""
    used, page = slot_offset(client_slots), mmap.PAGESIZE // 8
    return used, (used // page + 1) * page
