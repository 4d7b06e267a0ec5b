"""The terminal: taken, painted, and given back as it was, whatever happens in between.

Knows escape sequences, termios and signals. Knows nothing of what is painted. Plain ANSI, since not each Python has
curses; an alternate screen, so that what stood there before comes back.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import termios
from types import FrameType
from typing import Any, Dict, List, Optional, Sequence, Tuple

_TAKE = "\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[2J"  # alternate screen, no cursor, no wrapping at the right edge
_GIVE_BACK = "\x1b[0m\x1b[?7h\x1b[?25h\x1b[?1049l"
_USUAL = (80, 24)
_CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP, signal.SIGCONT, signal.SIGWINCH)


class Signals:
    """The signals that a screen must act on, as bytes on a descriptor: none interrupts an escape sequence."""

    def __init__(self) -> None:
        self.fd, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        heard = [number for number in _CAUGHT if signal.getsignal(number) is not signal.SIG_IGN]  # nohup means it
        self._before: Dict[int, Any] = {number: signal.signal(number, _wake_only) for number in heard}

    def take(self) -> List[int]:
        """Those that came since the last time."""
        try:
            return list(os.read(self.fd, 64))
        except BlockingIOError:
            return []

    def obey(self, number: int) -> None:
        """Do to this process what the signal would have done; after one that only stops, go on."""
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        signal.signal(number, _wake_only)

    def close(self) -> None:
        """As it was before."""
        signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self.fd)
        os.close(self._writer)


def _wake_only(number: int, frame: Optional[FrameType]) -> None:
    """The byte in the pipe is the message; this only keeps the default action away."""


class Screen:
    """A terminal's screen and keys. `keys` is None where no terminal can be read."""

    def __init__(self, out: int, keys: Optional[int]) -> None:
        """`out` must be a terminal. Nothing is changed before take()."""
        self._out, self.keys = out, keys
        self._before: Optional[List[Any]] = None
        self._painted: List[str] = []
        self._is_taken = False

    @property
    def size(self) -> Tuple[int, int]:
        """(columns, rows), as the terminal says now; 80x24 where it says nothing."""
        try:
            columns, rows = os.get_terminal_size(self._out)
        except OSError:
            return _USUAL
        return (columns, rows) if columns and rows else _USUAL

    def take(self) -> None:
        """The alternate screen; keys come one by one, unseen. Ctrl-C and Ctrl-Z stay signals: they are for a whole pipeline."""
        self._is_taken = True
        if self.keys is not None:
            self._before = termios.tcgetattr(self.keys)
            unseen = termios.tcgetattr(self.keys)
            unseen[3] &= ~(termios.ICANON | termios.ECHO)
            unseen[6][termios.VMIN], unseen[6][termios.VTIME] = 1, 0
            termios.tcsetattr(self.keys, termios.TCSADRAIN, unseen)
        self._write(_TAKE)
        self.forget()

    def give_back(self) -> None:
        """As it was before take(). A terminal that has gone away is as good as restored."""
        if not self._is_taken:
            return
        self._is_taken = False
        try:
            self._write(_GIVE_BACK)
            if self.keys is not None and self._before:
                termios.tcsetattr(self.keys, termios.TCSADRAIN, self._before)
        except (OSError, termios.error):
            pass

    def forget(self) -> None:
        """Paint all of it the next time."""
        self._painted = []

    def paint(self, rows: Sequence[str]) -> None:
        """Show the rows, each as wide as the screen. Only what has changed is written: the terminal may be far away."""
        if len(rows) != len(self._painted):
            self._painted = [""] * len(rows)
        changed = [(number, row) for number, row in enumerate(rows, 1) if row != self._painted[number - 1]]
        self._painted = list(rows)
        self._write("".join(f"\x1b[{number};1H{row}" for number, row in changed))

    def pressed(self) -> bytes:
        """The keys that were pressed; "q" if the terminal has gone away. What begins with ESC is no key of ours."""
        if self.keys is None:
            return b""
        try:
            typed = os.read(self.keys, 64)
        except BlockingIOError:
            return b""
        except OSError as problem:
            if problem.errno != errno.EIO:
                raise
            typed = b""
        return b"q" if not typed else b"" if typed.startswith(b"\x1b") else typed

    def _write(self, text: str) -> None:
        """All of it: the terminal may be shared with somebody who made it non-blocking."""
        rest = memoryview(text.encode("utf-8", "replace"))
        while rest:
            try:
                rest = rest[os.write(self._out, rest) :]
            except BlockingIOError:
                room = select.poll()
                room.register(self._out, select.POLLOUT)
                room.poll(1000)


def open_keys() -> Optional[int]:
    """The controlling terminal to read keys from, whatever standard input is; None if there is none."""
    try:
        return os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return os.dup(0) if os.isatty(0) else None
