"""System calls that tsproxy can't do without: if the kernel or a sandbox refuses one, the error names it and its purpose.

Knows errnos and what helps against them. Knows nothing of how the error is handled.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from typing import Iterator

from _tsproxy.linux import uapi

TRANSIENT = uapi.CAPACITY | {errno.EAGAIN}  # a retry may succeed
_SANDBOX = "; does a sandbox refuse it? SECURITY.md lists the system calls that are needed"
_TASKS = "; raise the number of tasks that are allowed (ulimit -u, TasksMax=, pids.max)"
_DESCRIPTORS = "; raise the number of descriptors that are allowed (ulimit -n, LimitNOFILE=)"
_HINTS = {
    errno.EPERM: _SANDBOX,
    errno.EACCES: _SANDBOX,
    errno.ENOSYS: _SANDBOX,
    errno.EAGAIN: _TASKS,
    errno.EMFILE: _DESCRIPTORS,
    errno.ENFILE: _DESCRIPTORS,
}


class Refused(OSError):
    """A system call that was refused. `strerror` is the whole line: the call, why, its purpose, what helps."""

    def __init__(self, call: str, number: int, purpose: str, why: str = "") -> None:
        super().__init__(number, f"{call}: {why or os.strerror(number)}, needed {purpose}{hint(number)}")


def hint(number: int) -> str:
    """What helps against that errno, to be put behind its text; "" if nothing is known."""
    return _HINTS.get(number, "")


@contextlib.contextmanager
def needing(call: str, purpose: str) -> Iterator[None]:
    """Turns an OSError raised within into Refused for this call; `purpose` as in "for the lines of the workers"."""
    try:
        yield
    except Refused:
        raise
    except OSError as error:
        raise Refused(call, error.errno or 0, purpose, error.strerror or str(error)) from None


def start_thread(thread: threading.Thread, purpose: str) -> None:
    """Start it. Refused if that fails: Python does not report the errno of pthread_create(3), which is mostly EAGAIN."""
    try:
        thread.start()
    except RuntimeError as problem:
        raise Refused("clone(2)", errno.EAGAIN, purpose, f"{problem} (too many tasks, or a sandbox)") from None
