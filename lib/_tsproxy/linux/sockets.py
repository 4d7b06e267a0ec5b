"""Sockets as tsproxy wants them: options set, effects read back, a reset when one is meant."""

from __future__ import annotations

import errno
import socket
import struct
from socket import SocketType
from typing import Callable, NamedTuple, Optional, Tuple

from _tsproxy.linux import uapi
from _tsproxy.linux.addresses import Address, SockAddr
from _tsproxy.linux.needs import needing

# SO_PRIORITY of each upstream socket: nftables knows tsproxy's connections by it ("meta priority 0:4"). No privilege
# needed, not on the wire; TC_PRIO_INTERACTIVE_BULK (include/uapi/linux/pkt_sched.h), which no ordinary program's TOS
# maps to, and which pfifo_fast and fq put in the same band as untagged traffic: the tag changes nothing else.
TAG = 4
# DSCP of those for which rules are relied on. What a kernel sends for a connection without its socket carries it (tw_tos
# and tw_tclass of TIME_WAIT, include/net/inet_timewait_sock.h), on every kernel; the priority only on some. The rules know
# the packet by it and set it back to 0, so it is not on the wire. From the pool for local use (RFC 2474, section 6).
TAG_DSCP = 3
_LINGER_ZERO = struct.pack("ii", 1, 0)
_KEEPALIVE_PROBES = 3
_MOST_KEEPALIVE_PROBES, _LONGEST_KEEPALIVE_S = 127, 32767  # include/net/tcp.h, MAX_TCP_KEEPCNT and MAX_TCP_KEEPINTVL
_LONGEST_SYN = 1024
_SHORTEST_RTO_MAX_MS = 1000  # TCP_RTO_MAX_MS takes no less
# A relayed socket is a plain SocketType, which is all C: socket.socket adds makefile() and Python frames to making and closing.
_STREAM = int(socket.SOCK_STREAM | socket.SOCK_NONBLOCK)


class TcpInfo(NamedTuple):
    """The part of struct tcp_info (include/uapi/linux/tcp.h) that tsproxy reports."""

    timestamps: bool  # TSopt was negotiated; says nothing of what the SYN offered
    rtt_us: int
    retransmits: int  # the SYN's, too
    acknowledged: int  # bytes, since the beginning; our SYN counts as one, and our FIN as another
    outstanding: bool  # bytes, or a FIN; after a reset, which empties the queue, it says nothing
    closed: bool  # the connection is no more


def tcp_info(sock: SocketType) -> TcpInfo:
    """TCP_INFO of an established (or since closed) connection. While SYN_SENT the options read 0.

    After a reset, by either side, it still says what had been acknowledged until then.
    """
    return _tcp_info(sock.getsockopt(socket.IPPROTO_TCP, uapi.TCP_INFO, uapi.TCPI_SUMMARY.size))


def _tcp_info(raw: bytes) -> TcpInfo:
    raw = raw.ljust(uapi.TCPI_SUMMARY.size, b"\0")  # an older kernel's is shorter
    state, options, unacked, rtt_us, retransmits, acknowledged, not_sent = uapi.TCPI_SUMMARY.unpack(raw)
    ends = bool(unacked or not_sent), state == uapi.TCP_CLOSE
    return TcpInfo(bool(options & uapi.TCPI_OPT_TIMESTAMPS), rtt_us, retransmits, acknowledged, *ends)


def segments_received(sock: SocketType) -> int:
    """tcpi_segs_in: how many segments have come for this connection, whatever became of them."""
    (count,) = struct.unpack_from("=I", sock.getsockopt(socket.IPPROTO_TCP, uapi.TCP_INFO, 144).ljust(144, b"\0"), 140)
    return int(count)


def has_timestamps(sock: SocketType) -> bool:
    """Whether this connection negotiated TSopt: TCP_INFO's option byte alone, the cheapest read."""
    return bool(sock.getsockopt(socket.IPPROTO_TCP, uapi.TCP_INFO, 8)[5] & uapi.TCPI_OPT_TIMESTAMPS)


