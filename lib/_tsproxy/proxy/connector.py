"""The connecting phase of a session: tries the upstream addresses in order until one is established, or reports why none is.

Before each SYN it calls the policy gate's may_connect(); on None the connector waits and no SYN leaves. Linux retransmits a
SYN without asking the gate. So where the gate proves each SYN, the connector closes the socket before the first retransmit,
asks the gate again, and sends the next SYN from another socket.

Knows addresses, the clock and one upstream socket at a time. Knows nothing of the client, or of what the gate checks.
"""

from __future__ import annotations

import errno
import socket
import time
from typing import Dict, Optional, Protocol, Tuple

from _tsproxy.linux import namespaces, sockets, uapi
from _tsproxy.linux.addresses import PACKED_SIZE, Address, family_of, unpack
from _tsproxy.linux.sockets import TcpInfo
from _tsproxy.loop.poller import WRITE
from _tsproxy.loop.posted import NEW
from _tsproxy.proxy.context import RouteContext
from _tsproxy.stats.counters import CONNECT, Counter, observe
from _tsproxy.stats.endings import Ending
from _tsproxy.stats.records import Notice

# Linux sends a SYN again after 1 s (TCP_TIMEOUT_INIT, include/net/tcp.h; RFC 6298, section 2). A worker may stand still.
_SYN_ONCE_NS = 750_000_000
_ASK_AGAIN_NS = 250_000_000  # in case no EVIDENCE command came, since the inbox was full
_ADVICE = {
    Ending.NO_DESCRIPTORS: "out of file descriptors or memory: raise LimitNOFILE (ulimit -n) or lower --max-connections",
    Ending.NO_PORTS: "no local port is left: widen net.ipv4.ip_local_port_range or add --source addresses",
}


class ConnectorEvents(Protocol):
    """What a connector reports to its session; after either of the first two the session closes it."""

    def on_connected(self, upstream: socket.SocketType, info: TcpInfo) -> None:
        """The connection is established. The session owns the socket from now on."""
        ...

    def on_connect_failed(self, ending: Ending) -> None:
        """No address is left to try."""
        ...

    def on_bug(self, bug: Exception) -> None:
        """A handler or timer of the connector raised."""
        ...


