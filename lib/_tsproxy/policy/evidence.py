"""The answer of the last check of each address family, in shared memory. Gates and log lines rest on the same answer.

One writer, the monitor of the family; any number of readers, in other threads, interpreters and processes. An answer and the
time of its check are one 64-bit word, so no reader sees half of it. Readers write one word more: when a family was last needed.
"""

from __future__ import annotations

import mmap
import socket
import time
from enum import IntEnum
from typing import Dict, NamedTuple

from _tsproxy.linux import memory

FAMILY_NAMES: Dict[int, str] = {socket.AF_INET: "IPv4", socket.AF_INET6: "IPv6"}
_INDEXES = {family: index for index, family in enumerate(FAMILY_NAMES)}
_NEEDED = len(_INDEXES)  # index of the first word after the answers: when each family was last needed
_ANSWER_BITS = 3


class Answer(IntEnum):
    """The result of one check of one family."""

    NEVER = 0  # not checked yet
    HOLDS = 1
    FAILS = 2
    UNSEEN = 3  # the check itself failed: it is not known whether the policy holds
    ABSENT = 4  # this network namespace has no address of the family, so no SYN can leave over it


class DatedAnswer(NamedTuple):
    """An answer, and when the check that gave it began (CLOCK_MONOTONIC)."""

    answer: Answer
    at_ns: int


class Evidence:
    """The shared memory. `fd` may be passed to another interpreter or process, which attaches to it."""

    def __init__(self, fd: int) -> None:
        """Map the memory of `fd`; the caller keeps the descriptor and closes it."""
        self.fd = fd
        self._words = memoryview(mmap.mmap(fd, mmap.PAGESIZE)).cast("Q")

    @classmethod
    def create(cls) -> Evidence:
        """New evidence: NEVER for each family."""
        return cls(memory.create("tsproxy-evidence", mmap.PAGESIZE))

    def publish(self, family: int, answer: Answer, at_ns: int) -> None:
        """Called by the writer: the answer of a check that began at `at_ns`."""
        self._words[_INDEXES[family]] = at_ns << _ANSWER_BITS | answer

    def of(self, family: int) -> DatedAnswer:
        """The answer for a family, and its time."""
        word = self._words[_INDEXES[family]]
        return DatedAnswer(_ANSWERS[word & (1 << _ANSWER_BITS) - 1], word >> _ANSWER_BITS)

    def need(self, family: int) -> None:
        """Called by a reader: note that this family is in use now."""
        self._words[_NEEDED + _INDEXES[family]] = time.monotonic_ns()

    def needed_since(self, family: int, at_ns: int) -> bool:
        """Whether a reader has needed the family since then."""
        return self._words[_NEEDED + _INDEXES[family]] > at_ns


_ANSWERS = tuple(Answer)
