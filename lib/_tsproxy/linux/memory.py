"""Shared memory, mapped by its descriptor: a memfd, or, if a sandbox refuses memfd_create(2), an unnamed file (O_TMPFILE)."""

from __future__ import annotations

import contextlib
import errno
import os

from _tsproxy.linux.needs import TRANSIENT, needing

_DIRECTORIES = ("/dev/shm", "/tmp", "/var/tmp")  # noqa: S108 -- O_TMPFILE: no name that anybody could guess


def create(name: str, size: int) -> int:
    """The descriptor of `size` zero bytes, close-on-exec; `name` is for people. Refused if neither can be made."""
    with needing("memfd_create(2)", "for memory that is shared with the workers (nor is there a /dev/shm or /tmp for it)"):
        fd = _open(name)
    with needing("ftruncate(2)", "for memory that is shared with the workers"):
        os.ftruncate(fd, size)
    return fd


def _open(name: str) -> int:
    try:
        if hasattr(os, "memfd_create"):  # Python may have been built with a C library before glibc 2.27
            return os.memfd_create(name)
        refusal = OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    except OSError as error:
        if error.errno in TRANSIENT:
            raise
        refusal = error
    for directory in _DIRECTORIES:
        with contextlib.suppress(OSError):
            return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    raise refusal
