"""Signals that come faster than they are read: each kind is pending once, and none is lost behind others."""

from __future__ import annotations

from in_child import child

_STORM = """
import os, signal, sys
from _tsproxy.supervisor.signals import Signals
signals = Signals()
for _ in range(70_000):  # more than the pipe has room for
    os.kill(os.getpid(), signal.SIGUSR1)
for number in (signal.SIGTERM, signal.SIGCHLD, signal.SIGTERM):
    os.kill(os.getpid(), number)
print(signals.has_termination, *[number.name for number in signals.pop_all()])
print(signals.has_termination, *signals.pop_all())
os.kill(os.getpid(), signal.SIGUSR1)
print(len(os.read(signals.fd, 9)), *[number.name for number in signals.pop_all()])
"""


def test_a_storm_of_one_signal_leaves_room_for_each_other() -> None:
    assert child([_STORM]).splitlines() == ["True SIGUSR1 SIGTERM SIGCHLD", "False", "1 SIGUSR1"]
