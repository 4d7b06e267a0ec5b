"""Resource limits: RLIMIT_NOFILE raised to what the connections need, RLIMIT_FSIZE read."""

from __future__ import annotations

import contextlib
import resource

PIPES_A_WORKER = 16  # for splice(2), two descriptors each
_PER_WORKER = 8 + 2 * PIPES_A_WORKER
_PER_ROUTE = 4  # a listener and the counters, before and after a reload; and the counters of each worker
_OF_WORKER = 16  # its inbox, and what it shares with the main process
_OTHER = 64  # listeners, logs, the resolver, Python's own


MOST = 1 << 20  # the default of fs.nr_open (fs/file.c): for raise_nofile() as far as it goes


def raise_nofile(wanted: int) -> int:
    """Raise RLIMIT_NOFILE to `wanted`, also the hard limit where that is allowed; returns the soft limit then in force.

    If a sandbox refuses prlimit64(2) the limits stay as they are: returns the one in /proc, or without /proc `wanted`.
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
    """RLIMIT_FSIZE in bytes, which limits a memfd too (ftruncate(2), EFBIG); infinite if it is unlimited or can't be read."""
    try:
        soft = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    except OSError:
        return _soft_of_proc("Max file size", float("inf"))
    return float("inf") if soft == resource.RLIM_INFINITY else soft


def _soft_of_proc(name: str, otherwise: float) -> float:
    """The soft limit of that name, of three words, in /proc/self/limits (proc(5)); `otherwise` if unlimited or unreadable."""
    with contextlib.suppress(OSError, ValueError), open("/proc/self/limits", encoding="ascii") as limits:
        for line in limits:
            if line.startswith(name):
                return int(line.split()[3])
    return otherwise


def descriptors_for(connections: int, workers: int, routes: int = 1) -> int:
    """Descriptors needed: two sockets a connection, each worker's own and its pipes, each further route's, and some others."""
    return 2 * connections + _PER_WORKER * workers + (_PER_ROUTE + workers) * (routes - 1) + _OTHER


def descriptors_of_worker(connections: int, routes: int) -> int:
    """Descriptors needed by a worker process that has all connections: two sockets each, and the counters of each route."""
    return 2 * connections + _PER_WORKER + routes + _OF_WORKER


def connections_within(descriptors: int, workers: int, routes: int = 1) -> int:
    """The number of connections for which so many descriptors suffice."""
    return max(0, (descriptors - descriptors_for(0, workers, routes)) // 2)
