"""Pipes for splice(2), which moves bytes from socket to socket without copying them: a few for each worker, of one size.

Knows the limits that the kernel sets on pipes (pipe(7), /proc/sys/fs/pipe-*). Where there is no pipe to be had, or no
os.splice (before Python 3.10), acquire() says so, and the caller copies.
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
_PAUSE_NS = 1_000_000_000  # after a lack of room
_REFUSALS = uapi.UNSUPPORTED | uapi.CAPACITY


class Pipe:
    """One pipe and how much is in it. A `Pending` while the sink does not take it all.

    Where splice(2) is refused, `refused` is the errno: nothing is lost by that, and what is in the pipe is sent by copying.
    """

    __slots__ = ("_copied", "_reader", "_writer", "left", "refused")

    def __init__(self, reader: int, writer: int) -> None:
        """Adopt the two ends, which close() closes."""
        self._reader, self._writer = reader, writer
        self.left = self.refused = 0
        self._copied = b""  # what was in the pipe, and is not sent yet

    def fill(self, source: socket.SocketType) -> int:
        """Move in what the source has, as far as there is room; how much, 0 at end of file or if it is refused.

        OSError as recv(2) gives it.
        """
        try:
            received: int = os.splice(source.fileno(), self._writer, SIZE, flags=_FLAGS)
        except OSError as error:
            self._note_refusal(error, source)
            return 0
        self.left += received
        return received

    def send(self, sink: socket.SocketType) -> int:
        """Move out what the sink takes; how many bytes. OSError as sendto(2) gives it."""
        try:
            sent: int = self._copy(sink) if self.refused else os.splice(self._reader, sink.fileno(), self.left, flags=_FLAGS)
        except OSError as error:
            self._note_refusal(error, sink)
            sent = self._copy(sink)
        self.left -= sent
        return sent

    def _note_refusal(self, error: OSError, sock: socket.SocketType) -> None:
        """Raise again what is the socket's own: an ICMP error may have the errno of a refusal, and has closed the socket."""
        if self.refused or error.errno not in _REFUSALS or sockets.is_closed(sock):
            raise error
        self.refused = error.errno or 0

    def _copy(self, sink: socket.SocketType) -> int:
        if not self._copied:
            self._copied = os.read(self._reader, self.left)
        sent = sink.send(self._copied)
        self._copied = self._copied[sent:]
        return sent

    def release(self) -> None:
        """Nothing: the pipe stays with its stream."""

    def close(self) -> None:
        """Close both ends; what is in it is lost."""
        os.close(self._reader)
        os.close(self._writer)


class Pipes:
    """The pipes of one worker."""

    def __init__(self, most: int) -> None:
        """At most so many at a time."""
        self._most = most
        self._spare: List[Pipe] = []
        self._lent = 0
        self._not_before = 0

    def acquire(self) -> Optional[Pipe]:
        """An empty pipe; None if all are in use or the kernel gave none (then it is not asked again for a second)."""
        if self._lent >= self._most or time.monotonic_ns() < self._not_before:
            return None
        pipe = self._spare.pop() if self._spare else _create()
        if pipe is None:
            self._not_before = time.monotonic_ns() + _PAUSE_NS
        else:
            self._lent += 1
        return pipe

    def release(self, pipe: Pipe) -> None:
        """Take a pipe back. One with bytes in it is closed: they are not for the next connection.

        After a refusal by splice(2) there are no more pipes: what it was refused for is the worker's, not one socket's.
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
    """A pipe of SIZE; None without a descriptor, or beyond the user's quota (fs.pipe-user-pages-soft): a small one is slow."""
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
