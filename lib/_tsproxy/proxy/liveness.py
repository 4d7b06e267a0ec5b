"""Liveness checks (--user-timeout): whether a peer with outstanding bytes still acknowledges, by TCP_INFO and a timer.

A peer that acknowledges is alive, however slowly it reads. TCP_USER_TIMEOUT (tcp(7)) can't be used: the kernel counts the
time for which a window is closed, though the peer acknowledges each probe (tcp_probe_timer(), net/ipv4/tcp_timer.c). Nor do
pending bytes show it: all may be in the kernel's send buffer. So that option stays off, and TCP_INFO is read instead. A peer is
dead if, for the whole timeout,

- something was outstanding and none of it was acknowledged (tcpi_unacked, tcpi_notsent_bytes, tcpi_bytes_acked),
- no ACK came, new or not (tcpi_last_ack_recv): the answer to a probe of a closed window is an ACK of nothing new,
- though there was more than one probe or retransmit (tcpi_probes, tcpi_retransmits).

Keepalive is left to the kernel: it runs only while nothing is outstanding, when these checks find nothing.

With a closed window the kernel doubles the time between probes up to two minutes (RTO_MAX), so a dead peer would be noticed
late. A check that finds no progress therefore limits that time: by TCP_RTO_MAX_MS (Linux 6.15). Before that by a
TCP_USER_TIMEOUT that always expires in the future, since no probe is scheduled after it
(tcp_clamp_probe0_to_user_timeout()); each check moves it on. Both are undone when the peer makes progress. By that option two
probes are up to a third of the timeout and max(timeout, 5 s) apart. It takes two, and a check, so death is noticed after three
timeouts, or after one and 10 s.

After close(2) only the kernel holds the unsent bytes, and delivers them to a peer that acknowledges. It gives up such an orphan
when the window has been closed until the time between probes is two minutes (tcp_orphan_retries()).

A check costs two system calls for each connection with traffic since all was last acknowledged, and one comparison for
the others. A sweep takes a third of the timeout. Knows nothing of how a session with a dead peer ends.
"""

from __future__ import annotations

import contextlib
import socket
from typing import NamedTuple, Optional

from _tsproxy.linux import sockets, uapi

_CHECKS = 3  # in a timeout
_SHORTEST_NS = 100_000_000  # between checks: a shorter timeout is noticed later
_BLOCKED_LOOP_MS = 5000  # for so long a handler may block before TCP_USER_TIMEOUT, not moved on, expires
_JIFFY_MS = 10  # the most by which the kernel's milliseconds are too low (HZ=100)


class Stall(NamedTuple):
    """A peer with outstanding bytes: what it had acknowledged, since when (CLOCK_MONOTONIC), and the option to restore."""

    acknowledged: int
    since_ns: int
    undo: Optional[sockets.TcpOption] = None

    def clear(self, sink: socket.SocketType) -> None:
        """Restore the option: the peer makes progress, or close(2) comes, after which the kernel delivers what is left."""
        if self.undo is not None:
            with contextlib.suppress(OSError):
                sink.setsockopt(socket.IPPROTO_TCP, *self.undo)


class Verdict(NamedTuple):
    """Whether the peer is dead; if not, the stall to remember for the next check."""

    is_dead: bool
    stall: Optional[Stall]


class Liveness:
    """The check of one peer; see the module. `timeout_ms` of 0 is off."""

    def __init__(self, timeout_ms: int) -> None:
        self._timeout_ms = timeout_ms
        # How long a sweep over all sessions takes; 0 if there is none.
        self.step_ns = max(-(-timeout_ms * 1_000_000 // _CHECKS), _SHORTEST_NS) if timeout_ms else 0

    def check(self, sink: socket.SocketType, stall: Optional[Stall], now_ns: int) -> Verdict:
        """Compare TCP_INFO of a peer's socket with the last check's. No stall: all is acknowledged, or there is progress."""
        seen = sockets.outstanding(sink)
        if stall is None or not seen.any or seen.acknowledged != stall.acknowledged:
            if stall is not None:
                stall.clear(sink)
            return Verdict(False, Stall(seen.acknowledged, now_ns) if seen.any else None)
        waited_ms = (now_ns - stall.since_ns) // 1_000_000
        if min(waited_ms, seen.silent_ms + _JIFFY_MS) >= self._timeout_ms and seen.unanswered:
            return Verdict(True, stall)
        return Verdict(False, self._probe_sooner(sink, stall, waited_ms))

    def _probe_sooner(self, sink: socket.SocketType, stall: Stall, waited_ms: int) -> Stall:
        """Have the kernel send at least one probe between two checks; see the module."""
        step_ms = self.step_ns // 1_000_000
        if stall.undo is None:
            undo = sockets.limit_rto(sink, step_ms) or sockets.TcpOption(uapi.TCP_USER_TIMEOUT, 0)
            stall = stall._replace(undo=undo)
        if stall.undo is not None and stall.undo.number == uapi.TCP_USER_TIMEOUT:
            ahead_ms = waited_ms + step_ms + max(self._timeout_ms, _BLOCKED_LOOP_MS)
            with contextlib.suppress(OSError):
                sink.setsockopt(socket.IPPROTO_TCP, uapi.TCP_USER_TIMEOUT, min(ahead_ms, 2**31 - 1))
        return stall
