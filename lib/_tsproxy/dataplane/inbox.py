"""What the acceptor hands to a worker: accepted descriptors and orders, through a lock-free ring in shared memory.

One producer, one consumer. The wake-up counts the entries that were put, and the kernel's own locking of that
counter is the memory barrier between writing an entry and reading it: the consumer never looks at an entry that
it was not told of. Put, then always wake; the reader clears the wake-up, then takes as many as it counted.
"""

from __future__ import annotations

import mmap
import os
import struct
from typing import List, NamedTuple

from _tsproxy.host import wakeup
from _tsproxy.host.addresses import PACKED_SIZE
from _tsproxy.host.wakeup import Wakeup

CAPACITY = 1024
_SLOT = 512
_TAKEN = 0  # the header's only word: how many entries the consumer has taken, ever
_HEADER = mmap.PAGESIZE
_ENTRY = struct.Struct(f"=BiQqH{PACKED_SIZE}s")
MOST_UPSTREAMS = (_SLOT - _ENTRY.size) // PACKED_SIZE

ACCEPTED, DRAIN, KILL, DRIFTED_CONNECTING, DRIFTED_ALL, PING = range(6)


class Entry(NamedTuple):
    """An accepted client (its descriptor goes over to the worker) with the upstream addresses to try, or an order."""

    kind: int
    fd: int = -1
    connection_id: int = 0
    accepted_ns: int = 0  # CLOCK_MONOTONIC
    client: bytes = bytes(PACKED_SIZE)
    upstreams: bytes = b""  # packed addresses, one after the other, at most MOST_UPSTREAMS

    def encode(self) -> bytes:
        """At most one slot of bytes."""
        head = (self.kind, self.fd, self.connection_id, self.accepted_ns, len(self.upstreams), self.client)
        return _ENTRY.pack(*head) + self.upstreams

    @classmethod
    def decode(cls, data: bytes) -> Entry:
        """The entry in a slot."""
        kind, fd, connection_id, accepted_ns, length, client = _ENTRY.unpack_from(data)
        upstreams = data[_ENTRY.size : _ENTRY.size + length]
        return cls(kind, fd, connection_id, accepted_ns, client, upstreams)


class Ring(NamedTuple):
    """What both sides need to map the ring: plain numbers, so it can be handed to another interpreter."""

    memory: int
    bell: Wakeup


class Producer:
    """The acceptor's side."""

    def __init__(self, ring: Ring) -> None:
        self._bell = ring.bell
        self._map = mmap.mmap(ring.memory, 0)
        self._words = memoryview(self._map)[:_HEADER].cast("Q")
        self._put = 0

    def put(self, entry: Entry) -> bool:
        """Hand over one entry and wake the worker; False, with nothing done, if the ring is full."""
        if self._put - self._words[_TAKEN] >= CAPACITY:
            return False
        data = entry.encode()
        start = _HEADER + (self._put % CAPACITY) * _SLOT
        self._map[start : start + len(data)] = data
        self._put += 1
        self._bell.ring()
        return True

    @property
    def is_empty(self) -> bool:
        """Whether the worker has taken all that was put."""
        return self._put == self._words[_TAKEN]


class Consumer:
    """The worker's side."""

    def __init__(self, ring: Ring) -> None:
        self._bell = ring.bell
        self._map = mmap.mmap(ring.memory, 0)
        self._words = memoryview(self._map)[:_HEADER].cast("Q")
        self.fileno = ring.bell.reader

    def take(self) -> List[Entry]:
        """All entries put so far, in order; empty if the wake-up was for nothing."""
        first = self._words[_TAKEN]
        entries = [self._at(first + offset) for offset in range(self._bell.collect())]
        self._words[_TAKEN] = first + len(entries)
        return entries

    def _at(self, number: int) -> Entry:
        start = _HEADER + (number % CAPACITY) * _SLOT
        return Entry.decode(self._map[start : start + _SLOT])


def create() -> Ring:
    """A new, empty ring."""
    memory = os.memfd_create("tsproxy-inbox")
    os.ftruncate(memory, _HEADER + CAPACITY * _SLOT)
    return Ring(memory, wakeup.create())
