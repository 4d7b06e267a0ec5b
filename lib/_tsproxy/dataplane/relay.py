"""A connection from its handover to its record: connect upstream, ask the gate, relay both ways, end.

Knows the two sockets and the order of things. Knows nothing of accepting, of how names become addresses, or of what
the gate checks. The file reads in the order of a connection's life.
"""

from __future__ import annotations

import errno
import socket
import time
from typing import Optional

from _tsproxy.dataplane.half import FROM_DOWNSTREAM, FROM_UPSTREAM, Half
from _tsproxy.dataplane.inbox import Entry
from _tsproxy.dataplane.poller import BROKEN, MORE, READABLE, WRITABLE, WRITE
from _tsproxy.dataplane.posted import NOW
from _tsproxy.dataplane.states import CLOSED, CONNECTED, CONNECTING, ENDED, OPEN, RELAYING, SHUT, phase_after
from _tsproxy.dataplane.timers import TICK_NS
from _tsproxy.dataplane.workbench import Workbench
from _tsproxy.host import linux, sockets
from _tsproxy.host.addresses import PACKED_SIZE, unpack
from _tsproxy.telemetry.counters import CONNECT, Counter
from _tsproxy.telemetry.endings import Ending
from _tsproxy.telemetry.histogram import slot
from _tsproxy.telemetry.records import Connection, Notice


