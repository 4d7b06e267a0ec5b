"""What the last looks showed of each address family, in shared memory: the one decision behind the data path and the lines.

One writer, who looks; any number of readers, in other threads, interpreters and processes. Each answer is one 64-bit
word with the time of its look, so a reader never sees half of one. Readers write only when they last needed a family.
"""

from __future__ import annotations

import mmap
import socket
import time
from enum import IntEnum
from typing import Dict, NamedTuple

from _tsproxy.linux import memory

NAMES: Dict[int, str] = {socket.AF_INET: "IPv4", socket.AF_INET6: "IPv6"}
_PLACES = {family: place for place, family in enumerate(NAMES)}
_NEEDED = len(_PLACES)  # behind the answers: when each family was last needed
_BITS = 3


class Answer(IntEnum):
    """Of one look at one family."""

    NEVER = 0  # not looked at yet
    HOLDS = 1
    FAILS = 2
    UNSEEN = 3  # the look itself failed: neither holds nor fails is known
    ABSENT = 4  # this network namespace has no address of the family, so no SYN can leave over it


class Known(NamedTuple):
    """An answer, and when the look that gave it began (CLOCK_MONOTONIC)."""

    answer: Answer
    at_ns: int


class Evidence:
    """The words. `fd` may be handed to another interpreter or process, which attaches to it."""

    def __init__(self, fd: int) -> None:
        """Attach to the memory behind `fd`; it stays the caller's to close."""
        self.fd = fd
        self._words = memoryview(mmap.mmap(fd, mmap.PAGESIZE)).cast("Q")

    @classmethod
    def create(cls) -> Evidence:
        """New evidence: nothing is known."""
        return cls(memory.create("tsproxy-evidence", mmap.PAGESIZE))

    def publish(self, family: int, answer: Answer, at_ns: int) -> None:
        """The writer's: what a look that began at `at_ns` showed."""
        self._words[_PLACES[family]] = at_ns << _BITS | answer

    def of(self, family: int) -> Known:
        """What is known of a family."""
        word = self._words[_PLACES[family]]
        return Known(_ANSWERS[word & (1 << _BITS) - 1], word >> _BITS)

    def need(self, family: int) -> None:
        """A reader's: this family is in use now."""
        self._words[_NEEDED + _PLACES[family]] = time.monotonic_ns()

    def needed_since(self, family: int, at_ns: int) -> bool:
        """Whether a reader has needed the family since then."""
        return self._words[_NEEDED + _PLACES[family]] > at_ns


_ANSWERS = tuple(Answer)
