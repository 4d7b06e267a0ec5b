"""Signals as bytes on a descriptor, so that the main loop takes them like any other event (signal.set_wakeup_fd)."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import List, Optional

DRAINING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Signals:
    """Catches the signals that tsproxy acts on. Make it in the main thread; SIGPIPE is ignored by Python already."""

    def __init__(self) -> None:
        self.fd, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in (*DRAINING, signal.SIGUSR1):
            signal.signal(number, _wake_only)

    def take(self) -> List[signal.Signals]:
        """The signals that came since the last time, in order."""
        try:
            return [signal.Signals(number) for number in os.read(self.fd, 64)]
        except BlockingIOError:
            return []


def _wake_only(number: int, frame: Optional[FrameType]) -> None:
    """The byte in the pipe is the message; this only keeps the default action away."""
