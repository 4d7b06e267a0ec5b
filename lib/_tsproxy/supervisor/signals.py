"""Signals for the main thread's loop: a set of those that are pending, and a pipe that wakes it (signal.set_wakeup_fd).

The pipe has a byte for each signal, and no more than 65,536: where they come faster than they are read, a SIGTERM behind so
many SIGUSR1 would have none. So the bytes only wake; which signals came is what the handlers of Python have noted. These run
in the main thread between two bytecodes, and before what reads the byte goes on, since the interpreter notes a signal first.

Knows which signals tsproxy handles. Knows nothing of what they lead to.
"""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType
from typing import List, Optional

_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD)
_MOST = 65536  # default capacity of a pipe (pipe(7))


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
        self._pending: List[int] = []
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        # nohup(1) sets SIGHUP to SIG_IGN for the program that it starts. A shell without job control does so with SIGINT for
        # what it starts in the background (POSIX, Shell Command Language, 2.11): Ctrl-C is for the script then.
        may_be_ignored = {signal.SIGINT, *hangup}
        for number in _HANDLED:
            if number not in may_be_ignored or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._note)

    def pop_all(self) -> List[signal.Signals]:
        """The signals that came since the last call, in order; those of one kind are one, as in the kernel (signal(7))."""
        self._clear()
        came, self._pending = self._pending, []
        return [signal.Signals(number) for number in came]

    @property
    def has_termination(self) -> bool:
        """Whether one of those that pop_all() will give ends the program."""
        self._clear()
        return any(number in self.terminating for number in self._pending)

    def _clear(self) -> None:
        """Take the bytes first: the pipe is readable again for a signal that comes later."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.fd, _MOST)

    def _note(self, number: int, frame: Optional[FrameType]) -> None:
        if number not in self._pending:
            self._pending.append(number)
