"""A counting wake-up between threads, interpreters or processes: an eventfd, or a pipe (before Python 3.10, in a sandbox)."""

from __future__ import annotations

import contextlib
import os
from typing import NamedTuple

from _tsproxy.linux.needs import needing

HAS_EVENTFD = hasattr(os, "eventfd")
_MOST = 65536  # default capacity of a pipe (pipe(7))


class Wakeup(NamedTuple):
    """Two descriptors (the same one twice for an eventfd), both non-blocking. Plain numbers, so it can be passed on."""

    reader: int
    writer: int

    def wake(self) -> None:
        """Add one, which makes the reader's descriptor readable. Never blocks: on EAGAIN it is readable already."""
        try:
            if self.reader == self.writer:
                os.eventfd_write(self.writer, 1)
            else:
                os.write(self.writer, b"\1")
        except BlockingIOError:
            pass

    def collect(self) -> int:
        """Clear the wake-up; how often wake() was called since the last time."""
        try:
            if self.reader == self.writer:
                return os.eventfd_read(self.reader)
            return len(os.read(self.reader, _MOST))
        except BlockingIOError:
            return 0

    @property
    def kind(self) -> str:
        """What it is made of: "eventfd" or "pipe"."""
        return "eventfd" if self.reader == self.writer else "pipe"

    def close(self) -> None:
        """Close both descriptors. Call it once."""
        for fd in {self.reader, self.writer}:
            os.close(fd)


def create() -> Wakeup:
    """A new wake-up, close-on-exec: a pipe if a sandbox refuses eventfd2(2). Refused if that fails, too."""
    if HAS_EVENTFD:
        with contextlib.suppress(OSError):
            fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            return Wakeup(fd, fd)
    with needing("pipe2(2)", "to wake threads"):
        return Wakeup(*os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC))
