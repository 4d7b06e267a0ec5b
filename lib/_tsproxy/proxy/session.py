"""A connection from its handover to its record: connect upstream, ask the gate, relay both ways, end.

Knows the two sockets and the order of things. Knows nothing of accepting, of how names become addresses, or of what
the gate checks. The file reads in the order of a connection's life.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import time
from typing import Dict, Optional, Tuple

from _tsproxy.linux import namespaces, sockets, uapi
from _tsproxy.linux.addresses import PACKED_SIZE, Address, family_of, pack, unpack
from _tsproxy.linux.sockets import TcpInfo
from _tsproxy.loop.poller import BROKEN, MORE, READABLE, WRITABLE, WRITE
from _tsproxy.loop.posted import NOW
from _tsproxy.loop.timers import TICK_NS
from _tsproxy.proxy.context import WorkerContext
from _tsproxy.proxy.direction import FROM_DOWNSTREAM, FROM_UPSTREAM, Direction
from _tsproxy.proxy.inbox import Message
from _tsproxy.proxy.states import CLOSED, CONNECTED, CONNECTING, ENDED, OPEN, RELAYING, SHUT, phase_after
from _tsproxy.stats.counters import CONNECT, Counter, note
from _tsproxy.stats.endings import WHILE_CONNECTING, Ending
from _tsproxy.stats.records import ConnectionRecord, Notice

Peers = Tuple[TcpInfo, ...]  # of the upstream one, and of the client


class Session:
    """One client connection and the upstream connection made for it.

    Upstream addresses are tried in order, each with the connect timeout. Nothing is read from the client before the
    upstream connection is established and the gate has let it pass. Either side's FIN is passed on as FIN, either
    side's reset as a reset; any other end than two FINs resets both sides, so that a cut stream never looks complete.
    After two FINs nothing is cut: what the kernel still has is waited for, and not taken back whatever happens.
    """

    __slots__ = (
        "_candidates",
        "_client_timestamps",
        "_connect_us",
        "_context",
        "_directions",
        "_failure",
        "_message",
        "_phase",
        "_settled_at",
        "_started_ns",
        "_until_ns",
        "_upstream",
        "_upstream_timestamps",
    )

    def __init__(self, context: WorkerContext, message: Message) -> None:
        """Adopt the client's descriptor. Nothing happens before start()."""
        self._context, self._message = context, message
        self._phase = CONNECTING
        self._failure = Ending.CONNECT_FAILED
        self._candidates = message.upstreams
        self._upstream: Optional[bytes] = None
        self._started_ns = message.accepted_ns
        self._until_ns = 0  # when to give up what connecting waits for; 0: nothing yet
        self._connect_us: Optional[int] = None
        self._settled_at = 0  # all that had moved until then was acknowledged by both peers
        self._upstream_timestamps: Optional[bool] = None
        # to_upstream, and to_downstream once there is an upstream socket
        self._directions = [Direction(self, context, sockets.from_fd(message.fd, socket.AF_INET), FROM_DOWNSTREAM)]
        self._client_timestamps = sockets.has_timestamps(self._directions[0].source)
        context.sessions[message.connection_id] = self

    # Connecting

    def start(self) -> None:
        """Begin to connect. Of the client only a hang-up is noticed: what it says waits until it can go on."""
        self._context.count(Counter.DOWNSTREAM_TIMESTAMPS, int(self._client_timestamps))
        self._connect()
        if self._phase is CONNECTING:
            self._context.watch(self._message.fd, 0, self._directions[0])

    def _connect(self) -> None:
        """Try the addresses that are left until a SYN is out or the gate wants time; none left: end as the last one failed."""
        while self._candidates and self._phase is CONNECTING:
            at, allowed = self._choice()
            if allowed is None and self._await_answer():
                return
            packed, self._candidates = self._candidates[at : at + PACKED_SIZE], _without(self._candidates, at)
            if allowed and self._dial(packed):
                return
            if not allowed:
                self._refused(packed)
        self.end(self._failure)

    def _choice(self) -> Tuple[int, Optional[bool]]:
        """Where the address to try stands, and what the gate says of it: it may be tried, or (None) that is not known yet.

        The first that may be, so that one family does not wait for another; else the first not known; else the first.
        """
        found: Dict[Optional[bool], int] = {}
        answers: Dict[int, Optional[bool]] = {}
        for at in range(0, len(self._candidates), PACKED_SIZE):
            family = family_of(self._candidates[at:])
            if family not in answers:
                answers[family] = self._context.gate.may_connect(family)
            if answers[family]:
                return at, True
            found.setdefault(answers[family], at)
        return (found[None], None) if None in found else (found[False], False)

    def _await_answer(self) -> bool:
        """Ask the gate again when it knows more, or by the clock; False once that has taken as long as a connect may."""
        now = time.monotonic_ns()
        self._until_ns = self._until_ns or now + self._context.settings.connect_timeout_ns
        if now >= self._until_ns:
            return False
        self._context.waiting.add(self)
        self._context.timers.arm(self, min(self._until_ns, now + _ASK_AGAIN_NS))
        return True

    def _refused(self, packed: bytes) -> None:
        """No SYN may leave for this address. That is the reason for the end if there was none to try before it."""
        if self._upstream in (None, packed) and not self._context.gate.is_absent(family_of(packed)):
            self._failure = Ending.POLICY

    def _dial(self, packed: bytes) -> bool:
        """Send a SYN to one address; True if it is on its way."""
        now = time.monotonic_ns()
        if packed != self._upstream:
            self._upstream, self._started_ns = packed, now
            self._until_ns = now + self._context.settings.connect_timeout_ns
        self._context.waiting.discard(self)
        self._context.count(Counter.CONNECTS)
        try:
            sock = self._syn(packed)
        except OSError as error:
            self._context.count(Counter.CONNECTS_ENDED)
            self._attempt_failed(error.errno or 0)
            return False
        self._await(sock, now)
        return True

    def _syn(self, packed: bytes) -> socket.SocketType:
        """A socket whose SYN is out. Without timestamps TIME_WAIT ports can't be reused, so each source gets its try."""
        address = unpack(packed)
        code = 0
        for source in self._context.sources(address.family):
            try:
                sock = sockets.dial(address.family, self._context.settings.tuning, source, self._context.gate.for_rules)
            except sockets.SourceGone:
                self._complain_of_source(source)
                continue
            code = sock.connect_ex(address.sockaddr)
            if code == 0 or code in uapi.RETRY:
                return sock
            sock.close()
            if code != errno.EADDRNOTAVAIL:
                break
        if code == errno.EADDRNOTAVAIL and address.family == socket.AF_INET6 and not namespaces.has_ipv6():
            code = errno.ENETUNREACH  # no lack of ports: IPv6 is switched off
        raise OSError(code or errno.ENODEV, "connect")

    def _complain_of_source(self, source: Optional[Address]) -> None:
        """One of the local addresses has left: the others serve; without any the connection fails, for no lack of ports."""
        gone = f"--source={source.ip}" if source else "the source"
        text = f"{gone} is no address of this host any more: connections come from the others, if there are any"
        self._context.log_ratelimited("error", gone, text)

    def _await(self, sock: socket.SocketType, now: int) -> None:
        """Wait for the answer; a target on this host has given it already."""
        direction = Direction(self, self._context, sock, FROM_UPSTREAM)
        self._directions.append(direction)
        info = sockets.connected(sock)
        if info is not None:
            self._connected(info)
            return
        self._context.watch(direction.fd, WRITE, direction)
        once = self._context.gate.proves_each_syn
        self._context.timers.arm(self, min(self._until_ns, now + _SYN_ONCE_NS) if once else self._until_ns)

    def _on_connect_deadline(self, now_ns: int) -> None:
        """The gate may know more now; or a SYN has had no answer, and is given up or sent anew.

        Anew from another socket: the kernel would send it again by itself, without asking the gate.
        """
        if self not in self._context.waiting:
            code = self._unreported()
            if code or now_ns >= self._until_ns:
                self._attempt_failed(code or errno.ETIMEDOUT)
            else:
                self._take_back()
        self._connect()

    def _unreported(self) -> int:
        """The errno of an ICMP error that came while connect(2) itself ran, as from this host's own filter: told when asked."""
        return next((direction.source.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) for direction in self._directions[1:]), 0)

    def _take_back(self) -> None:
        """Give up the socket, not the address."""
        if len(self._directions) > 1:
            self._drop_upstream()
            self._candidates = (self._upstream or b"") + self._candidates

    def _drop_upstream(self) -> None:
        """Close the socket that did not come to relay. With a reset, if its peer has answered halfway (SYN_RECV)."""
        for direction in self._directions[1:]:
            sockets.reset_on_close(direction.source)
            self._context.close_later(direction.source)
            direction.detach()
            self._context.count(Counter.CONNECTS_ENDED)
        del self._directions[1:]

    def _attempt_failed(self, code: int) -> None:
        """One address did not answer well: remember it as the reason if no other does better, and say so."""
        self._drop_upstream()
        self._until_ns = 0
        self._failure = _connect_ending(code)
        self._context.count(Counter.CONNECT_FAIL)
        self._context.count(Counter.CONNECT_TIMEOUT, int(self._failure is Ending.CONNECT_TIMEOUT))
        if self._failure is Ending.NO_DESCRIPTORS:
            self._candidates = b""  # the next address would need a descriptor too
        about = f"connect to {unpack(self._upstream or b'')}: {errno.errorcode.get(code, code)}"
        if self._failure in _ADVICE:
            self._context.log_ratelimited("error", self._failure.name, f"{about}: {_ADVICE[self._failure]}")
        elif self._context.settings.log_debug:
            self._context.records.put(Notice(self._context.index, time.time_ns(), "debug", about))

    @property
    def is_connecting(self) -> bool:
        """Whether bytes may not pass yet."""
        return self._phase is CONNECTING

    def _on_connect_event(self, direction: Direction, mask: int) -> None:
        """The client hung up, or the upstream socket has its answer."""
        if direction is self._directions[0]:
            if mask & BROKEN:
                self.end(Ending.CLIENT_LEFT)
            return
        info = sockets.connected(direction.source)
        if info is None:
            self._attempt_failed(direction.source.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) or errno.ECONNRESET)
            self._connect()
        else:
            self._connected(info)

    @property
    def has_drifted(self) -> bool:
        """Whether this connection may not go on by what is known of the policy now."""
        upstream = self._upstream
        return upstream is not None and self._context.gate.ends(family_of(upstream), established=not self.is_connecting)

    def on_drift(self) -> None:
        """End; but one that connects may have addresses of another family left, for which the policy holds."""
        if self._phase is not CONNECTING:
            self.end(Ending.POLICY_DRIFT)
            return
        self._take_back()
        self._connect()

    # Relaying

    def _connected(self, info: TcpInfo) -> None:
        """Note what was negotiated, ask the gate, and let bytes flow; or reset both sides with nothing relayed."""
        up, down = self._directions
        now = time.monotonic_ns()
        self._connect_us = (now - self._started_ns) // 1000
        note(self._context.counters, CONNECT, now - self._started_ns)
        self._phase = phase_after(self._phase, CONNECTED)
        up.reverse, up.sink, up.last_active_ns = down, down.source, now
        down.reverse, down.sink, down.last_active_ns = up, up.source, now
        up.lane = down.lane = NOW
        up.acknowledged_before = info.acknowledged
        self._upstream_timestamps = info.timestamps
        self._context.count(Counter.UPSTREAM_TIMESTAMPS, int(info.timestamps))
        if not self._context.gate.may_relay(down.source, info):
            self.end(Ending.POLICY)
            return
        for direction in (up, down):
            sockets.acknowledge_at_once(direction.source)
        self._context.begin_sweeps(now)
        up.readable()  # what the client has said meanwhile need not wait, not even until the descriptors are watched
        self.on_flow()

    def on_event(self, direction: Direction, mask: int) -> None:
        """Every event but plain EPOLLIN: connecting, room for the reverse direction's bytes, a hang-up."""
        if self._phase is CONNECTING:
            self._on_connect_event(direction, mask)
            return
        if mask & ~(READABLE | MORE) and direction.reverse.pending is not None:
            direction.reverse.drain()
        if mask & ~WRITABLE and direction.is_reading and self._phase is RELAYING:
            direction.reader.readable()
            if mask & MORE and self._phase is RELAYING and direction.is_reading:
                self._context.poller.again(direction.fd)
        if mask & BROKEN and self._phase is RELAYING and not direction.is_reading:
            self._on_hang_up(direction)

    def _on_hang_up(self, direction: Direction) -> None:
        """A reset of a side that is not being read now is passed on all the same, at once. Or it is its last ACK."""
        code = direction.source.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if self._is_complete:
            self._end_if_acknowledged()
        if code and self._phase is RELAYING:
            self.on_broken_source(direction, OSError(code, "hang-up"))

    def on_flow(self) -> None:
        """Derive anew what each descriptor and the clock are waited for; both directions shut and acknowledged: the end."""
        if self._is_complete:
            self._end_if_acknowledged()
        if self._phase is not RELAYING:
            return
        up, down = self._directions
        self._context.watch(up.fd, up.interest, up.reader)
        self._context.watch(down.fd, down.interest, down.reader)
        self._set_timer()

    def _set_timer(self) -> None:
        limit, timers = self._silence_ns, self._context.timers
        if limit:
            timers.arm(self, self._last_active_ns + limit, limit // _GRAINS_NS or 1)
        else:
            timers.disarm(self)

    def _end_if_acknowledged(self) -> None:
        """Both FINs are here, so close(2) would send the second one. If bytes still wait for their ACK, it is sent now.

        Then the hang-up that follows the last ACK comes here again, and the record can say of each byte whether it arrived.
        """
        peers = self._look_at_peers()
        if self._awaits_acknowledgement(peers):
            for direction in self._directions:
                with contextlib.suppress(OSError):  # reset just now: the hang-up tells
                    direction.sink.shutdown(socket.SHUT_WR)
            peers = self._look_at_peers()
        if not self._awaits_acknowledgement(peers):
            self.end(Ending.CLOSED, peers)

    def _awaits_acknowledgement(self, peers: Peers) -> bool:
        return any(
            direction.unacknowledged and (peer.outstanding or peer.closed) for direction, peer in zip(self._directions, peers)
        )

    @property
    def _is_complete(self) -> bool:
        """Whether both sides' FINs were passed on, each behind all bytes before it."""
        return self._phase is RELAYING and all(direction.flow is SHUT for direction in self._directions)

    @property
    def _is_half_closed(self) -> bool:
        up, down = self._directions
        return up.flow is not OPEN or down.flow is not OPEN

    @property
    def _last_active_ns(self) -> int:
        up, down = self._directions
        return max(up.last_active_ns, down.last_active_ns)

    @property
    def _silence_ns(self) -> int:
        """How long this connection may be silent; 0 if for ever."""
        idle = self._context.settings.idle_timeout_ns
        half_closed = self._context.settings.half_close_timeout_ns
        if not half_closed or not self._is_half_closed:
            return idle
        return min(idle, half_closed) if idle else half_closed

    def on_deadline(self, now_ns: int) -> None:
        """The timer that was armed has come: go on with connecting, or see whether the silence is real."""
        if self._phase is CONNECTING:
            self._on_connect_deadline(now_ns)
            return
        limit = self._silence_ns
        if limit and self._last_active_ns + limit <= now_ns:
            self._see_what_kernel_moves(now_ns)
        if limit and self._last_active_ns + limit <= now_ns:
            self._end_silent()
        else:
            self._set_timer()

    def _see_what_kernel_moves(self, now_ns: int) -> None:
        """Bytes that were given to the kernel long ago may still be moving: to a peer that reads slowly."""
        for direction in self._directions:
            seen = sockets.outstanding(direction.sink)
            if seen.any and not seen.retransmits:
                direction.last_active_ns = max(direction.last_active_ns, now_ns - seen.sent_ms * 1_000_000)

    def count_acknowledged(self) -> None:
        """Count what the peers have acknowledged, for the metrics. It costs a comparison where there is nothing new."""
        if self._phase is RELAYING and any(direction.unacknowledged for direction in self._directions):
            self._look_at_peers()

    def _look_at_peers(self) -> Peers:
        """TCP_INFO of each direction's sink, counted; nothing while there are no two sides."""
        if self._connect_us is None:
            return ()
        peers = tuple([sockets.tcp_info(direction.sink) for direction in self._directions])
        for direction, peer in zip(self._directions, peers):
            direction.count_acknowledged(peer.acknowledged)
        return peers

    def look(self, now_ns: int) -> None:
        """Whether both peers still live. One that has acknowledged all is not looked at before something moves again."""
        if self._phase is not RELAYING or self._settled_at == self._last_active_ns:
            return
        last_active_ns = self._last_active_ns
        for direction in self._directions:
            if self._context.liveness.is_gone(direction, now_ns):
                self.on_broken_sink(direction, OSError(errno.ETIMEDOUT, "no ACK within the user timeout"))
                return
        if not any(direction.stall for direction in self._directions):
            self._settled_at = last_active_ns

    def _end_silent(self) -> None:
        settings = self._context.settings
        server = self._waits_for_server()
        if self._is_complete:
            self.end(Ending.CLOSED)
        elif self._is_half_closed and not 0 < settings.idle_timeout_ns <= settings.half_close_timeout_ns:
            self.end(Ending.SERVER_HALF_CLOSED if server else Ending.CLIENT_HALF_CLOSED)
        else:
            self._context.count(Counter.IDLE_TIMEOUT)
            self.end(Ending.SERVER_IDLE if server else Ending.CLIENT_IDLE)

    def _waits_for_server(self) -> bool:
        """Whose turn it is: the side that does not take its bytes, or has not closed yet; else, as in HAProxy, the client's."""
        up, down = self._directions
        if up.pending is not None or down.pending is not None:
            return up.pending is not None
        return self._is_half_closed and down.flow is OPEN

    # Ending

    def on_broken_source(self, direction: Direction, error: OSError) -> None:
        """A side was reset, or its path is dead: reset the other."""
        self.end(self._broken(direction is self._directions[0], error))

    def on_broken_sink(self, direction: Direction, error: OSError) -> None:
        """As above; but what that side had said before it broke is still in its receive queue, and is delivered first."""
        ending = self._broken(direction is self._directions[1], error)
        direction.reverse.flush_before_reset()
        self.end(ending)

    def _broken(self, client: bool, error: OSError) -> Ending:
        """The ending for an errno of an established connection; an errno that no peer can cause is a bug, and raises."""
        if error.errno in uapi.PEER_RESET:
            self._context.count(Counter.RESET_BY_PEER)
            return Ending.CLIENT_RESET if client else Ending.SERVER_RESET
        if error.errno in uapi.PEER_GONE:
            return Ending.CLIENT_TIMEOUT if client else Ending.SERVER_TIMEOUT
        raise error

    def end(self, ending: Ending, peers: Peers = ()) -> None:
        """Close both sides, give everything back, write the record. What is held is lost, and counted. Idempotent.

        `peers` is what a look at them has found just now. A reset takes back what is not acknowledged: that is lost, too.
        """
        if self._phase is CLOSED:
            return
        if self._phase is CONNECTING:
            ending = WHILE_CONNECTING.get(ending, ending)
        context, cut = self._context, ending in _CUTTING or not self._is_complete
        if not cut and ending is Ending.DRAIN:
            ending = Ending.CLOSED
        self._phase = phase_after(self._phase, ENDED)
        peers = peers or self._look_at_peers()
        going_on = [
            direction for direction, peer in zip(self._directions, peers) if peer.outstanding and not peer.closed and not cut
        ]
        left = sum([direction.unacknowledged for direction in going_on])
        for direction in self._directions:
            if cut:
                sockets.reset_on_close(direction.source)
            context.close_later(direction.source)
            direction.detach()
        context.timers.disarm(self)
        context.waiting.discard(self)
        if ending in _BY_POLICY:
            context.count(_BY_POLICY[ending])
        context.count(Counter.CONNECTS_ENDED, len(self._directions) - 1)
        context.count_client(self._message.client_slot, ended=True)
        context.count(Counter.ENDED)
        del context.sessions[self._message.connection_id]
        if context.settings.log_connections:
            context.record(self._record(ending, peers, left))  # who reads the line finds the counters up to date

    def _record(self, ending: Ending, peers: Peers, left: int) -> ConnectionRecord:
        up, message = self._directions[0], self._message
        down = self._directions[1] if peers else None
        info = peers[0] if peers else None
        return ConnectionRecord(
            worker=self._context.index,
            connection_id=message.connection_id,
            closed_at_ns=time.time_ns(),
            client=message.client,
            upstream=self._upstream,
            upstream_local=pack(down.source.family, down.source.getsockname()) if down else None,
            duration_us=(time.monotonic_ns() - message.accepted_ns) // 1000,
            connect_us=self._connect_us,
            rx_bytes=up.received,
            tx_bytes=down.acknowledged if down else 0,
            upstream_tx_bytes=up.acknowledged,
            discarded_bytes=sum([direction.received - direction.acknowledged for direction in self._directions]) - left,
            unacknowledged_bytes=left,
            client_timestamps=self._client_timestamps,
            upstream_timestamps=self._upstream_timestamps,
            client_syn_tsval=self._context.tsval_of(sockets.saved_syn(up.source)),  # the kernel kept it until now
            upstream_rtt_us=(info.rtt_us or None) if info else None,  # 0: nothing was measured
            upstream_retransmits=info.retransmits if info else None,
            ending=ending,
            witness=self._context.gate.witness,
        )


_CUTTING = frozenset({Ending.POLICY, Ending.BUG})  # what is under way must not be sent, or can't be told to be whole
_SYN_ONCE_NS = 900_000_000  # Linux sends a SYN again after 1 s (TCP_TIMEOUT_INIT, include/net/tcp.h; RFC 6298, section 2)
_ASK_AGAIN_NS = 250_000_000  # a worker is told when there is an answer; this is for when it could not be
_GRAINS_NS = 256 * TICK_NS  # a silence may last 1/256 longer than its limit, or one tick

_BY_POLICY = {Ending.POLICY: Counter.POLICY_REFUSED, Ending.POLICY_DRIFT: Counter.POLICY_ENDED}
_ADVICE = {
    Ending.NO_DESCRIPTORS: "out of file descriptors or memory: raise LimitNOFILE (ulimit -n) or lower --max-connections",
    Ending.NO_PORTS: "no local port is left: widen net.ipv4.ip_local_port_range or add --source addresses",
}


def _without(candidates: bytes, at: int) -> bytes:
    """The packed addresses but for the one that stands there."""
    return candidates[:at] + candidates[at + PACKED_SIZE :]


def _connect_ending(code: int) -> Ending:
    """How a connection ends for which this is the last word on connecting."""
    if code in uapi.CAPACITY:
        return Ending.NO_DESCRIPTORS
    if code == errno.EADDRNOTAVAIL:
        return Ending.NO_PORTS
    if code in (errno.ECONNREFUSED, errno.ECONNRESET):
        return Ending.CONNECT_REFUSED
    return Ending.CONNECT_TIMEOUT if code == errno.ETIMEDOUT else Ending.CONNECT_FAILED
