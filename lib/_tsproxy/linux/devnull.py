"""A descriptor that takes whatever is written: /dev/null, or, in a chroot that has none, a pipe that nobody empties."""

from __future__ import annotations

import fcntl
import os

_HIGH = 10  # beyond the standard descriptors, whose numbers may be wanted


def open_devnull() -> int:
    """The lowest free number, close-on-exec. OSError if there is neither."""
    try:
        return os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.fcntl(reader, fcntl.F_DUPFD_CLOEXEC, _HIGH)  # stays open for good: a write must not fail for want of a reader
    os.dup2(writer, reader, inheritable=False)
    os.close(writer)
    return reader
