"""What the process that started this one has left to it, and what becomes of that: signals, descriptors, directory.

execve(2) hands these down whatever the program is; SECURITY.md has the table of what is kept. Knows the kernel's side of
each. Knows nothing of relaying. Call all of it while there is one thread.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
from typing import Iterable

from _tsproxy.linux import libc

_FIRST = 3  # behind standard error
_LAST = 2**32 - 1  # close_range(2): "all above"
_MOST = 1 << 20  # fs.nr_open as the kernel has it by default


def unblock_signals() -> None:
    """Block no signal. One that stays blocked from the start would leave SIGKILL as the only end (signal(7): mask)."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def keep_exit_statuses() -> None:
    """Take back an ignored SIGCHLD: with it the kernel keeps no exit status, and waitpid(2) fails with ECHILD."""
    if signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def leave_directory() -> None:
    """Change to /, so that the file system that this process was started in can be unmounted. Imports go on as before.

    Where chdir(2) is refused it stays in use.
    """
    with contextlib.suppress(OSError):  # a start directory that is deleted already (getcwd(3), ENOENT)
        sys.path[:] = map(os.path.abspath, sys.path)
    with contextlib.suppress(OSError):
        os.chdir("/")


def close_all_but(kept: Iterable[int]) -> None:
    """Close each descriptor above standard error that is not in `kept`. Close-on-exec would not have kept them from us.

    By close_range(2), which takes as long for 2**31 numbers as for ten. Where that is missing (Linux before 5.9, glibc
    before 2.34, an older seccomp filter) by what /proc lists, and without /proc one by one up to the limit.
    """
    first = _FIRST
    for fd in sorted({fd for fd in kept if fd >= _FIRST}):
        _close(first, fd - 1)
        first = fd + 1
    _close(first, _LAST)


def _close(first: int, last: int) -> None:
    if first > last:
        return
    try:
        libc.call("close_range", first, last, 0)
    except OSError:
        for fd in _listed(first, last):
            with contextlib.suppress(OSError):  # the one that listed the directory
                os.close(fd)


def _listed(first: int, last: int) -> Iterable[int]:
    try:
        return [fd for fd in map(int, os.listdir("/proc/self/fd")) if first <= fd <= last]
    except OSError:
        return range(first, min(last + 1, max(_most_open(), first)))


def _most_open() -> int:
    """The hard limit on descriptors, or what the kernel allows by default where there is none, or none is told."""
    with contextlib.suppress(OSError):
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        return _MOST if hard == resource.RLIM_INFINITY else hard
    return _MOST
