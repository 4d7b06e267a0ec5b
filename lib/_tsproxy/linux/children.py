"""Child processes: fork(2), signal and wait for our own; reap those that the kernel gives to PID 1."""

from __future__ import annotations

import os
import signal
import time
from typing import Collection, Optional

_POLL_INTERVAL_S = 0.005
_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def fork_ignoring_signals() -> int:
    """fork(2) a child that ignores SIGTERM, SIGINT, SIGHUP and SIGUSR1, from its first instruction on.

    Ctrl-C sends SIGINT to the whole process group; only the parent handles it. And the child inherits the parent's wake-up
    descriptor (signal.set_wakeup_fd): a signal to both would arrive at the parent twice.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED)
    try:
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            for number in _IGNORED:
                signal.signal(number, signal.SIG_IGN)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return pid


def reap_others(ours: Collection[int]) -> None:
    """Reap each exited child that is not in `ours`: an orphan that was reparented to PID 1, or a child from before execve(2).

    It stops at one of ours, whose status is left for the caller that waits for its pid (waitid(2), WNOWAIT): call it again
    after that. If a sandbox refuses waitid(2) the orphans stay zombies.
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
    """A forked process that only this object waits for: until then the kernel does not reuse its pid."""

    def __init__(self, pid: int) -> None:
        self._pid: Optional[int] = pid

    def send_signal(self, number: signal.Signals) -> None:
        """kill(2) it; does nothing once it was waited for."""
        if self._pid is not None:
            os.kill(self._pid, number)

    def has_exited(self, within_s: float) -> bool:
        """Wait for it; whether it has exited within that time."""
        deadline = time.monotonic() + within_s
        while self._pid is not None:
            if os.waitpid(self._pid, os.WNOHANG)[0]:
                self._pid = None
            elif time.monotonic() > deadline:
                return False
            else:
                time.sleep(_POLL_INTERVAL_S)  # waitpid(2) has no time limit, and kernels before 5.3 have no pidfd
        return True

    def terminate(self, grace_s: float) -> None:
        """Send SIGTERM, and SIGKILL if it has not exited within `grace_s`. Blocks until it has exited."""
        self.send_signal(signal.SIGTERM)
        if not self.has_exited(grace_s):
            self.send_signal(signal.SIGKILL)
            self.has_exited(float("inf"))
