"""Standard output as a place that may stall, fill up or die: takes whole lines, keeps a bounded backlog, counts the rest.

Knows a descriptor and lines. Knows nothing of what they say. It never sets O_NONBLOCK: the open file is shared with
whoever else has it (a shell, a supervisor). For a pipe poll(2) promises room for PIPE_BUF bytes, so a write of no
more than that does not block.
"""

from __future__ import annotations

import errno
import os
import select
from collections import deque
from typing import Callable, Deque

ATOMIC = 4096
_BACKLOG = 4096  # lines; at most 16 MiB
_RESERVE = 256  # lines beyond those for what is said seldom and must not be crowded out
_RETRY_S = 1.0
_DEAD = frozenset({errno.EPIPE, errno.EBADF, errno.ECONNRESET, errno.ENOTCONN, errno.EINVAL})


class LineWriter:
    """A bounded queue of lines in front of a descriptor."""

    def __init__(
        self, fd: int, clock: Callable[[], float], dropped: Callable[[int], None], log_ratelimited: Callable[[str], None]
    ) -> None:
        """`dropped` gets how many lines were given up, `log_ratelimited` why none can be written for now (a full disk).

        `clock` is in seconds and never goes back.
        """
        self.fd = fd
        self._clock = clock
        self._dropped, self._log_ratelimited = dropped, log_ratelimited
        self._room = select.poll()
        self._room.register(fd, select.POLLOUT)
        self._lines: Deque[bytes] = deque()
        self._cut = b""  # the rest of a write that was taken in part: goes first, or the next line would be glued to it
        self._dead = False
        self._not_before = 0.0  # when to try again after a write that failed; 0 since one that did not

    def put(self, line: bytes, seldom: bool = False) -> None:
        """Queue one line; beyond the backlog, or when the reader is gone for good, it is dropped and counted."""
        if self._dead or len(self._lines) >= _BACKLOG + (_RESERVE if seldom else 0):
            self._dropped(1)
        else:
            self._lines.append(line)

    @property
    def wants_room(self) -> bool:
        """Whether waiting for the descriptor to take more makes sense now."""
        return bool(self._cut or self._lines) and self._clock() >= self._not_before

    @property
    def is_empty(self) -> bool:
        """Whether all that was put in is out or given up."""
        return not self._cut and not self._lines

    def write(self) -> None:
        """Write until all is out or there is no more room; never waits for any."""
        while self.wants_room and self._room.poll(0) and self._write_some():
            pass

    def _write_some(self) -> bool:
        """One write of whole lines, PIPE_BUF bytes at most: what poll(2) says there is room for. False if it failed."""
        chunk = self._next_chunk()
        try:
            written = os.write(self.fd, chunk)
        except OSError as error:
            self._failed(error, chunk)
            return False
        self._cut = chunk[written:]
        self._not_before = 0.0
        return True

    def _next_chunk(self) -> bytes:
        """Lines taken off the queue to be written in one go."""
        if self._cut:
            return self._cut
        taken = [self._lines.popleft()]
        size = len(taken[0])
        while self._lines and size + len(self._lines[0]) <= ATOMIC:
            size += len(self._lines[0])
            taken.append(self._lines.popleft())
        return b"".join(taken)

    def _failed(self, error: OSError, chunk: bytes) -> None:
        """A full disk may have room again: keep the chunk. A reader that is gone stays gone: drop all there is."""
        self._cut = chunk
        if error.errno in _DEAD:
            self._dead = True
            self.give_up()
        elif error.errno not in (errno.EAGAIN, errno.EINTR):
            if not self._not_before:
                why = os.strerror(error.errno or 0)
                self._log_ratelimited(f"{why}; trying again every {_RETRY_S:g} s; {_BACKLOG:,} lines are kept")
            self._not_before = self._clock() + _RETRY_S

    def give_up(self) -> None:
        """Drop and count what is queued."""
        self._dropped(len(self._lines) + self._cut.count(b"\n"))
        self._lines.clear()
        self._cut = b""