def connected(sock: SocketType) -> Optional[TcpInfo]:
    """After connect(): what TCP_INFO says of the connection; None if there is none (any more)."""
    raw = sock.getsockopt(socket.IPPROTO_TCP, uapi.TCP_INFO, uapi.TCPI_SUMMARY.size)
    return _tcp_info(raw) if raw[0] in uapi.TCP_CONNECTED else None


def tcp_state(sock: SocketType) -> int:
    """tcpi_state, e.g. linux.TCP_ESTABLISHED."""
    return sock.getsockopt(socket.IPPROTO_TCP, uapi.TCP_INFO, 1)[0]


def is_closed(sock: SocketType) -> bool:
    """Whether the connection is no more; an error that ended it may have been told already, and is told only once."""
    return tcp_state(sock) == uapi.TCP_CLOSE


def counts_microseconds(sock: SocketType) -> bool:
    """Whether this connection's timestamps would count microseconds (a route's feature, TCPI_OPT_USEC_TS)."""
    return bool(sock.getsockopt(socket.IPPROTO_TCP, uapi.TCP_INFO, 8)[5] & uapi.TCPI_OPT_USEC_TS)


class Outstanding(NamedTuple):
    """What a peer has not acknowledged, by TCP_INFO."""

    any: bool  # bytes or a FIN, sent or waiting for the peer's window
    acknowledged: int  # bytes, since the beginning
    silent_ms: int  # since an ACK came, whether it acknowledged anything new or not
    sent_ms: int  # since data was sent, or sent again; probes do not count
    retransmits: int  # of the first byte that is outstanding
    asked: bool  # there was more than one segment that should have been answered, and none was


def outstanding(sock: SocketType) -> Outstanding:
    """TCP_INFO, read for what is under way. An older kernel's is shorter: what it lacks reads 0."""
    size = uapi.TCPI_OUTSTANDING.size
    raw = sock.getsockopt(socket.IPPROTO_TCP, uapi.TCP_INFO, size).ljust(size, b"\0")
    unacked, sent_ms, silent_ms, acknowledged, not_sent, window = uapi.TCPI_OUTSTANDING.unpack(raw)
    retransmits, probes = raw[2], raw[3]
    # Of a window that was taken back, retransmits are not counted (tcp_retransmit_timer()).
    again = sent_ms < silent_ms and (retransmits > 1 or not window)
    return Outstanding(bool(unacked or not_sent), acknowledged, silent_ms, sent_ms, retransmits, again or probes > 1)


class TcpOption(NamedTuple):
    """For setsockopt(2) at level IPPROTO_TCP."""

    number: int
    value: int


def limit_rto(sock: SocketType, most_ms: int) -> Optional[TcpOption]:
    """Let no more time pass between retransmits, or probes; what sets it back. None before Linux 6.15."""
    try:
        before = sock.getsockopt(socket.IPPROTO_TCP, uapi.TCP_RTO_MAX_MS)
        sock.setsockopt(socket.IPPROTO_TCP, uapi.TCP_RTO_MAX_MS, min(max(most_ms, _SHORTEST_RTO_MAX_MS), before))
    except OSError:
        return None
    return TcpOption(uapi.TCP_RTO_MAX_MS, before)


