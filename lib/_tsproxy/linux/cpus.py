"""Which CPUs this process may use, and pinning a thread to one (sched_setaffinity(2))."""

from __future__ import annotations

import contextlib
import os
from typing import FrozenSet


def usable() -> FrozenSet[int]:
    """The CPUs of this process's affinity mask."""
    return frozenset(os.sched_getaffinity(0))


def never_preempt() -> None:
    """SCHED_BATCH for the calling thread (sched(7)): when it wakes, it does not interrupt what runs on its CPU.

    Its share of the CPU stays the same, so it can't starve. Without the right to it nothing changes.
    """
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))  # 0 is the calling thread


def pin_this_thread(cpu: int) -> None:
    """Run the calling thread on `cpu` alone. OSError if that CPU is not allowed."""
    os.sched_setaffinity(0, {cpu})  # 0 is the calling thread, not the whole process
