"""Pipes for splice(2), which moves bytes from socket to socket without copying them: a few for each worker, of one size.

Knows the kernel's limits on pipes (pipe(7), /proc/sys/fs/pipe-*). Knows nothing of sessions. Without a free pipe, or without
os.splice (before Python 3.10), acquire() returns None, and the caller copies.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from typing import List, Optional

from _tsproxy.linux import sockets, uapi

HAS_SPLICE = hasattr(os, "splice")
SIZE = 1 << 20  # bytes; fs.pipe-max-size, what an unprivileged process may ask for
_FLAGS = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK if HAS_SPLICE else 0
_SPARE = 2
_PAUSE_NS = 1_000_000_000  # after EMFILE, ENOMEM or a quota
_REFUSALS = uapi.UNSUPPORTED | uapi.CAPACITY


class Pipe:
    """One pipe and how many bytes are in it. It is the direction's `Pending` while the sink does not accept them all.

    If splice(2) is refused, `refused` is the errno. No byte is lost: those in the pipe are sent by read(2) and send(2).
    """

    __slots__ = ("_copied", "_reader", "_writer", "left", "refused")

    def __init__(self, reader: int, writer: int) -> None:
        """Own the two descriptors; close() closes them."""
        self._reader, self._writer = reader, writer
        self.left = self.refused = 0
        self._copied = b""  # read from the pipe, and not sent yet

    def fill(self, source: socket.SocketType) -> int:
        """splice(2) from the source into the pipe; how many bytes, 0 at EOF or if it is refused.

        OSError as recv(2) raises it.
        """
        try:
            received: int = os.splice(source.fileno(), self._writer, SIZE, flags=_FLAGS)
        except OSError as error:
            if not self._is_refusal(error.errno or 0, source):
                raise
            return 0
        self.left += received
        return received

    def send(self, sink: socket.SocketType) -> int:
        """splice(2) from the pipe into the sink; how many bytes. OSError as sendto(2) raises it."""
        try:
            sent: int = self._copy(sink) if self.refused else os.splice(self._reader, sink.fileno(), self.left, flags=_FLAGS)
        except OSError as error:
            if not self._is_refusal(error.errno or 0, sink):
                raise
            sent = self._copy(sink)
        self.left -= sent
        return sent

    def _is_refusal(self, code: int, sock: socket.SocketType) -> bool:
        """Note it. An ICMP error can have the errno of a refusal, but then the socket is closed.

        The exception itself is not passed: a frame that has it, and is in its traceback, is a cycle (gc).
        """
        if self.refused or code not in _REFUSALS or sockets.is_closed(sock):
            return False
        self.refused = code
        return True

    def _copy(self, sink: socket.SocketType) -> int:
        if not self._copied:
            self._copied = os.read(self._reader, self.left)
        sent = sink.send(self._copied)
        self._copied = self._copied[sent:]
        return sent

    def release(self) -> None:
        """Does nothing: the pipe stays with its Splicer."""

    def close(self) -> None:
        """Close both ends. Bytes in the pipe are discarded."""
        os.close(self._reader)
        os.close(self._writer)


class Pipes:
    """The pipes of one worker."""

    def __init__(self, most: int) -> None:
        """At most `most` pipes at a time."""
        self._most = most
        self._spare: List[Pipe] = []
        self._lent = 0
        self._not_before = 0

    def acquire(self) -> Optional[Pipe]:
        """An empty pipe; None if all are in use, or if pipe2(2) failed in the last second."""
        if self._lent >= self._most or time.monotonic_ns() < self._not_before:
            return None
        pipe = self._spare.pop() if self._spare else _create()
        if pipe is None:
            self._not_before = time.monotonic_ns() + _PAUSE_NS
        else:
            self._lent += 1
        return pipe

    def release(self, pipe: Pipe) -> None:
        """Return a pipe. One with bytes in it is closed: they must not reach another session.

        After splice(2) was refused there are no more pipes: the cause concerns the worker, not one socket.
        """
        self._lent -= 1
        if pipe.refused in uapi.CAPACITY:
            self._not_before = time.monotonic_ns() + _PAUSE_NS
        elif pipe.refused:
            self._most = 0
        if pipe.left or pipe.refused or len(self._spare) >= _SPARE:
            pipe.close()
        else:
            self._spare.append(pipe)

    def close(self) -> None:
        """Close the spare ones."""
        while self._spare:
            self._spare.pop().close()


def _create() -> Optional[Pipe]:
    """A pipe of SIZE; None if pipe2(2) fails, or beyond the user's quota (fs.pipe-user-pages-soft): a smaller pipe is slow."""
    if not HAS_SPLICE:
        return None
    try:
        reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    pipe = Pipe(reader, writer)
    try:
        fcntl.fcntl(writer, uapi.F_SETPIPE_SZ, SIZE)
    except OSError:
        pipe.close()
        return None
    return pipe
