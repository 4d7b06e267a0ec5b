"""Signals as bytes on a descriptor, so that the main loop takes them like any other event (signal.set_wakeup_fd)."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import List, Optional

DRAINING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# nohup(1) ignores SIGHUP for the program that it starts. A shell without job control ignores SIGINT for what it starts in
# the background (POSIX, Shell Command Language, 2.11): Ctrl-C is for the script then.
_MAY_BE_IGNORED = (signal.SIGHUP, signal.SIGINT)


class Signals:
    """Catches the signals that tsproxy acts on. Make it in the main thread; SIGPIPE is ignored by Python already.

    SIGHUP and SIGINT stay ignored if they were at the start; SIGTERM never: SIGKILL would be the only end.
    """

    def __init__(self) -> None:
        self.fd, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._seen: List[signal.Signals] = []
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in (*DRAINING, signal.SIGUSR1, signal.SIGCHLD):
            if number not in _MAY_BE_IGNORED or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, _wake_only)

    def take(self) -> List[signal.Signals]:
        """The signals that came since the last time, in order."""
        came, self._seen = [*self._seen, *self._read()], []
        return came

    @property
    def ask_for_the_end(self) -> bool:
        """Whether one of those that take() will give asks for the end."""
        self._seen += self._read()
        return any(number in DRAINING for number in self._seen)

    def _read(self) -> List[signal.Signals]:
        try:
            return [signal.Signals(number) for number in os.read(self.fd, 64)]
        except BlockingIOError:
            return []


def _wake_only(number: int, frame: Optional[FrameType]) -> None:
    """The byte in the pipe is the message; this only keeps the default action away."""