class Relay:
    """One client connection and the upstream connection made for it.

    Upstream addresses are tried in order, each with the connect timeout. Nothing is read from the client before the
    upstream connection is established and the gate has let it pass. Either side's FIN is passed on as FIN, either
    side's reset as a reset; any other end than two FINs resets both sides, so that a cut stream never looks complete.
    """

    __slots__ = (
        "_bench",
        "_candidates",
        "_client_timestamps",
        "_connect_us",
        "_entry",
        "_failure",
        "_halves",
        "_phase",
        "_started_ns",
        "_upstream",
        "_upstream_timestamps",
    )

    def __init__(self, bench: Workbench, entry: Entry) -> None:
        """Adopt the client's descriptor. Nothing happens before start()."""
        self._bench, self._entry = bench, entry
        self._phase = CONNECTING
        self._failure = Ending.CONNECT_FAILED
        self._candidates = entry.upstreams
        self._upstream: Optional[bytes] = None
        self._started_ns = entry.accepted_ns
        self._connect_us: Optional[int] = None
        self._upstream_timestamps: Optional[bool] = None
        # to_upstream, and to_downstream once there is an upstream socket
        self._halves = [Half(self, bench, sockets.adopt(entry.fd, socket.AF_INET), FROM_DOWNSTREAM)]
        self._client_timestamps = sockets.has_timestamps(self._halves[0].source)
        bench.relays[entry.connection_id] = self

    # Connecting

    def start(self) -> None:
        """Begin to connect. Of the client only a hang-up is noticed: what it says waits until it can go on."""
        self._bench.count(Counter.DOWNSTREAM_TIMESTAMPS, int(self._client_timestamps))
        self._connect()
        if self._phase is CONNECTING:
            self._bench.watch(self._entry.fd, 0, self._halves[0])

    def _connect(self) -> None:
        """Try the addresses that are left, in order, until one is on its way; none left: end as the last one failed."""
        while self._candidates and self._phase is CONNECTING:
            packed, self._candidates = self._candidates[:PACKED_SIZE], self._candidates[PACKED_SIZE:]
            if self._dial(packed):
                return
        self.end(self._failure)

    def _dial(self, packed: bytes) -> bool:
        """Send a SYN to one address, if the gate allows; True if it is on its way."""
        if not self._may_connect():
            return False
        self._bench.count(Counter.CONNECTS)
        self._upstream, self._started_ns = packed, time.monotonic_ns()
        try:
            sock = self._syn(packed)
        except OSError as error:
            self._attempt_failed(error.errno or 0)
            return False
        self._await(sock)
        return True

    def _may_connect(self) -> bool:
        try:
            allowed = self._bench.gate.may_connect()
        except OSError as error:  # no descriptor to look with, so none to connect with either
            self._failure = _connect_ending(error.errno or 0)
            return False
        if not allowed:
            self.end(Ending.POLICY)
        return allowed

    def _syn(self, packed: bytes) -> socket.SocketType:
        """A socket whose SYN is out. Without timestamps TIME_WAIT ports can't be reused, so each source gets its try."""
        address = unpack(packed)
        code = 0
        for source in self._bench.sources(address.family):
            sock = sockets.dial(address.family, self._bench.rules.tuning, source)
            code = sock.connect_ex(address.sockaddr)
            if code == 0 or code in linux.RETRY:
                return sock
            sock.close()
            if code != errno.EADDRNOTAVAIL:
                break
        raise OSError(code, "connect")

    def _await(self, sock: socket.SocketType) -> None:
        """Wait for the answer; a target on this host has given it already."""
        half = Half(self, self._bench, sock, FROM_UPSTREAM)
        self._halves.append(half)
        timestamps = sockets.connected_with_timestamps(sock)
        if timestamps is None:
            self._bench.watch(half.fd, WRITE, half)
            self._bench.timers.arm(self, self._started_ns + self._bench.rules.connect_timeout_ns)
        else:
            self._connected(timestamps)

    def _attempt_failed(self, code: int) -> None:
        """One address did not answer well: remember it as the reason if no other does better, and say so."""
        for half in self._halves[1:]:
            self._bench.bury(half.source)
            half.detach()
        del self._halves[1:]
        self._failure = _connect_ending(code)
        self._bench.count(Counter.CONNECTS_ENDED)
        self._bench.count(Counter.CONNECT_FAIL)
        self._bench.count(Counter.CONNECT_TIMEOUT, int(self._failure is Ending.CONNECT_TIMEOUT))
        if self._failure is Ending.NO_DESCRIPTORS:
            self._candidates = b""  # the next address would need a descriptor too
        about = f"connect to {unpack(self._upstream or b'')}: {errno.errorcode.get(code, code)}"
        if self._failure in _ADVICE:
            self._bench.complain("error", self._failure.name, f"{about}: {_ADVICE[self._failure]}")
        elif self._bench.rules.log_debug:
            self._bench.records.put(Notice(self._bench.index, time.time_ns(), "debug", about))

    @property
    def is_connecting(self) -> bool:
        """Whether bytes may not pass yet."""
        return self._phase is CONNECTING

    def _on_connect_event(self, half: Half, mask: int) -> None:
        """The client hung up, or the upstream socket has its answer."""
        if half is self._halves[0]:
            if mask & BROKEN:
                self.end(Ending.CLIENT_LEFT)
            return
        timestamps = sockets.connected_with_timestamps(half.source)
        if timestamps is None:
            self._attempt_failed(half.source.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) or errno.ECONNRESET)
            self._connect()
        else:
            self._connected(timestamps)

    # Relaying

    def _connected(self, timestamps: bool) -> None:
        """Note what was negotiated, ask the gate, and let bytes flow; or reset both sides with nothing relayed."""
        up, down = self._halves
        now = time.monotonic_ns()
        self._connect_us = (now - self._started_ns) // 1000
        self._bench.counters[CONNECT + slot(now - self._started_ns)] += 1
        self._phase = phase_after(self._phase, CONNECTED)
        up.twin, up.sink, up.moved_at = down, down.source, now
        down.twin, down.sink, down.moved_at = up, up.source, now
        up.lane = down.lane = NOW
        self._upstream_timestamps = timestamps
        self._bench.count(Counter.UPSTREAM_TIMESTAMPS, int(timestamps))
        if not self._bench.gate.may_relay(down.source, timestamps):
            self.end(Ending.POLICY)
            return
        for half in (up, down):
            sockets.acknowledge_at_once(half.source)
        up.readable()  # what the client has said meanwhile need not wait, not even until the descriptors are watched
        self.on_flow()

    def on_event(self, half: Half, mask: int) -> None:
        """Whatever is not plain readability: connecting, room for the twin's bytes, a hang-up while nothing is waited for."""
        if self._phase is CONNECTING:
            self._on_connect_event(half, mask)
            return
        if mask & ~(READABLE | MORE) and half.twin.held is not None:
            half.twin.drain()
        if mask & ~WRITABLE and half.is_reading and self._phase is RELAYING:
            half.reader.readable()
            if mask & MORE and self._phase is RELAYING and half.is_reading:
                self._bench.poller.again(half.fd)
        if mask & BROKEN and self._phase is RELAYING and not half.is_reading:
            self._on_hang_up(half)

    def _on_hang_up(self, half: Half) -> None:
        """A reset of a side that is not being read now is passed on all the same, at once."""
        code = half.source.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self.on_broken_source(half, OSError(code, "hang-up"))

    def on_flow(self) -> None:
        """Derive anew what each descriptor and the clock are waited for; both halves shut: the end."""
        if self._phase is not RELAYING:
            return
        up, down = self._halves
        if up.flow is SHUT and down.flow is SHUT:
            self.end(Ending.CLOSED)
            return
        self._bench.watch(up.fd, up.interest, up.reader)
        self._bench.watch(down.fd, down.interest, down.reader)
        self._set_timer()

    def _set_timer(self) -> None:
        limit, timers = self._silence_ns, self._bench.timers
        if limit:
            timers.arm(self, self._moved_at + limit, limit // _GRAINS_NS or 1)
        else:
            timers.disarm(self)

    @property
    def _is_half_closed(self) -> bool:
        up, down = self._halves
        return up.flow is not OPEN or down.flow is not OPEN

    @property
    def _moved_at(self) -> int:
        up, down = self._halves
        return max(up.moved_at, down.moved_at)

    @property
    def _silence_ns(self) -> int:
        """How long this connection may be silent; 0 if for ever."""
        idle = self._bench.rules.idle_timeout_ns
        half_closed = self._bench.rules.half_close_timeout_ns
        if not half_closed or not self._is_half_closed:
            return idle
        return min(idle, half_closed) if idle else half_closed

    def on_deadline(self, now_ns: int) -> None:
        """The timer that was armed has come: give the address up, or see whether the silence is real."""
        if self._phase is CONNECTING:
            self._attempt_failed(errno.ETIMEDOUT)
            self._connect()
            return
        limit = self._silence_ns
        if limit and self._moved_at + limit <= now_ns:
            self._end_silent()
        else:
            self._set_timer()

    def _end_silent(self) -> None:
        rules = self._bench.rules
        server = self._waits_for_server()
        if self._is_half_closed and not 0 < rules.idle_timeout_ns <= rules.half_close_timeout_ns:
            self.end(Ending.SERVER_HALF_CLOSED if server else Ending.CLIENT_HALF_CLOSED)
        else:
            self._bench.count(Counter.IDLE_TIMEOUT)
            self.end(Ending.SERVER_IDLE if server else Ending.CLIENT_IDLE)

    def _waits_for_server(self) -> bool:
        """Whose turn it is: the side that does not take its bytes, has not closed yet, or has not answered."""
        up, down = self._halves
        if up.held is not None or down.held is not None:
            return up.held is not None
        if self._is_half_closed:
            return down.flow is OPEN
        return up.moved_at > down.moved_at

    # Ending

    def on_broken_source(self, half: Half, error: OSError) -> None:
        """A side was reset, or its path is dead: reset the other."""
        self.end(self._broken(half is self._halves[0], error))

    def on_broken_sink(self, half: Half, error: OSError) -> None:
        """As above; but what that side had said before it broke is still in its receive queue, and is delivered first."""
        ending = self._broken(half is self._halves[1], error)
        half.twin.deliver_last_words()
        self.end(ending)

    def _broken(self, client: bool, error: OSError) -> Ending:
        """The ending for an errno of an established connection; an errno that no peer can cause is a bug, and raises."""
        if error.errno in linux.PEER_RESET:
            self._bench.count(Counter.RESET_BY_PEER)
            return Ending.CLIENT_RESET if client else Ending.SERVER_RESET
        if error.errno in linux.PEER_GONE:
            return Ending.CLIENT_TIMEOUT if client else Ending.SERVER_TIMEOUT
        raise error

    def end(self, ending: Ending) -> None:
        """Close both sides, give everything back, write the record. What is held is lost, and counted. Idempotent."""
        if self._phase is CLOSED:
            return
        self._phase = phase_after(self._phase, ENDED)
        bench = self._bench
        for half in self._halves:
            if ending is not Ending.CLOSED:
                sockets.reset_on_close(half.source)
            bench.bury(half.source)
            half.detach()
        bench.timers.disarm(self)
        if ending is Ending.POLICY:
            bench.count(Counter.POLICY_REFUSED)
        bench.count(Counter.CONNECTS_ENDED, len(self._halves) - 1)
        bench.count_client(self._entry.pair, ended=True)
        bench.count(Counter.ENDED)
        del bench.relays[self._entry.connection_id]
        if bench.rules.log_connections:
            bench.records.put(self._record(ending))  # last: who reads the line finds the counters up to date

    def _record(self, ending: Ending) -> Connection:
        up, entry = self._halves[0], self._entry
        down = self._halves[1] if self._connect_us is not None else None
        info = sockets.tcp_info(down.source) if down else None
        return Connection(
            worker=self._bench.index,
            connection_id=entry.connection_id,
            closed_at_ns=time.time_ns(),
            client=entry.client,
            upstream=self._upstream,
            duration_us=(time.monotonic_ns() - entry.accepted_ns) // 1000,
            connect_us=self._connect_us,
            rx_bytes=up.received,
            tx_bytes=down.received - down.withheld if down else 0,
            discarded_bytes=up.withheld + (down.withheld if down else 0),
            client_timestamps=self._client_timestamps,
            upstream_timestamps=self._upstream_timestamps,
            client_syn_tsval=self._bench.tsval_of(sockets.saved_syn(up.source)),  # the kernel kept it until now
            upstream_rtt_us=info.rtt_us if info else None,
            upstream_retransmits=info.retransmits if info else None,
            ending=ending,
            witness=self._bench.gate.witness,
        )


_GRAINS_NS = 256 * TICK_NS  # a silence may last 1/256 longer than its limit, or one tick

_ADVICE = {
    Ending.NO_DESCRIPTORS: "out of file descriptors or memory: raise LimitNOFILE (ulimit -n) or lower --max-connections",
    Ending.NO_PORTS: "no local port is left: widen net.ipv4.ip_local_port_range or add --source addresses",
}


def _connect_ending(code: int) -> Ending:
    """How a connection ends for which this is the last word on connecting."""
    if code in linux.CAPACITY:
        return Ending.NO_DESCRIPTORS
    if code == errno.EADDRNOTAVAIL:
        return Ending.NO_PORTS
    if code in (errno.ECONNREFUSED, errno.ECONNRESET):
        return Ending.CONNECT_REFUSED
    return Ending.CONNECT_TIMEOUT if code == errno.ETIMEDOUT else Ending.CONNECT_FAILED