class Tuning(NamedTuple):
    """What each connection gets, downstream and upstream alike. 0 leaves the kernel's own setting."""

    keepalive_s: int = 0
    user_timeout_ms: int = 0

    def apply(self, sock: SocketType) -> None:
        """Set the options that a connection keeps. On a listener they are inherited by what it accepts (tcp(7))."""
        tcp = socket.IPPROTO_TCP
        # A small order must not wait for the previous one's ACK.
        sock.setsockopt(tcp, socket.TCP_NODELAY, 1)
        # An urgent byte is one of the stream, in its place: without this recv(2) passes over it, and it is lost (tcp(7)).
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        if self.keepalive_s:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            gap_s, count = self._probes
            sock.setsockopt(tcp, socket.TCP_KEEPIDLE, self.keepalive_s)
            sock.setsockopt(tcp, socket.TCP_KEEPINTVL, gap_s)
            sock.setsockopt(tcp, socket.TCP_KEEPCNT, count)

    @property
    def _probes(self) -> Tuple[int, int]:
        """Seconds between keepalive probes, and how many are sent: an idle peer is gone after a silence of the user timeout.

        But not before the first probe has had a third of the keepalive time, which is also what each has without a user
        timeout. TCP_USER_TIMEOUT itself is not set: it would count the time of a closed window (proxy/liveness.py).
        """
        gap_s = max(1, self.keepalive_s // _KEEPALIVE_PROBES)
        if not self.user_timeout_ms:
            return gap_s, _KEEPALIVE_PROBES
        left_s = max(gap_s, -(-self.user_timeout_ms // 1000) - self.keepalive_s)
        gap_s = max(1, min(left_s // _KEEPALIVE_PROBES, _LONGEST_KEEPALIVE_S))
        return gap_s, min(left_s // gap_s, _MOST_KEEPALIVE_PROBES)


def acknowledge_at_once(sock: SocketType) -> None:
    """Leave delayed-ACK mode now (TCP_QUICKACK, tcp(7)); the kernel may enter it again later, or not know it."""
    try:
        sock.setsockopt(socket.IPPROTO_TCP, uapi.TCP_QUICKACK, 1)
    except OSError:
        pass  # slower by a moment, at the beginning


def reset_on_close(sock: SocketType) -> None:
    """close(2) will send RST, not FIN, and drop what is unsent (SO_LINGER with a time of 0, socket(7))."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)


def save_syns(sock: socket.socket) -> None:
    """Let this listener keep each client's SYN for saved_syn() (TCP_SAVE_SYN, include/uapi/linux/tcp.h)."""
    with needing("setsockopt(2) with TCP_SAVE_SYN", "to see what a SYN offers"):
        sock.setsockopt(socket.IPPROTO_TCP, uapi.TCP_SAVE_SYN, 1)


def saved_syn(sock: SocketType) -> bytes:
    """IP and TCP header of the SYN that made this accepted connection.

    b"" if it was read before, if the connection was made from a SYN cookie, or if the headers are longer than Python
    reads (1 KiB; EINVAL): a client may put as many IPv6 extension headers there as it likes.
    """
    try:
        return sock.getsockopt(socket.IPPROTO_TCP, uapi.TCP_SAVED_SYN, _LONGEST_SYN)
    except OSError:
        return b""


def timestamp_clock(sock: SocketType) -> int:
    """The clock that TSval would be taken from, in ms modulo 2**32, this connection's offset included (TCP_TIMESTAMP)."""
    return sock.getsockopt(socket.IPPROTO_TCP, uapi.TCP_TIMESTAMP) & 0xFFFFFFFF


def forget_options(listener: socket.socket) -> None:
    """Take back what whoever made this listener has set, and accepted sockets inherit, where relaying relies on the default.

    With SO_LINGER close(2) waits, non-blocking or not, or resets; under SO_RCVLOWAT a small order is not told of; TCP_CORK
    holds it back; TCP_USER_TIMEOUT, which an earlier tsproxy may have set, takes a closed window for a death. What cannot
    hurt (buffers, marks, SO_BUSY_POLL, SO_RCVTIMEO without a blocking call), or only as it is meant to (TCP_DEFER_ACCEPT,
    keepalive), stays.
    """
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)
    listener.setsockopt(socket.IPPROTO_TCP, uapi.TCP_USER_TIMEOUT, 0)


def shares_our_namespace(sock: socket.socket) -> bool:
    """Whether the socket was made in this process's network namespace; False too where the kernel can't tell (before 5.14)."""
    with socket.socket(sock.family, socket.SOCK_STREAM) as own:
        try:
            cookies = {one.getsockopt(socket.SOL_SOCKET, uapi.SO_NETNS_COOKIE, 8) for one in (sock, own)}
        except OSError:
            return False
    return len(cookies) == 1


def takes_ipv4(listener: socket.socket) -> bool:
    """Whether IPv4 clients come in: not by an IPv6 listener with IPV6_V6ONLY (ipv6(7))."""
    return listener.family == socket.AF_INET or not listener.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)


def listener(address: Address, backlog: int, tuning: Tuning, reuse_port: bool = False) -> socket.socket:
    """A bound, listening, non-blocking socket. OSError as bind(2) and listen(2) give it."""
    sock = socket.socket(address.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        # A restart must not wait for the TIME_WAIT sockets of the run before.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        tuning.apply(sock)
        sock.bind(address.sockaddr)
        sock.listen(backlog)
    except BaseException:
        sock.close()
        raise
    return sock


class SourceGone(OSError):
    """The address to bind to is none of this host's, or its interface is gone."""


def dial(family: int, tuning: Tuning, source: Optional[Address], for_rules: bool = False) -> SocketType:
    """An unconnected, non-blocking upstream socket with the tag, bound to `source` if one is given. OSError as it comes.

    `for_rules`: packet filter rules are relied on, so its packets carry TAG_DSCP for them as well.
    bind(2) here needs no port, so EADDRNOTAVAIL from it is about the address: SourceGone. From connect(2) it is about ports.
    """
    sock = SocketType(family, _STREAM)
    try:
        if for_rules:
            _set_dscp(sock, family, TAG_DSCP)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, TAG)  # after IP_TOS, which sets it, too (ip(7))
        tuning.apply(sock)
        if source is not None:
            # The port is chosen at connect(), by the 4-tuple; bind() would reserve one for all targets.
            sock.setsockopt(socket.IPPROTO_IP, uapi.IP_BIND_ADDRESS_NO_PORT, 1)
            _bind(sock, source._replace(port=0))
    except BaseException:
        sock.close()
        raise
    return sock


def reusing(family: int) -> socket.socket:
    """A non-blocking TCP socket that may take an address over from one that was just closed (SO_REUSEADDR)."""
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return sock


def _set_dscp(sock: SocketType, family: int, dscp: int) -> None:
    level, name = (socket.IPPROTO_IPV6, socket.IPV6_TCLASS) if family == socket.AF_INET6 else (socket.IPPROTO_IP, socket.IP_TOS)
    sock.setsockopt(level, name, dscp << 2)


def _bind(sock: SocketType, address: Address) -> None:
    try:
        sock.bind(address.sockaddr)
    except OSError as error:
        if error.errno in (errno.EADDRNOTAVAIL, errno.ENODEV):
            raise SourceGone(*error.args) from None
        raise


def inherit(fd: int) -> socket.socket:
    """A non-blocking socket object around a listener's descriptor, which it then owns; the family is the kernel's to tell."""
    with needing("getsockopt(2)", "to take over a listener"):
        sock = socket.socket(fileno=fd)
    sock.setblocking(False)
    return sock


Accept4 = Callable[[], Tuple[int, SockAddr]]


def bind_accept4(listener: socket.socket) -> Accept4:
    """accept4(2) on a listener: each call gives a client's descriptor and address. OSError as it comes.

    This is what socket.accept() itself calls (Lib/socket.py); the object it wraps the descriptor in, with an enum each
    for its family and type, takes 2 us of the 6 that a client's socket costs.
    """
    take: Accept4 = listener._accept  # type: ignore[attr-defined]
    return take


def from_fd(fd: int, family: int) -> SocketType:
    """A non-blocking socket object around an accepted descriptor, which it then owns."""
    sock = SocketType(family, socket.SOCK_STREAM, 0, fd)
    sock.setblocking(False)
    return sock
