"""The open sessions of one worker, the connectors that wait for the policy gate, and the sweeps over all sessions.

Knows what a worker calls on any session (LiveSession). Knows nothing of how a session does it.
"""

from __future__ import annotations

from typing import Dict, Protocol, Set

from _tsproxy.loop.timers import Timer, Timers
from _tsproxy.proxy.sweep import Sweep
from _tsproxy.stats.endings import Ending

_SECOND_NS = 1_000_000_000  # the most by which acknowledged bytes in the metrics are late


class LiveSession(Protocol):
    """A session from start() until end()."""

    def end(self, ending: Ending) -> None:
        """Close both sides and write the record. Idempotent."""
        ...

    def on_policy_failed(self) -> None:
        """The policy fails for an address family: end, if this session depends on it."""
        ...

    def check_peers(self, now_ns: int) -> None:
        """End if a peer has acknowledged nothing for the user timeout."""
        ...

    def visit_each_second(self) -> None:
        """Read what both peers have acknowledged, and count it. Set what need not be set at once."""
        ...

    def on_bug(self, bug: Exception) -> None:
        """One of the calls above raised: log it, and end this session."""
        ...


class Registry:
    """See the module. `waiting` are the connectors whose SYN the gate has not allowed yet."""

    def __init__(self, timers: Timers, check_peers_ns: int) -> None:
        """`check_peers_ns`: how long a sweep of check_peers() takes; 0: none is made."""
        self.sessions: Dict[int, LiveSession] = {}  # by connection id
        self.waiting: Set[Timer] = set()
        self._each_second = Sweep(timers, self.sessions, _SECOND_NS, lambda session, _: session.visit_each_second())
        self._checking = Sweep(timers, self.sessions, check_peers_ns, lambda session, now_ns: session.check_peers(now_ns))
        self._checks = bool(check_peers_ns)

    def begin_sweeps(self, now_ns: int) -> None:
        """Start the sweeps, if they do not run: there is a relaying session."""
        self._each_second.begin(now_ns)
        if self._checks:
            self._checking.begin(now_ns)
