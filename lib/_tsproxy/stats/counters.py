"""Counters in shared memory: one row of 64-bit words for each writer, so no lock is needed.

Each row has one writer: a worker, the acceptor or the reporter. Any thread may read it. The memory is a
memfd (memfd_create(2)), so that a worker in another interpreter or process maps the same rows. Each route has its memory, and
the process one for what is of no route: what the inboxes and the loops count.
"""

from __future__ import annotations

import mmap
import os
import struct
from enum import IntEnum, auto
from typing import List, Tuple

from _tsproxy.linux import memory
from _tsproxy.stats import histogram


class Counter(IntEnum):
    """The words at the start of a row. Counters only grow."""

    ACCEPTED = 0
    OVERFLOW = auto()
    DENIED = auto()
    CLIENT_OVERFLOW = auto()  # the client address is at its limit
    ENDED = auto()
    RECEIVED_DOWNSTREAM = auto()
    RECEIVED_UPSTREAM = auto()
    ACKNOWLEDGED_DOWNSTREAM = auto()  # by the client's kernel, as of the last TCP_INFO
    ACKNOWLEDGED_UPSTREAM = auto()
    CONNECTS = auto()
    CONNECTS_ENDED = auto()
    CONNECT_FAIL = auto()
    CONNECT_TIMEOUT = auto()
    DOWNSTREAM_TIMESTAMPS = auto()
    UPSTREAM_TIMESTAMPS = auto()
    POLICY_REFUSED = auto()  # sessions ended by the policy before a byte was relayed
    POLICY_ENDED = auto()  # and after that
    PAUSED_DOWNSTREAM = auto()
    PAUSED_UPSTREAM = auto()
    RESET_BY_PEER = auto()
    IDLE_TIMEOUT = auto()
    BUGS = auto()
    CONSUMED = auto()  # messages of the inbox
    BEGUN = auto()  # sessions that the worker has begun
    LINES_DROPPED = auto()
    WORKER_RESTARTS = auto()
    LOST_WITH_WORKER = auto()  # sessions whose worker exited without writing their records
    SEGMENTS_SENT = auto()  # of upstream connections, as of the last TCP_INFO
    SEGMENTS_RECEIVED = auto()


# Index of each histogram's first bucket in a row; the word after its last bucket is the maximum, in nanoseconds.
RELAY = len(Counter)
CONNECT = RELAY + histogram.BUCKETS + 1
LOOP_LAG = CONNECT + histogram.BUCKETS + 1
LONGEST_RELAY = RELAY + histogram.BUCKETS
# Index of the first client slot in a worker's row. A slot is two words for one client address: sessions begun, and ended.
# The acceptor's row has none; at this index it holds how many there are, and how many rows, which attaching reads.
_CLIENT_SLOTS = LOOP_LAG + histogram.BUCKETS + 1

_SHAPE = struct.Struct("=QQ")

ACCEPTOR_ROW, REPORTER_ROW, FIRST_WORKER_ROW = 0, 1, 2


