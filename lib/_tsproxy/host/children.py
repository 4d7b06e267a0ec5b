"""A child process of ours: told, waited for, and never left behind."""

from __future__ import annotations

import os
import signal
import time
from typing import Optional

_PACE_S = 0.005


class Child:
    """A forked process that nobody else waits for, so that its number can't become another's before it is waited for."""

    def __init__(self, pid: int) -> None:
        self._pid: Optional[int] = pid

    def tell(self, number: signal.Signals) -> None:
        """Send it a signal; nothing if it has ended."""
        if self._pid is not None:
            os.kill(self._pid, number)

    def has_ended(self, within_s: float) -> bool:
        """Whether it ends in that time."""
        deadline = time.monotonic() + within_s
        while self._pid is not None:
            if os.waitpid(self._pid, os.WNOHANG)[0]:
                self._pid = None
            elif time.monotonic() > deadline:
                return False
            else:
                time.sleep(_PACE_S)  # waitpid(2) has no time limit, and kernels before 5.3 have no pidfd
        return True

    def end(self, grace_s: float) -> None:
        """End it: SIGTERM, and SIGKILL if it is still there after that time. Returns when it is gone."""
        self.tell(signal.SIGTERM)
        if not self.has_ended(grace_s):
            self.tell(signal.SIGKILL)
            self.has_ended(float("inf"))
