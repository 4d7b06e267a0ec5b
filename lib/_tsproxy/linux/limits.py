"""Descriptors: as many as the connections need, or a clear no before the first one."""

from __future__ import annotations

import contextlib
import resource

PIPES_A_WORKER = 16  # for splice(2), two descriptors each
_A_WORKER = 8 + 2 * PIPES_A_WORKER
_OTHER = 64  # listeners, logs, the resolver, Python's own


def raise_nofile(wanted: int) -> int:
    """Raise RLIMIT_NOFILE to `wanted`, hard limit included where that is allowed; the soft limit then in force.

    Where a sandbox refuses prlimit64(2) the limits stay as they are: as /proc tells them or, without that, unknown.
    """
    try:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    except OSError:
        return int(_soft_of_proc("Max open files", wanted))
    unlimited = resource.RLIM_INFINITY
    if soft == unlimited or soft >= wanted:
        return wanted if soft == unlimited else soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, wanted if hard != unlimited and hard < wanted else hard))
    except (ValueError, OSError):
        with contextlib.suppress(OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def largest_file() -> float:
    """RLIMIT_FSIZE in bytes, which counts for a memfd too (ftruncate(2), EFBIG); infinite where none is known."""
    try:
        soft = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    except OSError:
        return _soft_of_proc("Max file size", float("inf"))
    return float("inf") if soft == resource.RLIM_INFINITY else soft


def _soft_of_proc(name: str, otherwise: float) -> float:
    """The soft limit that /proc/self/limits shows by that name of three words (proc(5)); `otherwise` for "unlimited", too."""
    with contextlib.suppress(OSError, ValueError), open("/proc/self/limits", encoding="ascii") as limits:
        for line in limits:
            if line.startswith(name):
                return int(line.split()[3])
    return otherwise


def descriptors_for(connections: int, workers: int) -> int:
    """Two sockets a connection, each worker's own and its pipes, and some for everything else."""
    return 2 * connections + _A_WORKER * workers + _OTHER


def connections_within(descriptors: int, workers: int) -> int:
    """How many connections so many descriptors are enough for."""
    return max(0, (descriptors - _A_WORKER * workers - _OTHER) // 2)
