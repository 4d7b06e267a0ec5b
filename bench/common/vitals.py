"""What a relay's processes hold: memory, descriptors, threads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Dict, Iterator, NamedTuple

from common import usage


class Vitals(NamedTuple):
    """Of all processes of a relay together, but for `processes` itself."""

    processes: int
    rss_kib: int
    threads: int
    sockets: int
    pipes: int
    other_fds: int

    def fields(self) -> Dict[str, int]:
        """For a JSON line."""
        return self._asdict()


def of(pid: int) -> Vitals:
    """As they are now."""
    family = usage.family(pid)
    kinds = [kind for member in family for kind in _descriptors(member)]
    sockets, pipes = kinds.count("socket"), kinds.count("pipe")
    threads = sum(_count(f"/proc/{member}/task") for member in family)
    return Vitals(len(family), usage.resident_kib(pid), threads, sockets, pipes, len(kinds) - sockets - pipes)


def _descriptors(pid: int) -> Iterator[str]:
    """The kind of each."""
    place = Path(f"/proc/{pid}/fd")
    try:
        for entry in os.listdir(place):
            try:
                yield os.readlink(place / entry).split(":")[0]
            except OSError:
                pass  # closed meanwhile
    except OSError:
        pass  # the process has just ended


def _count(directory: str) -> int:
    try:
        return len(os.listdir(directory))
    except OSError:
        return 0