class Connector:
    """See the module. A handler of the upstream socket while it connects, and its timer."""

    lane = NEW
    __slots__ = (
        "_candidates",
        "_context",
        "_failure",
        "_session",
        "_socket",
        "_started_ns",
        "_until_ns",
        "connect_us",
        "upstream",
    )

    def __init__(self, session: ConnectorEvents, context: RouteContext, upstreams: bytes, accepted_ns: int) -> None:
        """`upstreams` are packed addresses, one after the other. Nothing happens before connect()."""
        self._session, self._context, self._candidates = session, context, upstreams
        self._failure = Ending.CONNECT_FAILED
        self._socket: Optional[socket.SocketType] = None  # in SYN_SENT
        self._started_ns = accepted_ns
        self._until_ns = 0  # deadline of the connect, or of waiting for the gate; 0: none
        self.upstream: Optional[bytes] = None  # the address that was tried last, packed
        self.connect_us: Optional[int] = None

    def connect(self) -> None:
        """Try the remaining addresses until a SYN is sent, or the gate has to be waited for. None left: on_connect_failed()."""
        while self._candidates:
            at, allowed = self._choose()
            if allowed is None and self._wait_for_gate():
                return
            packed = self._candidates[at : at + PACKED_SIZE]
            self._candidates = self._candidates[:at] + self._candidates[at + PACKED_SIZE :]
            if allowed and self._send_syn(packed):
                return
            if not allowed:
                self._refused(packed)
        self._session.on_connect_failed(self._failure)

    def _choose(self) -> Tuple[int, Optional[bool]]:
        """Offset of the address to try, and the gate's answer for it: True, False, or None for not known yet.

        The first that is allowed, so that one family does not wait for another; else the first not known; else the first.
        """
        if len(self._candidates) == PACKED_SIZE:
            return 0, self._context.gate.may_connect(family_of(self._candidates))
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

    def _wait_for_gate(self) -> bool:
        """Ask the gate again after an EVIDENCE command, or by a timer; False when the connect timeout has passed."""
        now = time.monotonic_ns()
        self._until_ns = self._until_ns or now + self._context.settings.connect_timeout_ns
        if now >= self._until_ns:
            return False
        self._context.registry.waiting.add(self)
        self._context.loop.timers.arm(self, min(self._until_ns, now + _ASK_AGAIN_NS))
        return True

    def _refused(self, packed: bytes) -> None:
        """The gate allows no SYN to this address. That is the session's ending if no other address was tried before it."""
        if self.upstream in (None, packed) and not self._context.gate.is_absent(family_of(packed)):
            self._failure = Ending.POLICY

    def _send_syn(self, packed: bytes) -> bool:
        """connect(2) to one address; False if it failed at once."""
        now = time.monotonic_ns()
        if packed != self.upstream:
            self.upstream, self._started_ns = packed, now
            self._until_ns = now + self._context.settings.connect_timeout_ns
        self._context.registry.waiting.discard(self)
        self._context.count(Counter.CONNECTS)
        try:
            sock = self._connect_from_any_source(self._context.address_of(packed))
        except OSError as error:
            self._context.count(Counter.CONNECTS_ENDED)
            self._attempt_failed(error.errno or 0)
            return False
        info = sockets.connected(sock)  # over loopback the connection is established already
        if info is not None:
            self._connected(sock, info)
        else:
            self._await_answer(sock, now)
        return True

    def _connect_from_any_source(self, address: Address) -> socket.SocketType:
        """A socket in SYN_SENT. Without timestamps ports in TIME_WAIT can't be reused, so each source address is tried."""
        code, egress, gate = 0, self._context.settings.egress, self._context.gate
        for source in self._context.sources(address.family):
            try:
                sock = sockets.dial(address.family, source, gate.for_rules, egress, gate.tagged)
            except sockets.SourceUnavailable:
                self._log_source_gone(source)
                continue
            except sockets.InterfaceUnavailable:
                self._log_interface_gone()
                code = errno.ENODEV
                break
            code = sock.connect_ex(address.sockaddr)
            if code == 0 or code in uapi.RETRY:
                return sock
            sock.close()
            if code != errno.EADDRNOTAVAIL:
                break
        if code == errno.EADDRNOTAVAIL and address.family == socket.AF_INET6 and not namespaces.has_ipv6():
            code = errno.ENETUNREACH  # IPv6 is disabled, ports are not short
        raise OSError(code or errno.ENODEV, "connect")

    def _log_source_gone(self, source: Optional[Address]) -> None:
        """bind(2) failed: a source address was removed. The others are used; without any the ending is CONNECT_FAILED."""
        gone = f"--source={source.ip}" if source else "the source"
        text = f"{gone} is no address of this host any more: connections come from the others, if there are any"
        self._context.log_ratelimited("error", gone, text)

    def _log_interface_gone(self) -> None:
        """SO_BINDTODEVICE failed: there is no such interface any more. It may come again, as an address may."""
        gone = f"--interface={self._context.settings.egress.interface}"
        text = f"{gone} is no interface of this host any more: connections fail until there is one again"
        self._context.log_ratelimited("error", gone, text)

    def _await_answer(self, sock: socket.SocketType, now: int) -> None:
        self._socket = sock
        self._context.loop.watch(sock.fileno(), WRITE, self)
        once = self._context.gate.proves_each_syn
        self._context.loop.timers.arm(self, min(self._until_ns, now + _SYN_ONCE_NS) if once else self._until_ns)

    def readable(self) -> None:
        """Not called: the lane is NEW."""

    def ready(self, mask: int) -> None:
        """The handshake is complete, or has failed."""
        sock = self._socket
        if sock is None:
            return
        info = sockets.connected(sock)
        if info is None:
            self._attempt_failed(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) or errno.ECONNRESET)
            self.connect()
        else:
            self._socket = None
            self._connected(sock, info)

    def _connected(self, sock: socket.SocketType, info: TcpInfo) -> None:
        took_ns = time.monotonic_ns() - self._started_ns
        self.connect_us = took_ns // 1000
        observe(self._context.counters, CONNECT, took_ns)
        self._session.on_connected(sock, info)

    def on_deadline(self, now_ns: int) -> None:
        """Ask the gate again; or, if a SYN had no answer, fail the attempt or send the SYN from another socket."""
        if self not in self._context.registry.waiting:
            code = self._unreported_error()
            if code or now_ns >= self._until_ns:
                self._attempt_failed(code or errno.ETIMEDOUT)
            else:
                self._retract_syn()
        self.connect()

    def _unreported_error(self) -> int:
        """SO_ERROR: an ICMP error that came while connect(2) ran, as from this host's own filter, raises no event."""
        return self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) if self._socket else 0

    def on_policy_failed(self) -> None:
        """If the socket is in SYN_SENT over a family that fails now: try the other addresses, whose family may be allowed."""
        if self.upstream is not None and self._context.gate.ends(family_of(self.upstream), established=False):
            self._retract_syn()
            self.connect()

    def on_bug(self, bug: Exception) -> None:
        """A bug here is a bug of the session."""
        self._session.on_bug(bug)

    def _retract_syn(self) -> None:
        """Close the socket, and keep its address as the first candidate."""
        if self._socket is not None:
            self._close_socket()
            self._candidates = (self.upstream or b"") + self._candidates

    def _close_socket(self) -> None:
        """Close the connecting socket; with RST, in case the peer is in SYN_RECV."""
        if self._socket is not None:
            sockets.reset_on_close(self._socket)
            self._context.loop.close_later(self._socket)
            self._socket = None
            self._context.count(Counter.CONNECTS_ENDED)

    def _attempt_failed(self, code: int) -> None:
        """One address failed: remember why, in case no other connects, and log it."""
        self._close_socket()
        self._until_ns = 0
        self._failure = _ending_of(code)
        self._context.count(Counter.CONNECT_FAIL)
        self._context.count(Counter.CONNECT_TIMEOUT, int(self._failure is Ending.CONNECT_TIMEOUT))
        if self._failure is Ending.NO_DESCRIPTORS:
            self._candidates = b""  # the next address would need a descriptor too
        about = f"connect to {unpack(self.upstream or b'')}: {errno.errorcode.get(code, code)}"
        if self._failure in _ADVICE:
            self._context.log_ratelimited("error", self._failure.name, f"{about}: {_ADVICE[self._failure]}")
        elif self._context.settings.log_debug:
            route = self._context.settings.route
            self._context.records.put(Notice(self._context.number, time.time_ns(), "debug", about, route))

    def close(self) -> None:
        """Called once, when connected or at the session's end. The garbage collector is off, so no cycle may be left."""
        self._close_socket()
        self._context.loop.timers.disarm(self)
        self._context.registry.waiting.discard(self)
        del self._session


def _ending_of(code: int) -> Ending:
    """The ending of a session whose last connect failed with this errno."""
    if code in uapi.CAPACITY:
        return Ending.NO_DESCRIPTORS
    if code == errno.EADDRNOTAVAIL:
        return Ending.NO_PORTS
    if code in (errno.ECONNREFUSED, errno.ECONNRESET):
        return Ending.CONNECT_REFUSED
    return Ending.CONNECT_TIMEOUT if code == errno.ETIMEDOUT else Ending.CONNECT_FAILED