class SharedCounters:
    """All rows. `fd` may be passed to another interpreter or process, which attaches to it."""

    def __init__(self, fd: int) -> None:
        """Map the memfd `fd`; the caller keeps the descriptor and closes it."""
        self.fd = fd
        slots, rows = _SHAPE.unpack(os.pread(fd, _SHAPE.size, _CLIENT_SLOTS * 8))
        used, step = _widths(slots)
        words = memoryview(mmap.mmap(fd, rows * step * 8)).cast("Q")
        self.rows = [words[start : start + used] for start in range(0, rows * step, step)]

    @classmethod
    def create(cls, workers: int, client_slots: int = 0, note: bytes = b"") -> SharedCounters:
        """New counters, all zero, for an acceptor, a reporter and `workers` workers. A page takes memory once it is written.

        `note` is for whoever attaches: see note_in().
        """
        size = bytes_for(workers, client_slots)
        fd = memory.create("tsproxy-counters", size + len(note))
        os.pwrite(fd, _SHAPE.pack(client_slots, FIRST_WORKER_ROW + workers), _CLIENT_SLOTS * 8)
        os.pwrite(fd, note, size)
        return cls(fd)

    def close(self) -> None:
        """Close the descriptor. The mapping goes with the last reference to a row."""
        os.close(self.fd)

    def worker(self, index: int) -> memoryview:
        """The row of worker `index`."""
        return self.rows[FIRST_WORKER_ROW + index]

    def total(self, counter: Counter) -> int:
        """The sum of one counter over all rows. Each row is read once, while its writer may go on counting."""
        return sum([row[counter] for row in self.rows])

    def client_ended(self, client_slot: int) -> int:
        """How many sessions of that client have ended, over all workers. `client_slot` as slot_offset() gives it."""
        return sum(row[client_slot + 1] for row in self.rows[FIRST_WORKER_ROW:])

    def count_lost(self, worker: int) -> int:
        """Count the sessions of a worker that has exited as ended, and return how many. No other thread may write its row.

        A worker that accepts by itself may have been killed between counting a client and beginning its session.
        """
        row = self.worker(worker)
        begun = max(row[Counter.BEGUN], row[Counter.ACCEPTED])
        lost = int(begun - row[Counter.ENDED])
        row[Counter.ENDED] = begun
        row[Counter.CONNECTS_ENDED] = row[Counter.CONNECTS]
        row[_CLIENT_SLOTS + 1 :: 2] = row[_CLIENT_SLOTS::2]
        return lost

    def histogram(self, start: int) -> histogram.Counts:
        """The histogram that starts at RELAY, CONNECT or LOOP_LAG, over all workers."""
        return histogram.add(row[start : start + histogram.BUCKETS] for row in self._with_histogram(start))

    def longest_ns(self, start: int) -> int:
        """The longest time in that histogram, over all workers."""
        return max((row[start + histogram.BUCKETS] for row in self._with_histogram(start)), default=0)

    def _with_histogram(self, start: int) -> List[memoryview]:
        """The rows that have such a histogram; of the others little is read: a page that is read takes memory (shmem)."""
        rows = self.rows[REPORTER_ROW if self.rows[REPORTER_ROW][Counter.ENDED] else FIRST_WORKER_ROW :]
        return [row for row in rows if row[start + histogram.BUCKETS] or row[start]]

    def absorb(self, ended: SharedCounters) -> None:
        """Add what other counters have to the reporter's row. Nobody counts there any more."""
        own = self.rows[REPORTER_ROW]
        for counter in Counter:
            own[counter] += ended.total(counter)
        for start in (RELAY, CONNECT, LOOP_LAG):
            for index, count in ended.histogram(start):
                own[start + index] += count
            own[start + histogram.BUCKETS] = max(own[start + histogram.BUCKETS], ended.longest_ns(start))


def observe(row: memoryview, start: int, took_ns: int) -> None:
    """Add a time to a histogram (RELAY, CONNECT or LOOP_LAG) of the caller's own row."""
    row[start + histogram.BUCKETS] = max(row[start + histogram.BUCKETS], took_ns)
    row[start + histogram.bucket(took_ns)] += 1


def note_in(fd: int) -> bytes:
    """What create() was given to go with the counters of this memfd."""
    slots, rows = _SHAPE.unpack(os.pread(fd, _SHAPE.size, _CLIENT_SLOTS * 8))
    start = rows * _widths(slots)[1] * 8
    return os.pread(fd, os.fstat(fd).st_size - start, start)


def bytes_for(workers: int, client_slots: int) -> int:
    """The size of the memfd in bytes."""
    return (FIRST_WORKER_ROW + workers) * _widths(client_slots)[1] * 8


def slot_offset(slot: int) -> int:
    """Index of a client slot in a worker's row: sessions begun; the next word is sessions ended."""
    return _CLIENT_SLOTS + 2 * slot


def _widths(client_slots: int) -> Tuple[int, int]:
    """Words that a row uses, and words between rows: whole pages, so that no cache line has two writers."""
    used, page = slot_offset(client_slots), mmap.PAGESIZE // 8
    return used, ((used + _SHAPE.size // 8) // page + 1) * page
