"""A session: one client connection and the upstream connection made for it, from dispatch to record.

CONNECTING: the connector tries the upstream addresses; the client is watched for ERR and HUP only, its data stays in the
socket buffer. RELAYING: the policy gate has allowed the connection, two directions relay. CLOSED: close(2) of both sockets is
pending, the record is written after it.

A FIN of either side is passed on as FIN, a reset as a reset. Any end other than two FINs resets both sides, so that a
truncated stream never looks complete. After two FINs no reset is sent (but after a bug): the session waits until the bytes in
the kernel's send buffers are acknowledged, and at any other end the kernel goes on delivering them.

Knows the two sockets and the order of states. Knows nothing of accepting, of how names are resolved, or of what the gate
checks. The file reads in the order of a session's life.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import time
from typing import Optional, Tuple

from _tsproxy.linux import sockets, uapi
from _tsproxy.linux.addresses import family_of, pack
from _tsproxy.linux.sockets import TcpInfo
from _tsproxy.loop.poller import BROKEN, MORE, READABLE, WRITABLE
from _tsproxy.loop.posted import NEW
from _tsproxy.loop.timers import TICK_NS
from _tsproxy.proxy.connector import Connector
from _tsproxy.proxy.context import RouteContext
from _tsproxy.proxy.direction import Direction, make_directions
from _tsproxy.proxy.inbox import Message
from _tsproxy.proxy.states import CLOSED, CONNECTED, CONNECTING, ENDED, OPEN, RELAYING, SHUT, phase_after
from _tsproxy.stats.counters import Counter
from _tsproxy.stats.endings import WHILE_CONNECTING, Ending
from _tsproxy.stats.records import ConnectionRecord

Peers = Tuple[TcpInfo, ...]  # of the upstream one, and of the client
_Relayed = Tuple[bytes, Optional[int], int, Optional[int], Optional[int], int, int, int, int, int]
_UNSEEN = TcpInfo(False, 0, 0, 0, outstanding=False, closed=True)
_QUIET_VISITS = 9  # after so many without a look at TCP_INFO there is one, within ten seconds: keepalive probes are segments
_NOT_READABLE, _NOT_WRITABLE = ~(READABLE | MORE), ~WRITABLE  # events of the direction's sink, and of its source
_CUTTING = frozenset({Ending.POLICY, Ending.BUG})  # always reset: bytes must not be sent, or may be incomplete
_GRAINS_NS = 256 * TICK_NS  # an idle timeout may fire 1/256 of its length late, or one tick
_ENDING_COUNTERS = {Ending.POLICY: Counter.POLICY_REFUSED, Ending.POLICY_DRIFT: Counter.POLICY_ENDED}


class Session:
    """See the module. While connecting it handles the client's descriptor itself; its timer is the idle timeout."""

    lane = NEW
    __slots__ = (
        "_client",
        "_client_timestamps",
        "_connector",
        "_context",
        "_directions",
        "_has_keepalive",
        "_message",
        "_phase",
        "_quiet_visits",
        "_segments_received",
        "_segments_sent",
        "_settled_at",
        "_upstream_timestamps",
    )

    def __init__(self, context: RouteContext, message: Message) -> None:
        """Own the client's descriptor. Makes no connection before start()."""
        self._context, self._message = context, message
        self._phase = CONNECTING
        self._client = sockets.from_fd(message.fd)
        self._client_timestamps: Optional[bool] = None  # not asked yet
        self._connector = Connector(self, context, message.upstreams, message.accepted_ns)
        self._directions: Tuple[Direction, ...] = ()  # to_upstream and to_downstream, while RELAYING
        self._upstream_timestamps: Optional[bool] = None
        self._has_keepalive = False  # of the upstream socket; the client's has the listener's
        self._settled_at = 0  # _last_active_ns when both peers had acknowledged all bytes
        self._segments_sent = self._segments_received = 0  # of the upstream connection, as of the last TCP_INFO
        self._quiet_visits = 0
        context.registry.sessions[message.connection_id] = self

    # Connecting

    def start(self) -> None:
        """Begin to connect, and watch the client for ERR and HUP."""
        self._connector.connect()
        if self._phase is CONNECTING:
            self._context.loop.watch(self._message.fd, 0, self)
        if len(self._context.registry.sessions) == 1:  # the first one: somebody has to sample what it sends
            self._context.records.wake(self._context.loop.now)

    def readable(self) -> None:
        """Not called: the lane is NEW."""

    def ready(self, mask: int) -> None:
        """EPOLLERR or EPOLLHUP: the client has reset the connection while it was connecting."""
        if mask & BROKEN:
            self.end(Ending.CLIENT_LEFT)

    def on_connect_failed(self, ending: Ending) -> None:
        """See ConnectorEvents."""
        self.end(ending)

    def on_connected(self, upstream: socket.SocketType, info: TcpInfo) -> None:
        """Ask the gate, and start to relay; or reset both sides with nothing relayed."""
        context = self._context
        self._connector.close()
        self._phase = phase_after(self._phase, CONNECTED)
        up, _ = self._directions = make_directions(self, context, self._client, upstream)
        up.acknowledged_before = info.acknowledged
        self._upstream_timestamps = info.timestamps
        if info.timestamps:
            context.count(Counter.UPSTREAM_TIMESTAMPS)
        if not context.gate.may_relay(upstream, info):
            self.end(Ending.POLICY)
            return
        context.registry.begin_sweeps(up.last_active_ns)
        up.readable()  # relay what the client has sent meanwhile at once, before the descriptors are watched
        self.on_flow()

    def on_policy_failed(self) -> None:
        """See LiveSession. While connecting there may be addresses left of another family, for which the policy holds."""
        upstream = self._connector.upstream
        if self._phase is CONNECTING:
            self._connector.on_policy_failed()
        elif upstream is not None and self._context.gate.ends(family_of(upstream), established=True):
            self.end(Ending.POLICY_DRIFT)

    # Relaying

    def on_event(self, direction: Direction, mask: int) -> None:
        """See SessionEvents: EPOLLOUT for the reverse direction's pending bytes, EPOLLIN, EPOLLHUP or EPOLLERR."""
        if mask & _NOT_READABLE and direction.reverse.pending is not None:
            direction.reverse.drain()
        if mask & _NOT_WRITABLE and self._phase is RELAYING and direction.is_reading:
            direction.reader.readable()
            if mask & MORE and self._phase is RELAYING and direction.is_reading:
                self._context.loop.poller.rearm(direction.fd)
        if mask & BROKEN and self._phase is RELAYING and not direction.is_reading:
            self._on_hang_up(direction)

    def _on_hang_up(self, direction: Direction) -> None:
        """EPOLLHUP of a side that is not being read: a reset, passed on at once; or, after both FINs, its last ACK."""
        code = direction.source.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if self._is_complete:
            self._end_if_acknowledged()
        if code and self._phase is RELAYING:
            self.on_broken_source(direction, OSError(code, "hang-up"))

    def on_flow(self) -> None:
        """Set each descriptor's interest and the timer by the state. End if both directions are shut and acknowledged."""
        if self._is_complete:
            self._end_if_acknowledged()
        if self._phase is RELAYING:
            watch = self._context.loop.watch
            up, down = self._directions
            watch(up.fd, up.interest, up.reader)
            watch(down.fd, down.interest, down.reader)
            self._set_timer()

    def on_shut(self, direction: Direction) -> None:
        """See SessionEvents: what a descriptor waits for changes only if bytes of the reverse direction are pending."""
        if direction.reverse.pending is not None:
            self.on_flow()
        elif self._is_complete:
            self._end_if_acknowledged()
        else:
            self._set_timer()

    @property
    def _is_complete(self) -> bool:
        """Whether both sides' FINs were passed on, each behind all bytes before it."""
        if self._phase is not RELAYING:
            return False
        up, down = self._directions  # no generator: this is asked often in a session's life
        return up.flow is SHUT and down.flow is SHUT

    @property
    def _is_half_closed(self) -> bool:
        up, down = self._directions
        return up.flow is not OPEN or down.flow is not OPEN

    # Acknowledged by the peers

    def _end_if_acknowledged(self) -> None:
        """Both FINs have come; close(2) would send the second one. If bytes are unacknowledged, shutdown(2) sends it now.

        EPOLLHUP after the last ACK then leads here again, so that the record has the acknowledged bytes.
        """
        peers = self._look_at_peers()
        if self._awaits_acknowledgement(peers):
            for direction in self._directions:
                with contextlib.suppress(OSError):  # reset just now: EPOLLHUP reports it
                    direction.sink.shutdown(socket.SHUT_WR)
            peers = self._look_at_peers()
        if not self._awaits_acknowledgement(peers):
            self.end(Ending.CLOSED, peers)

    def _awaits_acknowledgement(self, peers: Peers) -> bool:
        (up, down), (upstream, client) = self._directions, peers
        waits_for_upstream = (upstream.outstanding or upstream.closed) and up.unacknowledged
        return bool(waits_for_upstream or ((client.outstanding or client.closed) and down.unacknowledged))

    def visit_each_second(self) -> None:
        """See LiveSession. Costs some comparisons if all is acknowledged."""
        if not self._directions:
            return
        up, down = self._directions
        self._quiet_visits += 1
        if up.unacknowledged or down.unacknowledged or self._client_timestamps is None:
            self._look_at_peers()
        elif self._quiet_visits >= _QUIET_VISITS:
            self._count_segments(sockets.tcp_info(up.sink))
        if not self._has_keepalive:  # not at connect(2): four system calls that most short connections need not pay for
            self._has_keepalive = True
            self._context.settings.tuning.set_keepalive(up.sink)

    def _look_at_peers(self) -> Peers:
        """Read TCP_INFO of each direction's sink; count what is new since the last look; () while connecting."""
        if not self._directions:
            self._see_client(sockets.has_timestamps(self._client))
            return ()
        up, down = self._directions
        upstream, client = sockets.tcp_info(up.sink), sockets.tcp_info(down.sink)
        self._see_client(client.timestamps)
        self._count_segments(upstream)
        up.count_acknowledged(upstream.acknowledged)
        down.count_acknowledged(client.acknowledged)
        return upstream, client

    def _see_client(self, timestamps: bool) -> None:
        """Whether the client's connection negotiated TSopt: within a second, and at the end, when TCP_INFO is read anyway."""
        if self._client_timestamps is None:
            self._client_timestamps = timestamps
            if timestamps:
                self._context.count(Counter.DOWNSTREAM_TIMESTAMPS)

    def _count_segments(self, upstream: TcpInfo) -> None:
        """Count the segments of the upstream connection since the last look. The kernel counts modulo 2**32, this does not."""
        self._quiet_visits = 0
        sent = (upstream.segments_sent - self._segments_sent) % 2**32
        received = (upstream.segments_received - self._segments_received) % 2**32
        self._segments_sent += sent
        self._segments_received += received
        counters = self._context.counters
        counters[Counter.SEGMENTS_SENT] += sent
        counters[Counter.SEGMENTS_RECEIVED] += received

    def check_peers(self, now_ns: int) -> None:
        """See LiveSession. After both peers have acknowledged all, they are not checked until there is traffic again."""
        if self._phase is not RELAYING or self._settled_at == self._last_active_ns:
            return
        last_active_ns = self._last_active_ns
        for direction in self._directions:
            is_dead, direction.stall = self._context.liveness.check(direction.sink, direction.stall, now_ns)
            if is_dead:
                self.on_broken_sink(direction, OSError(errno.ETIMEDOUT, "no ACK within the user timeout"))
                return
        if not any(direction.stall for direction in self._directions):
            self._settled_at = last_active_ns

    # Idle timeouts

    @property
    def _last_active_ns(self) -> int:
        up, down = self._directions
        return max(up.last_active_ns, down.last_active_ns)

    @property
    def _silence_ns(self) -> int:
        """The idle timeout that applies now; 0: none."""
        settings = self._context.settings
        idle, half_closed = settings.idle_timeout_ns, settings.half_close_timeout_ns
        if not half_closed or not self._is_half_closed:
            return idle
        return min(idle, half_closed) if idle else half_closed

    def _set_timer(self) -> None:
        limit, timers = self._silence_ns, self._context.loop.timers
        if limit:
            timers.arm(self, self._last_active_ns + limit, limit // _GRAINS_NS or 1)
        else:
            timers.disarm(self)

    def on_deadline(self, now_ns: int) -> None:
        """End the session if its idle timeout has passed."""
        limit = self._silence_ns
        if limit and self._last_active_ns + limit <= now_ns:
            self._see_what_kernel_moves(now_ns)
        if limit and self._last_active_ns + limit <= now_ns:
            self._end_silent()
        else:
            self._set_timer()

    def _see_what_kernel_moves(self, now_ns: int) -> None:
        """Bytes in the kernel's send buffer count as traffic while they are being sent, to a peer that reads slowly."""
        for direction in self._directions:
            seen = sockets.outstanding(direction.sink)
            if seen.any and not seen.retransmits:
                direction.last_active_ns = max(direction.last_active_ns, now_ns - seen.sent_ms * 1_000_000)

    def _end_silent(self) -> None:
        settings, server = self._context.settings, self._waits_for_server()
        if self._is_complete:
            self.end(Ending.CLOSED)
        elif self._is_half_closed and not 0 < settings.idle_timeout_ns <= settings.half_close_timeout_ns:
            self.end(Ending.SERVER_HALF_CLOSED if server else Ending.CLIENT_HALF_CLOSED)
        else:
            self._context.count(Counter.IDLE_TIMEOUT)
            self.end(Ending.SERVER_IDLE if server else Ending.CLIENT_IDLE)

    def _waits_for_server(self) -> bool:
        """Which side is waited for: that with pending bytes, or that has not sent FIN yet; else, as in HAProxy, the client."""
        up, down = self._directions
        if up.pending is not None or down.pending is not None:
            return up.pending is not None
        return self._is_half_closed and down.flow is OPEN

    # Ending

    def on_broken_source(self, direction: Direction, error: OSError) -> None:
        """See SessionEvents: recv(2) failed, by a reset or a dead path. Reset the other side."""
        self.end(self._ending_of(direction.source, error))

    def on_broken_sink(self, direction: Direction, error: OSError) -> None:
        """send(2) failed. Bytes that this side had sent before are still in its receive queue, and are relayed first."""
        ending = self._ending_of(direction.sink, error)
        direction.reverse.flush_before_reset()
        self.end(ending)

    def _ending_of(self, broken: socket.SocketType, error: OSError) -> Ending:
        """The ending for an errno of an established connection. One that no peer can cause is a bug, and is raised."""
        is_client = broken is self._client
        if error.errno in uapi.PEER_RESET:
            self._context.count(Counter.RESET_BY_PEER)
            return Ending.CLIENT_RESET if is_client else Ending.SERVER_RESET
        if error.errno in uapi.PEER_ERRORS:
            return Ending.CLIENT_TIMEOUT if is_client else Ending.SERVER_TIMEOUT
        raise OSError(error.errno, error.strerror) from error  # another one: its frames have this one, which would be a cycle

    def on_bug(self, bug: Exception) -> None:
        """A handler or timer raised: log it and end this session, and no other."""
        self._context.report(bug)
        try:
            self.end(Ending.BUG)
        except Exception as another:
            self._context.report(another)

    def end(self, ending: Ending, peers: Peers = ()) -> None:
        """Close both sides, release everything, write the record. Pending bytes are discarded, and counted. Idempotent.

        `peers` is TCP_INFO that was just read. With a reset unacknowledged bytes are discarded, too.
        """
        if self._phase is CLOSED:
            return
        if self._phase is CONNECTING:
            ending = WHILE_CONNECTING.get(ending, ending)
            self._connector.close()
        cut = ending in _CUTTING or not self._is_complete
        if not cut and ending is Ending.DRAIN:
            ending = Ending.CLOSED
        self._phase = phase_after(self._phase, ENDED)
        peers = peers or self._last_look()
        left = 0 if cut else self._left_to_kernel(peers)
        self._close_sockets(cut)
        self._count_end(ending)
        del self._context.registry.sessions[self._message.connection_id]
        if self._context.settings.log_connections:
            self._context.record(self._record(ending, peers, left))  # last: a reader of the line finds the counters up to date
        self._directions = ()

    def _last_look(self) -> Peers:
        """TCP_INFO before close(2). If getsockopt(2) is refused now, what was seen before stands, and the end goes on."""
        try:
            return self._look_at_peers()
        except OSError as error:
            self._context.report(error)
            return (_UNSEEN, _UNSEEN)

    def _left_to_kernel(self, peers: Peers) -> int:
        """Bytes that the kernel goes on to deliver after close(2)."""
        left = 0
        for direction, peer in zip(self._directions, peers):
            if peer.outstanding and not peer.closed:
                left += direction.unacknowledged
        return left

    def _close_sockets(self, cut: bool) -> None:
        loop, socks = self._context.loop, [self._client]
        if self._directions:
            up, down = self._directions
            socks.append(down.source)
            up.detach()
            down.detach()
        for sock in socks:
            if cut:
                sockets.reset_on_close(sock)
            loop.close_later(sock)
        loop.timers.disarm(self)

    def _count_end(self, ending: Ending) -> None:
        context = self._context
        if ending in _ENDING_COUNTERS:
            context.count(_ENDING_COUNTERS[ending])
        if self._directions:
            context.count(Counter.CONNECTS_ENDED)
        context.count_client(self._message.client_slot, ended=True)
        context.count(Counter.ENDED)

    def _record(self, ending: Ending, peers: Peers, left: int) -> ConnectionRecord:
        context, message, connector = self._context, self._message, self._connector
        return ConnectionRecord(
            context.number,
            context.settings.route,
            message.connection_id,
            time.time_ns(),
            message.client,
            (time.monotonic_ns() - message.accepted_ns) // 1000,
            ending,
            context.gate.witness,
            self._client_timestamps,
            context.tsval_of(sockets.saved_syn(self._client)),  # the kernel keeps it until it is read
            connector.upstream,
            connector.connect_us,
            self._upstream_timestamps,
            *(self._relayed(peers[0], left) if self._directions else ()),
        )

    def _relayed(self, upstream: TcpInfo, left: int) -> _Relayed:
        """The fields of a record that only a session which has relayed has."""
        up, down = self._directions
        return (
            pack(down.source.family, down.source.getsockname()),
            upstream.rtt_us or None,  # 0: nothing was measured
            upstream.retransmits,
            self._segments_sent or None,
            self._segments_received or None,
            up.received,
            down.acknowledged,
            up.acknowledged,
            up.received - up.acknowledged + down.received - down.acknowledged - left,
            left,
        )
