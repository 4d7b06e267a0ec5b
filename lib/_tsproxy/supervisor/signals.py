"""Signals as bytes in a pipe, which the main thread's loop reads like any other descriptor (signal.set_wakeup_fd).

Knows which signals tsproxy handles. Knows nothing of what they lead to.
"""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import List, Optional

_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD)


class Signals:
    """Catches the signals that tsproxy handles. Make it in the main thread; SIGPIPE is ignored by Python already.

    SIGHUP and SIGINT stay ignored if they were at the start; SIGTERM does not: else only SIGKILL would be left. Where SIGHUP
    reloads, it is always taken.
    """

    def __init__(self, reloads: bool = False) -> None:
        """`reloads`: whether SIGHUP has the routes read again; else it ends the program, as SIGTERM and SIGINT do."""
        hangup = () if reloads else (signal.SIGHUP,)
        self.terminating = frozenset({signal.SIGTERM, signal.SIGINT, *hangup})
        self.fd, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._pending: List[signal.Signals] = []
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        # nohup(1) sets SIGHUP to SIG_IGN for the program that it starts. A shell without job control does so with SIGINT for
        # what it starts in the background (POSIX, Shell Command Language, 2.11): Ctrl-C is for the script then.
        may_be_ignored = {signal.SIGINT, *hangup}
        for number in _HANDLED:
            if number not in may_be_ignored or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, _wake_only)

    def pop_all(self) -> List[signal.Signals]:
        """The signals that came since the last call, in order."""
        came, self._pending = [*self._pending, *self._read()], []
        return came

    @property
    def has_termination(self) -> bool:
        """Whether one of those that pop_all() will give ends the program."""
        self._pending += self._read()
        return any(number in self.terminating for number in self._pending)

    def _read(self) -> List[signal.Signals]:
        try:
            return [signal.Signals(number) for number in os.read(self.fd, 64)]
        except BlockingIOError:
            return []


def _wake_only(number: int, frame: Optional[FrameType]) -> None:
    """set_wakeup_fd() writes the byte; this only replaces the default action."""
