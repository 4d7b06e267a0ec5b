"""A counting wake-up between threads, interpreters or processes: an eventfd, or a pipe (before Python 3.10, in a sandbox)."""

from __future__ import annotations

import contextlib
import os
from typing import NamedTuple

from _tsproxy.linux.needs import needing

HAS_EVENTFD = hasattr(os, "eventfd")
_MOST = 65536  # a pipe holds no more bytes than this unless asked


class Wakeup(NamedTuple):
    """Two descriptors (the same one twice for an eventfd), both non-blocking. Plain numbers, so it can be handed on."""

    reader: int
    writer: int

    def ring(self) -> None:
        """Add one and wake the reader. Never blocks: a counter that is full has woken the reader already."""
        try:
            if self.reader == self.writer:
                os.eventfd_write(self.writer, 1)
            else:
                os.write(self.writer, b"\1")
        except BlockingIOError:
            pass

    def collect(self) -> int:
        """How often ring() was called since the last time; 0 if it was not. Clears the wake-up."""
        try:
            if self.reader == self.writer:
                return os.eventfd_read(self.reader)
            return len(os.read(self.reader, _MOST))
        except BlockingIOError:
            return 0

    @property
    def kind(self) -> str:
        """What it is."""
        return "eventfd" if self.reader == self.writer else "pipe"

    def close(self) -> None:
        """Close both descriptors. Call it once."""
        for fd in {self.reader, self.writer}:
            os.close(fd)


def create() -> Wakeup:
    """A new wake-up, close-on-exec: a pipe also where a sandbox refuses eventfd2(2). Refused if there is none to be had."""
    if HAS_EVENTFD:
        with contextlib.suppress(OSError):
            fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            return Wakeup(fd, fd)
    with needing("pipe2(2)", "to wake threads"):
        return Wakeup(*os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC))
