"""What a relay uses, with all its children: resident memory, processor time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Dict, List, Optional


def resident_kib(pid: int) -> int:
    """RSS of the process and its descendants. Pages that a child shares count in each."""
    return sum(map(_rss_kib, family(pid)))


def proportional_kib(pid: int) -> int:
    """PSS of the process and its descendants: a page that several share counts once in all. 0 before Linux 4.14."""
    return sum(_smaps_kib(member, "Pss:") or 0 for member in family(pid))


def cpu_seconds(pid: int) -> float:
    """Processor time so far, user and system, of the process and its descendants, those that have ended included."""
    return sum(map(_cpu_ticks, family(pid))) / os.sysconf("SC_CLK_TCK")


def running_ms(pid: int) -> float:
    """The same in finer steps, but for processes that have ended. 0 where the kernel keeps no schedstat."""
    tasks = [task for member in family(pid) for task in Path(f"/proc/{member}/task").glob("*/schedstat")]
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e6


def switches(pid: int) -> int:
    """How often its threads, and those of its descendants, have gone off a CPU so far: each wake-up ends with one."""
    tasks = [task for member in family(pid) for task in Path(f"/proc/{member}/task").glob("*/status")]
    lines = [line for task in tasks for line in task.read_text().splitlines()]
    return sum(int(line.split()[1]) for line in lines if "ctxt_switches:" in line)


def family(pid: int) -> List[int]:
    """The process and its descendants."""
    children, found = _children(), [pid]
    for member in found:
        found += children.get(member, [])
    return found


def _cpu_ticks(pid: int) -> int:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0  # it has just ended
    return sum(map(int, fields[11:15]))  # utime, stime, and both of the children it has waited for (proc(5))


def _children() -> Dict[int, List[int]]:
    found: Dict[int, List[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                parent = Path("/proc", entry, "stat").read_text().rsplit(")", 1)[1].split()[1]
            except OSError:
                continue  # it has just ended
            found.setdefault(int(parent), []).append(int(entry))
    return found


def _smaps_kib(pid: int, name: str) -> Optional[int]:
    """A line of smaps_rollup; None on a kernel before 4.14, or where the process has just ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(name)), None)


def _rss_kib(pid: int) -> int:
    """smaps_rollup is exact; the counter in statm lags behind by some pages for each CPU (proc(5))."""
    found = _smaps_kib(pid, "Rss:")
    if found is not None:
        return found
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024
    except OSError:
        return 0
