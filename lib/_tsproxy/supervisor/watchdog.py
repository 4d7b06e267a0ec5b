"""What the service manager hears while tsproxy lives: WATCHDOG=1 as long as every worker takes what it is given, and STATUS.

A stuck loop goes silent, and is restarted. A busy one is not: what counts is that a worker has taken what was in its
inbox when it was asked, not that the inbox is empty.
"""

from __future__ import annotations

import time
from typing import Callable, Optional

from _tsproxy.linux.systemd import Notifier
from _tsproxy.supervisor.worker_pool import WorkerPool

_ASKS = 3  # within the manager's limit, so that one answer that comes late is no hang
_LOOKS = 10  # for the answers, from one question to the next
_STATUS_S = 10.0  # how old STATUS may be where there is no watchdog


class Watchdog:
    """Ask it for `due_s` and call tick() then, or more often: it does nothing before. Without a manager it is never due."""

    def __init__(self, notifier: Notifier, pool: WorkerPool, status: Callable[[], str]) -> None:
        """`status` is the one place that knows what tsproxy does just now."""
        self._notifier, self._pool, self._status = notifier, pool, status
        self._interval_s = notifier.watchdog_s / _ASKS or _STATUS_S
        self._asked = self._next = time.monotonic()
        self._waits = False  # for answers

    @property
    def due_s(self) -> Optional[float]:
        """Seconds until the next tick; None if nobody waits for one."""
        return max(0.0, self._next - time.monotonic()) if self._notifier.is_heard else None

    def notify(self, **state: object) -> None:
        """A change of state, with the status that goes with it."""
        self._notifier.notify(**state, STATUS=self._status())

    def extend(self, by_s: float, **state: object) -> None:
        """The same, and it may take so long."""
        self._notifier.extend(by_s, **state, STATUS=self._status())

    def tick(self) -> None:
        """Ask the workers, or look whether all have answered, and then say so."""
        if self.due_s != 0:
            return
        if not self._notifier.watchdog_s:
            self._next = time.monotonic() + self._interval_s
            self.notify()
        elif not self._waits:
            self._waits, self._asked = True, time.monotonic()
            self._pool.ping()
            self._look()
        else:
            self._look()

    def _look(self) -> None:
        self._next = time.monotonic() + self._interval_s / _LOOKS
        if self._pool.all_answered():
            self._waits, self._next = False, self._asked + self._interval_s
            self.notify(WATCHDOG=1)
