"""The sessions of one worker that are alive, those of them that wait for the policy, and the sweeps over all.

Knows what a worker does with any session. Knows nothing of how a session does it.
"""

from __future__ import annotations

from typing import Dict, Protocol, Set

from _tsproxy.loop.timers import Timer, Timers
from _tsproxy.proxy.sweep import Sweep
from _tsproxy.stats.endings import Ending

_COUNT_NS = 1_000_000_000  # how late the metrics may be about what peers have acknowledged


class LiveSession(Protocol):
    """A session from start() until end()."""

    def end(self, ending: Ending) -> None:
        """Close both sides and write the record. Idempotent."""
        ...

    def on_policy_failed(self) -> None:
        """The policy does not hold any more for some address family: end, if this session depends on it."""
        ...

    def check_peers(self, now_ns: int) -> None:
        """End if a peer has acknowledged nothing for the user timeout."""
        ...

    def count_acknowledged(self) -> None:
        """Bring the counters up to date with what both peers have acknowledged."""
        ...

    def on_bug(self, bug: Exception) -> None:
        """One of the calls above raised: end this session, and say so."""
        ...


class Registry:
    """See the module. `waiting` are the connectors whose SYN the gate has not allowed yet."""

    def __init__(self, timers: Timers, check_peers_ns: int) -> None:
        """`check_peers_ns`: how long a sweep of check_peers() takes; 0: none is made."""
        self.sessions: Dict[int, LiveSession] = {}  # by connection id
        self.waiting: Set[Timer] = set()
        self._counting = Sweep(timers, self.sessions, _COUNT_NS, lambda session, _: session.count_acknowledged())
        self._checking = Sweep(timers, self.sessions, check_peers_ns, lambda session, now_ns: session.check_peers(now_ns))
        self._checks = bool(check_peers_ns)

    def begin_sweeps(self, now_ns: int) -> None:
        """There is a session that relays."""
        self._counting.begin(now_ns)
        if self._checks:
            self._checking.begin(now_ns)
