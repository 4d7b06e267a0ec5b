"""Child processes: ours told, waited for, and never left behind; those of others, where they are left to us, reaped."""

from __future__ import annotations

import os
import signal
import time
from typing import Collection, Optional

_PACE_S = 0.005
_HEARD = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def fork_deaf() -> int:
    """fork(2) a child that SIGTERM, SIGINT, SIGHUP and SIGUSR1 say nothing to, from its first instruction on.

    Ctrl-C reaches the whole group; what it means is the parent's to say. And the child has the parent's wake-up
    descriptor (signal.set_wakeup_fd): a signal to both would be told to the parent twice.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HEARD)
    try:
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            for number in _HEARD:
                signal.signal(number, signal.SIG_IGN)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return pid


def reap_others(ours: Collection[int]) -> None:
    """Reap each ended child that is not in `ours`: an orphan that became PID 1's, or one from before execve(2).

    It ends at one of ours, whose status stays for whoever waits for it by its number (waitid(2), WNOWAIT): call it again
    after that. Where a sandbox refuses waitid(2) the orphans stay zombies.
    """
    while True:
        try:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if found is None or found.si_pid in ours:
                return
            os.waitid(os.P_PID, found.si_pid, os.WEXITED)
        except OSError:  # ECHILD: there is no child
            return


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
