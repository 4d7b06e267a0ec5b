"""Which CPU does what, and whether the machine is quiet enough for the figures to mean anything."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import FrozenSet, Iterator, List, NamedTuple, Optional, Sequence

_QUIET = 0.5
_CPU = Path("/sys/devices/system/cpu")


class Layout(NamedTuple):
    """The CPUs of the load and the far end, and those of the relay."""

    load: FrozenSet[int]
    relay: FrozenSet[int]

    def __str__(self) -> str:
        if self.load == self.relay:
            return f"load, far end and relay share CPU {_listed(self.load)}"
        return f"load and far end on CPU {_listed(self.load)}, relay on CPU {_listed(self.relay)}"


def _listed(cpus: FrozenSet[int]) -> str:
    return ",".join(map(str, sorted(cpus)))


def pair(asked: Optional[Sequence[int]]) -> Layout:
    """One CPU for the load, another for the relay: as asked, else the first two that are not one core's two threads."""
    if asked:
        return Layout(frozenset(asked[:1]), frozenset(asked[1:] or asked))
    first, *others = sorted(os.sched_getaffinity(0))
    apart = [cpu for cpu in others if cpu not in _siblings(first)]
    return Layout(frozenset([first]), frozenset((apart or others or [first])[:1]))


def halves(asked: Optional[Sequence[int]]) -> Layout:
    """Half of the CPUs for the load, half for the relay; with fewer than four, all for both."""
    cpus = list(asked or sorted(os.sched_getaffinity(0)))
    if len(cpus) < 4:
        return Layout(frozenset(cpus), frozenset(cpus))
    middle = len(cpus) // 2
    return Layout(frozenset(cpus[:middle]), frozenset(cpus[middle:]))


def beside(load: FrozenSet[int], asked: Optional[Sequence[int]], workers: int) -> FrozenSet[int]:
    """A CPU for each of the relay's workers, the load's among them only where there are too few."""
    usable = list(asked or sorted(os.sched_getaffinity(0)))
    others = [cpu for cpu in usable if cpu not in load]
    return frozenset(others[:workers] if len(others) >= workers else usable)


def _siblings(cpu: int) -> FrozenSet[int]:
    """The hardware threads of this CPU's core."""
    try:
        text = (_CPU / f"cpu{cpu}/topology/thread_siblings_list").read_text()
    except OSError:
        return frozenset([cpu])
    spans = [part.split("-") for part in text.split(",")]
    return frozenset(number for span in spans for number in range(int(span[0]), int(span[-1]) + 1))


@contextlib.contextmanager
def pinned(cpus: FrozenSet[int]) -> Iterator[None]:
    """What is started meanwhile runs on these CPUs."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def disquiet() -> List[str]:
    """What speaks against trusting the figures of this machine now."""
    found = []
    load = os.getloadavg()[0]
    if load > _QUIET:
        found.append(f"the load average is {load:.1f}: something else runs, or ran a minute ago; trust only the ratios")
    if len(os.sched_getaffinity(0)) < 2:
        found.append("only one CPU is usable: the relay competes with its load")
    try:
        governor = (_CPU / "cpu0/cpufreq/scaling_governor").read_text().strip()
    except OSError:
        return found
    if governor != "performance":
        found.append(f"the CPU frequency governor is {governor}: performance gives steadier figures")
    return found
