"""Sockets as tsproxy wants them: options set, effects read back, a reset when one is meant."""

from __future__ import annotations

import socket
import struct
from socket import SocketType
from typing import Callable, NamedTuple, Optional, Tuple

from _tsproxy.host import linux
from _tsproxy.host.addresses import Address, SockAddr

# SO_PRIORITY of each upstream socket: nftables knows tsproxy's connections by it ("meta priority 0:4"). No privilege
# needed, not on the wire; TC_PRIO_INTERACTIVE_BULK (include/uapi/linux/pkt_sched.h), which no ordinary program's TOS
# maps to, and which pfifo_fast and fq put in the same band as untagged traffic: the tag changes nothing else.
TAG = 4
_LINGER_ZERO = struct.pack("ii", 1, 0)
_KEEPALIVE_PROBES = 3
_LONGEST_SYN = 1024
# A relayed socket is a plain SocketType, which is all C: socket.socket adds makefile() and Python frames to making and closing.
_STREAM = int(socket.SOCK_STREAM | socket.SOCK_NONBLOCK)


class TcpInfo(NamedTuple):
    """The part of struct tcp_info (include/uapi/linux/tcp.h) that tsproxy reports."""

    timestamps: bool  # TSopt was negotiated; says nothing of what the SYN offered
    rtt_us: int
    retransmits: int


def tcp_info(sock: SocketType) -> TcpInfo:
    """TCP_INFO of an established (or since closed) connection. While SYN_SENT the options read 0."""
    raw = sock.getsockopt(socket.IPPROTO_TCP, linux.TCP_INFO, 104)
    return TcpInfo(bool(raw[5] & linux.TCPI_OPT_TIMESTAMPS), *struct.unpack_from("=I28xI", raw, 68))


def has_timestamps(sock: SocketType) -> bool:
    """Whether this connection negotiated TSopt: TCP_INFO's option byte alone, the cheapest read."""
    return bool(sock.getsockopt(socket.IPPROTO_TCP, linux.TCP_INFO, 8)[5] & linux.TCPI_OPT_TIMESTAMPS)


def connected_with_timestamps(sock: SocketType) -> Optional[bool]:
    """After connect(): whether TSopt was negotiated; None if there is no connection (any more)."""
    info = sock.getsockopt(socket.IPPROTO_TCP, linux.TCP_INFO, 8)
    return bool(info[5] & linux.TCPI_OPT_TIMESTAMPS) if info[0] in linux.TCP_CONNECTED else None


def counts_microseconds(sock: SocketType) -> bool:
    """Whether this connection's timestamps would count microseconds (a route's feature, TCPI_OPT_USEC_TS)."""
    return bool(sock.getsockopt(socket.IPPROTO_TCP, linux.TCP_INFO, 8)[5] & linux.TCPI_OPT_USEC_TS)


