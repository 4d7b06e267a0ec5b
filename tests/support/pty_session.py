"""A program in a pseudo-terminal of its own: what it shows, what is typed, how large the window is."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
from typing import Any, Dict, List, Optional, Sequence

import pyte
from harness import PATIENCE, wait_until


class PtySession:
    """Use it with `with`. The terminal is the program's controlling one, and its standard streams but those given."""

    def __init__(
        self, command: Sequence[str], *, columns: int = 80, rows: int = 24, env: Optional[Dict[str, str]] = None, **popen: Any
    ) -> None:
        self.master, self.slave = pty.openpty()
        self.output = b""
        self.terminal = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self.terminal)
        self.resize(columns, rows)
        streams = {"stdin": self.slave, "stdout": self.slave, "stderr": self.slave, **popen}
        environment = {**os.environ, "TERM": "xterm", "PYTHONIOENCODING": "utf-8", **(env or {})}
        self.process = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=self._control, **streams)

    def _control(self) -> None:
        fcntl.ioctl(self.slave, termios.TIOCSCTTY, 0)

    def __enter__(self) -> PtySession:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.slave)
        os.close(self.master)

    def resize(self, columns: int, rows: int) -> None:
        """As a window that is dragged; who runs in it gets SIGWINCH."""
        self.terminal.resize(rows, columns)
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def press(self, keys: bytes) -> None:
        os.write(self.master, keys)

    @property
    def rows(self) -> List[str]:
        """What is on the screen now."""
        self._pump()
        return list(self.terminal.display)

    def _pump(self) -> None:
        while select.select([self.master], [], [], 0)[0]:
            with contextlib.suppress(OSError):
                piece = os.read(self.master, 1 << 16)
                self.output += piece
                self._stream.feed(piece)

    def wait_for(self, *texts: str) -> List[str]:
        """The screen once all of these stand on it at the same time, and a look later, too: it is not half drawn."""
        seen: List[str] = []

        def shows() -> Optional[List[str]]:
            nonlocal seen
            before, seen = seen, self.rows
            return seen if seen == before and all(text in "\n".join(seen) for text in texts) else None

        try:
            shown: List[str] = wait_until(shows, f"{texts} on the screen")
        except AssertionError as late:
            raise AssertionError(f"{late}; on it is:\n" + "\n".join(self.rows)) from None
        return shown

    def wait(self) -> int:
        """The exit code at its end; all of its output is in `output` then."""

        def ended() -> bool:
            self._pump()
            return self.process.poll() is not None

        wait_until(ended, "its end", PATIENCE)
        self._pump()
        return self.process.returncode
