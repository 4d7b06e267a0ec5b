"""Attributes inherited through execve(2), and how they are reset: signal mask, SIGCHLD, descriptors, directory.

SECURITY.md has the table of what is kept. Knows the kernel's side of each. Knows nothing of relaying. Call all of it while
there is one thread.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
from typing import Iterable

from _tsproxy.linux import libc

_FIRST = 3  # after standard error
_LAST = 2**32 - 1  # close_range(2): "all above"
_DEFAULT_NR_OPEN = 1 << 20  # fs.nr_open as the kernel has it by default


def unblock_signals() -> None:
    """Empty the signal mask, which execve(2) keeps. With SIGTERM blocked only SIGKILL would end this process (signal(7))."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def keep_exit_statuses() -> None:
    """Reset an ignored SIGCHLD to SIG_DFL: if it is ignored the kernel keeps no exit status, and waitpid(2) fails (ECHILD)."""
    if signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def change_to_root() -> None:
    """chdir(2) to /, so that the file system of the start directory can be unmounted. Relative entries of sys.path are kept.

    If chdir(2) is refused the directory stays in use.
    """
    with contextlib.suppress(OSError):  # ENOENT of getcwd(3): the start directory was deleted
        sys.path[:] = map(os.path.abspath, sys.path)
    with contextlib.suppress(OSError):
        os.chdir("/")


def close_all_but(kept: Iterable[int]) -> None:
    """Close each descriptor above standard error that is not in `kept`: those that this process inherited.

    By close_range(2), which takes as long for 2**31 numbers as for ten. Without it (Linux before 5.9, glibc before 2.34, an
    older seccomp filter) those that /proc lists, and without /proc one by one up to the limit.
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
        return range(first, min(last + 1, max(_max_open(), first)))


def _max_open() -> int:
    """The hard limit on descriptors; the kernel's default of fs.nr_open if it is unlimited or can't be read."""
    with contextlib.suppress(OSError):
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        return _DEFAULT_NR_OPEN if hard == resource.RLIM_INFINITY else hard
    return _DEFAULT_NR_OPEN
