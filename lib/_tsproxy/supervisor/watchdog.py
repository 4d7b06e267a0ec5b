"""What the service manager gets while tsproxy runs: WATCHDOG=1 as long as every worker consumes its inbox, and STATUS.

A worker whose loop is stuck stops WATCHDOG=1, and the manager restarts the service. A busy one does not: it has to consume
what was in its inbox at the time of the ping, not to empty it.
"""

from __future__ import annotations

import time
from typing import Callable

from _tsproxy.linux.systemd import Notifier
from _tsproxy.loop.event_loop import EventLoop
from _tsproxy.supervisor.callbacks import CallTimer
from _tsproxy.supervisor.worker_pool import WorkerPool

_PINGS = 3  # within the manager's limit, so that one late answer is no hang
_CHECKS = 10  # of the answers, from one ping to the next
_STATUS_S = 10.0  # how old STATUS may be where there is no watchdog


class Watchdog:
    """A timer of the loop from start() on. Does nothing where there is no service manager."""

    def __init__(self, loop: EventLoop, notifier: Notifier, pool: WorkerPool, status: Callable[[], str]) -> None:
        """`status` gives the text of STATUS."""
        self._notifier, self._pool, self._status = notifier, pool, status
        self._timer = CallTimer(loop, self._ping if notifier.watchdog_s else self._refresh)
        self._check_timer = CallTimer(loop, self._check)
        self._interval_s = notifier.watchdog_s / _PINGS
        self._pinged_at = 0.0

    def start(self) -> None:
        """Ping the workers from now on, or only keep STATUS fresh if the manager has no watchdog for this service."""
        if self._notifier.has_manager:
            self._timer.arm(0)

    def notify(self, **state: object) -> None:
        """Send a change of state with its STATUS."""
        self._notifier.notify(**state, STATUS=self._status())

    def extend(self, by_s: float, **state: object) -> None:
        """The same, with EXTEND_TIMEOUT_USEC."""
        self._notifier.extend(by_s, **state, STATUS=self._status())

    def _refresh(self) -> None:
        self._timer.arm(_STATUS_S)
        self.notify()

    def _ping(self) -> None:
        self._pinged_at = time.monotonic()
        self._pool.ping()
        self._check()

    def _check(self) -> None:
        """WATCHDOG=1 once all have answered, and the next ping an interval after this one."""
        if self._pool.all_answered():
            self._timer.arm(max(0.0, self._pinged_at + self._interval_s - time.monotonic()))
            self.notify(WATCHDOG=1)
        else:
            self._check_timer.arm(self._interval_s / _CHECKS)
