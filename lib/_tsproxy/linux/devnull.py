"""A descriptor for output to discard: /dev/null, or, in a chroot without it, a pipe that is never read."""

from __future__ import annotations

import fcntl
import os

_HIGH = 10  # above the standard descriptors, whose numbers may be needed


def open_devnull() -> int:
    """A descriptor with the lowest free number, close-on-exec. OSError if neither can be opened."""
    try:
        return os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.fcntl(reader, fcntl.F_DUPFD_CLOEXEC, _HIGH)  # stays open: without a reader write(2) fails with EPIPE
    os.dup2(writer, reader, inheritable=False)
    os.close(writer)
    return reader
