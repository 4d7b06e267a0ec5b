"""Writes whole lines to a descriptor that may block, fail or be closed at the other end: a bounded queue, and a count of drops.

Knows a descriptor and lines. Knows nothing of their content. It never sets O_NONBLOCK: that is a flag of the open file
description, which other processes share (a shell, a supervisor). After POLLOUT on a pipe there is room for PIPE_BUF bytes, so
a write(2) of at most that does not block.
"""

from __future__ import annotations

import errno
import os
import select
from collections import deque
from typing import Callable, Deque, Tuple

from _tsproxy.linux.uapi import PIPE_BUF

_BACKLOG = 4096  # lines; at most 16 MiB
RESERVE = 256  # more lines, for rare events, which `connection` lines must not displace
_RETRY_S = 1.0
_BROKEN = frozenset({errno.EPIPE, errno.EBADF, errno.ECONNRESET, errno.ENOTCONN, errno.EINVAL})


class LineWriter:
    """A bounded queue of lines in front of a descriptor."""

    def __init__(
        self, fd: int, clock: Callable[[], float], count_dropped: Callable[[int], None], log_ratelimited: Callable[[str], None]
    ) -> None:
        """`count_dropped` gets how many lines were dropped, `log_ratelimited` why none can be written now (ENOSPC) or ever.

        `clock` is in seconds, and monotonic.
        """
        self.fd = fd
        self._clock = clock
        self._count_dropped, self._log_ratelimited = count_dropped, log_ratelimited
        self._poller = select.poll()
        self._poller.register(fd, select.POLLOUT)
        self._lines: Deque[bytes] = deque()
        self.lines_put = 0  # and not dropped at once
        self._unwritten = b""  # the rest of a partial write(2): goes first, or the next line would be appended to half a line
        self._is_broken = False
        self._not_before = 0.0  # when to try again after write(2) failed; 0 after one that succeeded

    def put(self, line: bytes, reserve: int = 0) -> None:
        """Queue one line. If the queue is full, or write(2) failed with EPIPE or the like, the line is dropped and counted.

        `reserve`: how much longer than the backlog the queue may be for this line, at most RESERVE.
        """
        if self._is_broken or len(self._lines) >= _BACKLOG + reserve:
            self._count_dropped(1)
        else:
            self._lines.append(line)
            self.lines_put += 1

    @property
    def lines_taken(self) -> int:
        """How many of `lines_put` are not queued any more: written, handed to write(2), or dropped."""
        return self.lines_put - len(self._lines)

    @property
    def progress(self) -> Tuple[int, int]:
        """Changes with each line that is put or taken."""
        return self.lines_put, self.lines_taken

    @property
    def awaits_pollout(self) -> bool:
        """Whether to wait for POLLOUT now: there are lines, and no retry is being waited for."""
        return bool(self._unwritten or self._lines) and self._clock() >= self._not_before

    @property
    def is_empty(self) -> bool:
        """Whether all lines are written or dropped."""
        return not self._unwritten and not self._lines

    def write(self) -> None:
        """Write until all is written or the descriptor is not writable. Never blocks."""
        while self.awaits_pollout and self._poller.poll(0) and self._write_some():
            pass

    def _write_some(self) -> bool:
        """One write(2) of whole lines, at most PIPE_BUF bytes. False if it failed."""
        chunk = self._next_chunk()
        try:
            written = os.write(self.fd, chunk)
        except OSError as error:
            self._write_failed(error, chunk)
            return False
        self._unwritten = chunk[written:]
        self._not_before = 0.0
        return True

    def _next_chunk(self) -> bytes:
        """The bytes for one write(2): the rest of a partial one, or lines from the queue."""
        if self._unwritten:
            return self._unwritten
        batch = [self._lines.popleft()]
        size = len(batch[0])
        while self._lines and size + len(self._lines[0]) <= PIPE_BUF:
            size += len(self._lines[0])
            batch.append(self._lines.popleft())
        return b"".join(batch)

    def _write_failed(self, error: OSError, chunk: bytes) -> None:
        """write(2) failed. After EPIPE and the like drop all lines, for good; else (ENOSPC) keep the chunk and retry later."""
        self._unwritten = chunk
        why = os.strerror(error.errno or 0)
        if error.errno in _BROKEN:
            self._is_broken = True
            self.discard_queue()
            self._log_ratelimited(f"{why}; no line is written any more")
        elif error.errno not in (errno.EAGAIN, errno.EINTR):
            if not self._not_before:
                self._log_ratelimited(f"{why}; trying again every {_RETRY_S:g} s; {_BACKLOG:,} lines are kept")
            self._not_before = self._clock() + _RETRY_S

    def discard_queue(self) -> int:
        """Drop and count what is queued; how many lines that were."""
        lines = len(self._lines) + self._unwritten.count(b"\n")
        self._count_dropped(lines)
        self._lines.clear()
        self._unwritten = b""
        return lines
