"""The line writer on a descriptor of the test's own, with a clock that the test sets."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, Iterator, List

from _tsproxy.stats.line_writer import LineWriter

BACKLOG = 4096


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Station:
    """An outlet with a clock and a count of what it dropped."""

    def __init__(self, fd: int) -> None:
        self.clock, self.dropped, self.put = Clock(), 0, 0
        self.complaints: List[str] = []
        self.outlet = LineWriter(fd, self.clock, self._count, self.complaints.append)

    def _count(self, lines: int) -> None:
        self.dropped += lines

    def say(self, *lines: bytes, **options: Any) -> None:
        for line in lines:
            self.put += 1
            self.outlet.put(line, **options)
        self.outlet.write()

    def later(self) -> None:
        """The time to try again has come."""
        self.clock.now += 1.0
        self.outlet.write()


def lines_of(first: int, count: int, length: int = 100) -> List[bytes]:
    """Lines that can be told from each other."""
    return [f"{number:07d}".encode().ljust(length - 1, b".") + b"\n" for number in range(first, first + count)]


@contextlib.contextmanager
def appending(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)
