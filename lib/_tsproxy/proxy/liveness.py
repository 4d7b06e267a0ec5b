"""Whether the peers of a session are still alive: each that owes an acknowledgement is checked by the clock.

A peer that acknowledges is alive, however slowly it reads. TCP_USER_TIMEOUT (tcp(7)) can't tell: the kernel counts the
time for which a window is closed, though each of its probes is acknowledged (tcp_probe_timer(), net/ipv4/tcp_timer.c),
and its bytes may be all in the kernel, where this program does not see that they wait. So that option stays off, and
TCP_INFO is read instead. A peer is gone when, for the whole timeout,

- something was outstanding and none of it was acknowledged (tcpi_unacked, tcpi_notsent_bytes, tcpi_bytes_acked),
- no ACK came, new or not (tcpi_last_ack_recv): what answers a probe of a closed window is an ACK that moves nothing,
- though it was asked more than once (tcpi_probes, tcpi_retransmits).

Keepalive is the kernel's business: it runs only while nothing is outstanding, and there is nothing to see here then.

Against a closed window the kernel doubles the time between probes up to two minutes (RTO_MAX), so a peer that goes then
would be noticed late. A look that finds the same for a second time therefore shortens it: by TCP_RTO_MAX_MS (Linux
6.15). Before that a user timeout that always lies ahead does it, since a probe is never put off beyond it
(tcp_clamp_probe0_to_user_timeout()); each look moves it on. Both are undone when the peer moves on.

After close(2) the kernel is alone with what is unsent, and delivers it to who acknowledges; but when a window has stayed
closed until a probe would be two minutes away it gives such an orphan up (tcp_orphan_retries()).

A look costs two system calls for each connection that has moved since it was last found settled, and one comparison for
all others; they come in slices over a third of the timeout. Knows nothing of what becomes of who is gone.
"""

from __future__ import annotations

import contextlib
import socket
from typing import NamedTuple, Optional

from _tsproxy.linux import sockets, uapi

_CHECKS = 3  # in a timeout
_SHORTEST_NS = 100_000_000  # between checks: a shorter timeout is noticed later
_BLOCKED_LOOP_MS = 5000  # for so long the loop may stand still before the kernel ends a peer whose timeout it should move on
_JIFFY_MS = 10  # what the kernel's milliseconds may be short of, at most (HZ=100)


class Stall(NamedTuple):
    """What a check found outstanding, and when (CLOCK_MONOTONIC); and the option that must be set back when it is over."""

    acknowledged: int
    since_ns: int
    undo: Optional[sockets.TcpOption] = None

    def clear(self, sink: socket.SocketType) -> None:
        """The peer moves on, or the socket is about to be closed: the options are as before, also for what close(2) leaves."""
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
        """TCP_INFO of one peer's socket against what the last check found. No stall: all is acknowledged, or moves on."""
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
        """Let the kernel send a probe at least once between two checks; see the module."""
        step_ms = self.step_ns // 1_000_000
        if stall.undo is None:
            undo = sockets.limit_rto(sink, step_ms) or sockets.TcpOption(uapi.TCP_USER_TIMEOUT, 0)
            stall = stall._replace(undo=undo)
        if stall.undo is not None and stall.undo.number == uapi.TCP_USER_TIMEOUT:
            ahead_ms = waited_ms + step_ms + max(self._timeout_ms, _BLOCKED_LOOP_MS)
            with contextlib.suppress(OSError):
                sink.setsockopt(socket.IPPROTO_TCP, uapi.TCP_USER_TIMEOUT, min(ahead_ms, 2**31 - 1))
        return stall
