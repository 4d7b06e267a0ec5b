"""WATCHDOG=1 for systemd, as long as every worker still empties its inbox. A stuck loop goes silent, and is restarted."""

from __future__ import annotations

import time
from typing import Optional

from _tsproxy.host.systemd import Notifier
from _tsproxy.runtime.crew import Crew


class Watchdog:
    """Ask it for `due_s` and call tick() then. Without a watchdog it is never due."""

    def __init__(self, notifier: Notifier, crew: Crew) -> None:
        self._notifier, self._crew = notifier, crew
        self._next = time.monotonic()

    @property
    def due_s(self) -> Optional[float]:
        """Seconds until the next tick; None if nobody waits for one."""
        return max(0.0, self._next - time.monotonic()) if self._notifier.watchdog_s else None

    def tick(self, status: str) -> None:
        """Ping the workers; say that we are well if all have answered the ping before."""
        self._next = time.monotonic() + self._notifier.watchdog_s
        if self._crew.all_answered():
            self._notifier.say(WATCHDOG=1, STATUS=status)
        self._crew.ping()
