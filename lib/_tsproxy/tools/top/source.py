"""Where the lines come from: standard input up to its end, or a file that is followed like `tail -F` does.

Knows descriptors, rotation and truncation. Knows nothing of what the lines say.
"""

from __future__ import annotations

import os
import stat
from typing import Iterator, List, Optional

from _tsproxy.cli import exits
from _tsproxy.cli.exits import Exit

_PIECE = 1 << 16
_MOST_LINE = 1 << 16  # of a longer line the rest is dropped; tsproxy's have 4,096 bytes at most
_LOOK_S = 0.25  # how soon growth, rotation and a new writer are noticed
_MOST_PAST = 8 << 20  # of a file that is there already: this much of its end is read, ...
_HEAD = 1 << 20  # ... and this much of its beginning, where the `start` line is, and those of all routes


class Cutter:
    """Pieces of a stream into lines without their newlines."""

    def __init__(self) -> None:
        self._rest = b""
        self._overlong = False

    def cut(self, piece: bytes) -> Iterator[bytes]:
        """The lines that this piece completes."""
        *whole, rest = (self._rest + piece).split(b"\n")
        for line in whole:
            if not self._overlong:
                yield line[:_MOST_LINE]
            self._overlong = False
        self._rest = b"" if self._overlong else rest
        if len(rest) > _MOST_LINE and not self._overlong:
            yield rest[:_MOST_LINE]
            self._rest, self._overlong = b"", True

    def end(self) -> Iterator[bytes]:
        """What stands behind the last newline, if anything does: nothing will complete it."""
        rest, self._rest, self._overlong = self._rest, b"", False
        if rest:
            yield rest

    def skip_to_next(self) -> None:
        """What comes begins in the middle of a line."""
        self._rest, self._overlong = b"", True


class Stream:
    """A descriptor that is read up to its end: a pipe, a file on standard input."""

    note = ""
    gap = False

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._cutter = Cutter()
        self.ended = False

    @property
    def waits_for(self) -> Optional[int]:
        """The descriptor to wait for."""
        return None if self.ended else self._fd

    @property
    def patience_s(self) -> Optional[float]:
        """None: only by the descriptor is it known when there is more."""
        return None

    def read(self) -> List[bytes]:
        """The lines in the next piece. Call it when the descriptor is readable."""
        if self.ended:
            return []
        piece = _read(self._fd)
        if piece is None:
            return []
        self.ended = not piece
        return list(self._cutter.end() if self.ended else self._cutter.cut(piece))

    def close(self) -> None:
        """Nothing: it is the caller's descriptor."""


class Follower:
    """A file by its name, or a FIFO: it never ends. Looked at by the clock, since a file's growth wakes nobody."""

    ended = False

    def __init__(self, path: str) -> None:
        """OSError if it can't be opened. A FIFO may have no writer yet."""
        self._path = path
        self._fd = _open(path)
        self._cutter = Cutter()
        self._position, self._jump_to = 0, 0
        self._idle = False
        self._is_last_look = False
        self.note = ""
        self.gap = False  # whether lines were left out before those read() has just given
        state = os.fstat(self._fd)
        self._is_regular = stat.S_ISREG(state.st_mode)
        if self._is_regular and state.st_size > _MOST_PAST + _HEAD:
            self._jump_to = state.st_size - _MOST_PAST

    @property
    def waits_for(self) -> Optional[int]:
        """The descriptor to wait for; None: look by the clock."""
        return None if self._is_regular or self._idle else self._fd

    @property
    def patience_s(self) -> Optional[float]:
        """How long to wait before the next look."""
        if not self._is_regular and not self._idle:
            return None
        return _LOOK_S if self._idle else 0.0

    def read(self) -> List[bytes]:
        """The lines that have come since; none if there are none yet."""
        self.gap = False
        piece = _read(self._fd)
        if piece is None:  # a FIFO with a writer that is silent
            self._idle = False
            return []
        self._idle = not piece
        if not piece:
            return list(self._at_end())
        self._position += len(piece)
        lines = list(self._cutter.cut(piece))
        if self._jump_to and self._position >= _HEAD:
            self._jump()
        return lines

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def _jump(self) -> None:
        """Leave out the middle of a long file: what it says is history."""
        self.note = f"{self._jump_to - self._position:,} bytes left out"
        self._position, self._jump_to = os.lseek(self._fd, self._jump_to, os.SEEK_SET), 0
        self._cutter.skip_to_next()
        self.gap = True

    def _at_end(self) -> Iterator[bytes]:
        """Look whether the file has become shorter, or another has taken its name."""
        if not self._is_regular:
            self.note = "no writer"
            yield from self._cutter.end()
        elif os.fstat(self._fd).st_size < self._position:
            yield from self._again("truncated")
        elif not self._is_replaced():
            self._is_last_look = False
        elif not self._is_last_look:
            self._is_last_look, self._idle = True, False  # something may have been written before the name changed
        else:
            yield from self._reopen()

    def _is_replaced(self) -> bool:
        try:
            named = os.stat(self._path)
        except OSError:
            self.note = "the file is gone; waiting for it"
            return False
        if self.note.startswith("the file is gone"):
            self.note = ""
        return not os.path.samestat(named, os.fstat(self._fd))

    def _reopen(self) -> Iterator[bytes]:
        """From the file that had the name to the one that has it now."""
        try:
            fd = _open(self._path)
        except OSError as problem:
            self.note = f"can't open its successor: {problem.strerror}"
            return
        os.dup2(fd, self._fd, inheritable=False)
        os.close(fd)
        yield from self._again("rotated")

    def _again(self, why: str) -> Iterator[bytes]:
        yield from self._cutter.end()
        self.note = why
        self._position, self._jump_to = os.lseek(self._fd, 0, os.SEEK_SET), 0
        self._idle = self._is_last_look = False


def from_(path: Optional[str]) -> Stream | Follower:
    """Standard input for None or "-", else the file. Exit with one line if there can be no lines in it."""
    if path is None or path == "-":
        if os.isatty(0):
            raise Exit(exits.USAGE, "FILE: given nothing, and standard input is a terminal; allowed: a file, a FIFO, or a pipe")
        return Stream(0)
    try:
        if stat.S_ISDIR(os.stat(path).st_mode):
            raise Exit(exits.USAGE, f"FILE: given {path!r}, which is a directory; allowed: a file or a FIFO")
        return Follower(path)
    except (OSError, ValueError) as problem:
        why = getattr(problem, "strerror", None) or problem
        raise Exit(exits.USAGE, f"FILE: given {path!r}: {why}; allowed: a file or a FIFO that may be read") from None


def _open(path: str) -> int:
    return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)


def _read(fd: int) -> Optional[bytes]:
    """A piece; empty at the end; None if there is nothing now."""
    try:
        return os.read(fd, _PIECE)
    except BlockingIOError:
        return None