class Tuning(NamedTuple):
    """What each connection gets, downstream and upstream alike. 0 leaves the kernel's own setting."""

    keepalive_s: int = 0
    user_timeout_ms: int = 0

    def apply(self, sock: SocketType) -> None:
        """Set the options that a connection keeps. On a listener they are inherited by what it accepts (tcp(7))."""
        tcp = socket.IPPROTO_TCP
        # A small order must not wait for the previous one's ACK.
        sock.setsockopt(tcp, socket.TCP_NODELAY, 1)
        if self.keepalive_s:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(tcp, socket.TCP_KEEPIDLE, self.keepalive_s)
            sock.setsockopt(tcp, socket.TCP_KEEPINTVL, max(1, self.keepalive_s // _KEEPALIVE_PROBES))
        if self.user_timeout_ms:
            sock.setsockopt(tcp, linux.TCP_USER_TIMEOUT, self.user_timeout_ms)
        elif self.keepalive_s:
            # Where there is a user timeout, it decides instead of the count (tcp(7), TCP_USER_TIMEOUT).
            sock.setsockopt(tcp, socket.TCP_KEEPCNT, _KEEPALIVE_PROBES)


def acknowledge_at_once(sock: SocketType) -> None:
    """Leave delayed-ACK mode now (TCP_QUICKACK, tcp(7)); the kernel may enter it again later."""
    sock.setsockopt(socket.IPPROTO_TCP, linux.TCP_QUICKACK, 1)


def reset_on_close(sock: SocketType) -> None:
    """close(2) will send RST, not FIN, and drop what is unsent (SO_LINGER with a time of 0, socket(7))."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)


def save_syns(sock: socket.socket) -> None:
    """Let this listener keep each client's SYN for saved_syn() (TCP_SAVE_SYN, include/uapi/linux/tcp.h)."""
    sock.setsockopt(socket.IPPROTO_TCP, linux.TCP_SAVE_SYN, 1)


def saved_syn(sock: SocketType) -> bytes:
    """IP and TCP header of the SYN that made this accepted connection.

    b"" if it was read before, if the connection was made from a SYN cookie, or if the headers are longer than Python
    reads (1 KiB; EINVAL): a client may put as many IPv6 extension headers there as it likes.
    """
    try:
        return sock.getsockopt(socket.IPPROTO_TCP, linux.TCP_SAVED_SYN, _LONGEST_SYN)
    except OSError:
        return b""


def timestamp_clock(sock: SocketType) -> int:
    """The clock that TSval would be taken from, in ms modulo 2**32, this connection's offset included (TCP_TIMESTAMP)."""
    return sock.getsockopt(socket.IPPROTO_TCP, linux.TCP_TIMESTAMP) & 0xFFFFFFFF


def forget_options(listener: socket.socket) -> None:
    """Take back what whoever made this listener has set, and accepted sockets inherit, where relaying relies on the default.

    With SO_LINGER close(2) waits, non-blocking or not, or resets; under SO_RCVLOWAT a small order is not told of; TCP_CORK
    holds it back; SO_OOBINLINE puts the urgent byte among the others. What cannot hurt (buffers, marks, SO_BUSY_POLL,
    SO_RCVTIMEO without a blocking call), or only as it is meant to (TCP_DEFER_ACCEPT, keepalive), stays.
    """
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 0)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)


def shares_our_namespace(sock: socket.socket) -> bool:
    """Whether the socket was made in this process's network namespace; False too where the kernel can't tell (before 5.14)."""
    with socket.socket(sock.family, socket.SOCK_STREAM) as own:
        try:
            cookies = {one.getsockopt(socket.SOL_SOCKET, linux.SO_NETNS_COOKIE, 8) for one in (sock, own)}
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


def dial(family: int, tuning: Tuning, source: Optional[Address]) -> SocketType:
    """An unconnected, non-blocking upstream socket with the tag, bound to `source` if one is given. OSError as it comes."""
    sock = SocketType(family, _STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, TAG)
        tuning.apply(sock)
        if source is not None:
            # The port is chosen at connect(), by the 4-tuple; bind() would reserve one for all targets.
            sock.setsockopt(socket.IPPROTO_IP, linux.IP_BIND_ADDRESS_NO_PORT, 1)
            sock.bind(source._replace(port=0).sockaddr)
    except BaseException:
        sock.close()
        raise
    return sock


def inherit(fd: int) -> socket.socket:
    """A non-blocking socket object around a listener's descriptor, which it then owns; the family is the kernel's to tell."""
    sock = socket.socket(fileno=fd)
    sock.setblocking(False)
    return sock


Take = Callable[[], Tuple[int, SockAddr]]


def taker(listener: socket.socket) -> Take:
    """accept4(2) on a listener: each call gives a client's descriptor and address. OSError as it comes.

    This is what socket.accept() itself calls (Lib/socket.py); the object it wraps the descriptor in, with an enum each
    for its family and type, takes 2 us of the 6 that a client's socket costs.
    """
    take: Take = listener._accept  # type: ignore[attr-defined]
    return take


def adopt(fd: int, family: int) -> SocketType:
    """A non-blocking socket object around an accepted descriptor, which it then owns."""
    sock = SocketType(family, socket.SOCK_STREAM, 0, fd)
    sock.setblocking(False)
    return sock
