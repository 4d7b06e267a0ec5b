"""Which CPUs this process may use, and pinning a thread to one (sched_setaffinity(2))."""

from __future__ import annotations

import os
from typing import FrozenSet


def usable() -> FrozenSet[int]:
    """The CPUs of this process's affinity mask."""
    return frozenset(os.sched_getaffinity(0))


def pin_this_thread(cpu: int) -> None:
    """Run the calling thread on `cpu` alone. OSError if that CPU is not allowed."""
    os.sched_setaffinity(0, {cpu})  # 0 is the calling thread, not the whole process
