"""The three standard streams: opened where the parent has closed them, given up where they can't be written.

Knows descriptors 0, 1 and 2, and Python's streams of them. Knows nothing of what is written.
"""

from __future__ import annotations

import contextlib
import os
import sys

from _tsproxy.cli import program
from _tsproxy.linux.devnull import open_devnull
from _tsproxy.linux.printable import printable


def open_closed() -> None:
    """Open those that are closed on /dev/null: else the next socket takes the number and gets what is printed.

    Python has None in the place of such a stream (sys.__stdout__); afterwards there is one.
    """
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(fd)
        except OSError:  # EBADF: then it is the lowest that is free
            os.set_inheritable(open_devnull(), True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(fd, "w" if fd else "r", encoding="utf-8", errors="backslashreplace", closefd=False))


def discard(fd: int) -> None:
    """Have /dev/null in its place: what could not be written stays in Python's buffer, and the exit code would be 120."""
    with contextlib.suppress(OSError):
        os.dup2(open_devnull(), fd)


def end_output() -> None:
    """Write what Python still holds for standard output, after a failure that was told already; what can't be written goes."""
    try:
        sys.stdout.flush()
    except OSError:
        discard(1)


def write_error(text: str) -> None:
    """Write to standard error. Where that fails (ENOSPC, EPIPE, EIO) nothing more is written there: the exit code is left."""
    try:
        print(text, end="", file=sys.stderr, flush=True)
    except OSError:
        discard(2)


def say(message: str) -> None:
    """Write the message, made printable, behind the program's name as a line on standard error."""
    write_error(f"{program.name()}: {printable(message, kept=chr(10))}\n")
