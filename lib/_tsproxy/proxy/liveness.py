"""Whether the peers of a connection still live: each that owes an acknowledgement is looked at by the clock.

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
from typing import Any, Dict, Optional, Protocol

from _tsproxy.linux import sockets, uapi
from _tsproxy.loop.timers import Timers
from _tsproxy.proxy.sweep import SessionSweep

_LOOKS = 3  # in a timeout
_SHORTEST_NS = 100_000_000  # between looks: a shorter timeout is noticed later
_STALL_MS = 5000  # for so long the loop may stand still before the kernel ends a peer whose timeout it should move on
_JIFFY_MS = 10  # what the kernel's milliseconds may be short of, at most (HZ=100)


class Stall:
    """What a look found outstanding, and when; and what must be set back when it is over."""

    __slots__ = ("acknowledged", "since_ns", "undo")

    def __init__(self, acknowledged: int, since_ns: int) -> None:
        self.acknowledged, self.since_ns = acknowledged, since_ns
        self.undo: Optional[sockets.TcpOption] = None


class PeerDirection(Protocol):
    """One way of a connection; its sink is the peer in question."""

    sink: socket.SocketType
    stall: Optional[Stall]


class Liveness:
    """Asks each session in turn to look at its peers. Without a timeout it does nothing."""

    def __init__(self, timers: Timers, sessions: Dict[int, Any], timeout_ms: int) -> None:
        """`relays` are all that there are, kept by their owner; `timeout_ms` of 0 is off."""
        self._timeout_ms = timeout_ms
        self._step_ns = max(-(-timeout_ms * 1_000_000 // _LOOKS), _SHORTEST_NS)
        self._rounds = SessionSweep(timers, sessions, self._step_ns, lambda session, now_ns: session.look(now_ns))

    def begin(self, now_ns: int) -> None:
        """There is a connection."""
        if self._timeout_ms:
            self._rounds.begin(now_ns)

    def is_gone(self, way: PeerDirection, now_ns: int) -> bool:
        """Look at one sink. It is settled when it leaves no doubt."""
        seen = sockets.outstanding(way.sink)
        stall = way.stall
        if stall is None or not seen.any or seen.acknowledged != stall.acknowledged:
            clear_stall(way)
            way.stall = Stall(seen.acknowledged, now_ns) if seen.any else None
            return False
        waited_ms = (now_ns - stall.since_ns) // 1_000_000
        if min(waited_ms, seen.silent_ms + _JIFFY_MS) >= self._timeout_ms and seen.asked:
            return True
        self._hasten(way.sink, stall, waited_ms)
        return False

    def _hasten(self, sink: socket.SocketType, stall: Stall, waited_ms: int) -> None:
        """Let the kernel ask at least once between two looks; see the module."""
        step_ms = self._step_ns // 1_000_000
        if stall.undo is None:
            stall.undo = sockets.limit_rto(sink, step_ms) or sockets.TcpOption(uapi.TCP_USER_TIMEOUT, 0)
        if stall.undo.number == uapi.TCP_USER_TIMEOUT:
            ahead_ms = waited_ms + step_ms + max(self._timeout_ms, _STALL_MS)
            with contextlib.suppress(OSError):
                sink.setsockopt(socket.IPPROTO_TCP, uapi.TCP_USER_TIMEOUT, min(ahead_ms, 2**31 - 1))


def clear_stall(way: PeerDirection) -> None:
    """There is no doubt (any more); the socket is set as before, also for what the kernel sends after close(2)."""
    stall, way.stall = way.stall, None
    if stall is not None and stall.undo is not None:
        with contextlib.suppress(OSError):
            way.sink.setsockopt(socket.IPPROTO_TCP, *stall.undo)
