"""How much memory a relay holds: resident, with all its children."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Dict, List


def resident_kib(pid: int) -> int:
    """RSS of the process and its descendants. Pages that a child shares count in each."""
    children = _children()
    family, left = 0, [pid]
    while left:
        member = left.pop()
        family += _rss_kib(member)
        left += children.get(member, [])
    return family


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


def _rss_kib(pid: int) -> int:
    """smaps_rollup is exact; the counter in statm lags behind by some pages for each CPU (proc(5))."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Rss:"):
                return int(line.split()[1])
    except OSError:
        pass  # a kernel before 4.14, or the process has just ended
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024
    except OSError:
        return 0
