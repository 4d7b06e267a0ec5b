"""TCP sockets: made with the options that tsproxy needs; TCP_INFO and saved SYNs; close(2) with a reset where that is meant."""

from __future__ import annotations

import errno
import os
import socket
import struct
from socket import SocketType
from typing import Callable, NamedTuple, Optional, Tuple

from _tsproxy.linux import uapi
from _tsproxy.linux.addresses import Address, SockAddr
from _tsproxy.linux.needs import needing

# SO_PRIORITY of each upstream socket: nftables rules match tsproxy's connections by it ("meta priority 0:4"). It needs no
# privilege and is not on the wire. TC_PRIO_INTERACTIVE_BULK (include/uapi/linux/pkt_sched.h): no usual TOS maps to it, and
# pfifo_fast and fq put it in the same band as untagged traffic, so the tag changes nothing else.
TAG = 4
# DSCP of upstream sockets where rules are relied on. Packets that the kernel sends when the socket no longer exists have it,
# on every kernel (tw_tos and tw_tclass of TIME_WAIT, include/net/inet_timewait_sock.h); the priority only on some. The rules
# match the packet by it and set what is wanted, so it is not on the wire. From the pool for local use (RFC 2474, section 6).
TAG_DSCP = 3
_LINGER_ZERO = struct.pack("ii", 1, 0)
_KEEPALIVE_PROBES = 3
_MOST_KEEPALIVE_PROBES, _LONGEST_KEEPALIVE_S = 127, 32767  # include/net/tcp.h, MAX_TCP_KEEPCNT and MAX_TCP_KEEPINTVL
_LONGEST_SYN = 1024
_USUAL_SYN = 120  # IPv4 with all its options, or IPv6 without extension headers; a small buffer is allocated faster
_SHORTEST_RTO_MAX_MS = 1000  # TCP_RTO_MAX_MS takes no less
# A relayed socket is a plain SocketType, which is all C: socket.socket adds makefile(), and Python frames to open and close.
_STREAM = int(socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
# For what is called for each connection: a global is read faster than a module's attribute, and a plain number than an enum.
_TCP, _NODELAY, _INFO = int(socket.IPPROTO_TCP), int(socket.TCP_NODELAY), uapi.TCP_INFO
_SOCKET, _OOBINLINE, _PRIORITY = int(socket.SOL_SOCKET), int(socket.SO_OOBINLINE), int(socket.SO_PRIORITY)
_SUMMARY_SIZE, _UNPACK_SUMMARY = uapi.TCPI_SUMMARY.size, uapi.TCPI_SUMMARY.unpack
_OPT_TIMESTAMPS, _CLOSE, _SAVED_SYN = uapi.TCPI_OPT_TIMESTAMPS, uapi.TCP_CLOSE, uapi.TCP_SAVED_SYN
_INET, _ACCEPTED = int(socket.AF_INET), int(socket.SOCK_STREAM)


class TcpInfo(NamedTuple):
    """The part of struct tcp_info (include/uapi/linux/tcp.h) that tsproxy reports."""

    timestamps: bool  # TSopt was negotiated; not whether the SYN offered it
    rtt_us: int
    retransmits: int  # of the SYN, too
    acknowledged: int  # bytes in total; our SYN counts as one, and our FIN as another
    outstanding: bool  # bytes, or a FIN; not valid after a reset, which empties the queue
    closed: bool  # the state is TCP_CLOSE
    segments_sent: int = 0  # modulo 2**32; 0: this kernel does not count them, for the SYN is one (tcpi_segs_out)
    segments_received: int = 0  # the same; the SYN-ACK is one, and dropped ones are in it (tcpi_segs_in)


def tcp_info(sock: SocketType) -> TcpInfo:
    """TCP_INFO of an established (or since closed) connection. In SYN_SENT the options read 0.

    After a reset, by either side, `acknowledged` is still what it was before.
    """
    return _tcp_info(sock.getsockopt(_TCP, _INFO, _SUMMARY_SIZE))


def _tcp_info(raw: bytes) -> TcpInfo:
    if len(raw) < _SUMMARY_SIZE:
        raw = raw.ljust(_SUMMARY_SIZE, b"\0")  # an older kernel's is shorter
    state, options, unacked, rtt_us, retransmits, acknowledged, sent, received, not_sent = _UNPACK_SUMMARY(raw)
    outstanding, timestamps = unacked != 0 or not_sent != 0, options & _OPT_TIMESTAMPS != 0
    return TcpInfo(timestamps, rtt_us, retransmits, acknowledged, outstanding, state == _CLOSE, sent, received)


def has_timestamps(sock: SocketType) -> bool:
    """Whether this connection negotiated TSopt. Reads 8 bytes of TCP_INFO, which is the cheapest way."""
    return sock.getsockopt(_TCP, _INFO, 8)[5] & _OPT_TIMESTAMPS != 0


def connected(sock: SocketType) -> Optional[TcpInfo]:
    """After connect(2): TCP_INFO if the connection is established; else None."""
    raw = sock.getsockopt(_TCP, _INFO, _SUMMARY_SIZE)
    return _tcp_info(raw) if raw[0] in uapi.TCP_CONNECTED else None


def tcp_state(sock: SocketType) -> int:
    """tcpi_state, e.g. linux.TCP_ESTABLISHED."""
    return sock.getsockopt(socket.IPPROTO_TCP, uapi.TCP_INFO, 1)[0]


def is_closed(sock: SocketType) -> bool:
    """Whether the state is TCP_CLOSE. SO_ERROR can't tell: it reports an error only once."""
    return tcp_state(sock) == uapi.TCP_CLOSE


def counts_microseconds(sock: SocketType) -> bool:
    """Whether this connection's timestamps would count microseconds (a feature of its route, TCPI_OPT_USEC_TS)."""
    return bool(sock.getsockopt(socket.IPPROTO_TCP, uapi.TCP_INFO, 8)[5] & uapi.TCPI_OPT_USEC_TS)


class Outstanding(NamedTuple):
    """What a peer has not acknowledged, by TCP_INFO."""

    any: bool  # bytes or a FIN, sent or waiting for the peer's window
    acknowledged: int  # bytes in total
    silent_ms: int  # since the last ACK, whether it acknowledged anything new or not
    sent_ms: int  # since data was last sent or retransmitted; probes do not count
    retransmits: int  # of the first byte that is outstanding
    unanswered: bool  # more than one retransmit or probe had no answer


def outstanding(sock: SocketType) -> Outstanding:
    """TCP_INFO of what is outstanding. Fields that an older kernel lacks read 0."""
    size = uapi.TCPI_OUTSTANDING.size
    raw = sock.getsockopt(socket.IPPROTO_TCP, uapi.TCP_INFO, size).ljust(size, b"\0")
    unacked, sent_ms, silent_ms, acknowledged, not_sent, window = uapi.TCPI_OUTSTANDING.unpack(raw)
    retransmits, probes = raw[2], raw[3]
    # The kernel does not count retransmits into a window that the peer has shrunk to 0 (tcp_retransmit_timer()).
    again = sent_ms < silent_ms and (retransmits > 1 or not window)
    return Outstanding(bool(unacked or not_sent), acknowledged, silent_ms, sent_ms, retransmits, again or probes > 1)


class TcpOption(NamedTuple):
    """For setsockopt(2) at level IPPROTO_TCP."""

    number: int
    value: int


def limit_rto(sock: SocketType, most_ms: int) -> Optional[TcpOption]:
    """Limit the time between retransmits, or probes (TCP_RTO_MAX_MS); returns what undoes it. None before Linux 6.15."""
    try:
        before = sock.getsockopt(socket.IPPROTO_TCP, uapi.TCP_RTO_MAX_MS)
        sock.setsockopt(socket.IPPROTO_TCP, uapi.TCP_RTO_MAX_MS, min(max(most_ms, _SHORTEST_RTO_MAX_MS), before))
    except OSError:
        return None
    return TcpOption(uapi.TCP_RTO_MAX_MS, before)


class Tuning(NamedTuple):
    """Socket options of each connection, downstream and upstream. 0 leaves the kernel's default."""

    keepalive_s: int = 0
    user_timeout_ms: int = 0

    def apply(self, sock: SocketType) -> None:
        """Set the options. On a listener the sockets that it accepts inherit them (tcp(7))."""
        set_at_once(sock)
        self.set_keepalive(sock)

    def set_keepalive(self, sock: SocketType) -> None:
        """Send keepalive probes. The time of the first one counts from the last segment, whenever this is called (tcp(7))."""
        tcp = socket.IPPROTO_TCP
        if self.keepalive_s:
            # TCP_KEEPIDLE last: if so long has passed already, it sends the first probe, and the next one is due by the others.
            gap_s, count = self._probes
            sock.setsockopt(tcp, socket.TCP_KEEPINTVL, gap_s)
            sock.setsockopt(tcp, socket.TCP_KEEPCNT, count)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(tcp, socket.TCP_KEEPIDLE, self.keepalive_s)

    @property
    def _probes(self) -> Tuple[int, int]:
        """Seconds between keepalive probes, and how many: after an idle peer's silence of the user timeout comes ETIMEDOUT.

        But not before a third of the keepalive time after the first probe, which is also the gap without a user
        timeout. TCP_USER_TIMEOUT itself is not set: it would count the time of a closed window (proxy/liveness.py).
        """
        gap_s = max(1, self.keepalive_s // _KEEPALIVE_PROBES)
        if not self.user_timeout_ms:
            return gap_s, _KEEPALIVE_PROBES
        left_s = max(gap_s, -(-self.user_timeout_ms // 1000) - self.keepalive_s)
        gap_s = max(1, min(left_s // _KEEPALIVE_PROBES, _LONGEST_KEEPALIVE_S))
        return gap_s, min(left_s // gap_s, _MOST_KEEPALIVE_PROBES)


def set_at_once(sock: SocketType) -> None:
    """Set what must be set before the first bytes come or go. A function without a loop: it is called for each connection."""
    # A small order must not wait for the previous one's ACK.
    sock.setsockopt(_TCP, _NODELAY, 1)
    # Receive an urgent byte in its place in the stream: without this recv(2) skips it, and it is lost (tcp(7)).
    sock.setsockopt(_SOCKET, _OOBINLINE, 1)


def reset_on_close(sock: SocketType) -> None:
    """Let close(2) send RST, not FIN, and discard unsent bytes (SO_LINGER with a time of 0, socket(7))."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)


def save_syns(sock: socket.socket) -> None:
    """Let this listener save each client's SYN for saved_syn() (TCP_SAVE_SYN, include/uapi/linux/tcp.h)."""
    with needing("setsockopt(2) with TCP_SAVE_SYN", "to see what a SYN offers"):
        sock.setsockopt(socket.IPPROTO_TCP, uapi.TCP_SAVE_SYN, 1)


def saved_syn(sock: SocketType) -> bytes:
    """IP and TCP header of the SYN of this accepted connection (TCP_SAVED_SYN).

    b"" if it was read before, if the connection came from a SYN cookie, or if the headers are longer than Python
    reads (1 KiB; EINVAL): a client may send many IPv6 extension headers.
    """
    for size in (_USUAL_SYN, _LONGEST_SYN):  # with EINVAL the kernel keeps it
        try:
            return sock.getsockopt(_TCP, _SAVED_SYN, size)
        except OSError:
            continue
    return b""


def timestamp_clock(sock: SocketType) -> int:
    """The clock of this connection's TSval, in ms modulo 2**32, with its offset (TCP_TIMESTAMP)."""
    return sock.getsockopt(_TCP, uapi.TCP_TIMESTAMP) & 0xFFFFFFFF


def reset_inherited_options(listener: socket.socket) -> None:
    """Reset options of a listener that had another owner, or route: accepted sockets inherit them, and the default is meant.

    With SO_LINGER close(2) blocks, also on a non-blocking socket, or resets. Below SO_RCVLOWAT bytes there is no EPOLLIN.
    TCP_CORK delays small sends. TCP_USER_TIMEOUT, which an earlier tsproxy may have set, ends a connection whose window is
    closed. SO_KEEPALIVE would stay on where `keepalive` is 0 now. Options that do no harm (buffers, marks, SO_BUSY_POLL,
    SO_RCVTIMEO without a blocking call), or have the effect that is meant (TCP_DEFER_ACCEPT), stay.
    """
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 0)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)
    listener.setsockopt(socket.IPPROTO_TCP, uapi.TCP_USER_TIMEOUT, 0)


def shares_our_namespace(sock: socket.socket) -> bool:
    """Whether the socket was made in this process's network namespace (SO_NETNS_COOKIE); False before Linux 5.14."""
    with socket.socket(sock.family, socket.SOCK_STREAM) as own:
        try:
            cookies = {one.getsockopt(socket.SOL_SOCKET, uapi.SO_NETNS_COOKIE, 8) for one in (sock, own)}
        except OSError:
            return False
    return len(cookies) == 1


def accepts_ipv4(listener: socket.socket) -> bool:
    """Whether it accepts IPv4 clients: an IPv6 listener with IPV6_V6ONLY does not (ipv6(7))."""
    return listener.family == socket.AF_INET or not listener.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)


def listener(address: Address, backlog: int, tuning: Tuning, reuse_port: bool = False) -> socket.socket:
    """A bound, listening, non-blocking socket. OSError as bind(2) and listen(2) raise it."""
    sock = bound(address, tuning, reuse_port)
    try:
        sock.listen(backlog)
    except BaseException:
        sock.close()
        raise
    return sock


def bound(address: Address, tuning: Tuning, reuse_port: bool = False) -> socket.socket:
    """A bound, non-blocking socket that does not listen yet, so that no client can come to it. OSError as bind(2) raises it."""
    sock = socket.socket(address.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        # bind(2) must not fail with EADDRINUSE for TIME_WAIT sockets of an earlier process.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        tuning.apply(sock)
        sock.bind(address.sockaddr)
    except BaseException:
        sock.close()
        raise
    return sock


class SourceUnavailable(OSError):
    """EADDRNOTAVAIL or ENODEV of bind(2): this host has no such address, or no such interface."""


class InterfaceUnavailable(OSError):
    """ENODEV of SO_BINDTODEVICE: this network namespace has no interface of that name."""


def bind_to_interface(sock: SocketType, name: str) -> None:
    """Let the socket send and receive by this interface, or in this VRF, alone (SO_BINDTODEVICE, socket(7)).

    InterfaceUnavailable if there is none; PermissionError without CAP_NET_RAW before Linux 5.7. An interface that is made
    anew under its name is another one to the kernel: a socket that was bound to the old one stays without.
    """
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, os.fsencode(name) + b"\0")
    except OSError as error:
        if error.errno == errno.ENODEV:
            raise InterfaceUnavailable(*error.args) from None
        raise


class Egress(NamedTuple):
    """Socket options of upstream connections alone."""

    interface: str = ""
    dscp: int = 0


_ANYHOW = Egress()


def dial(
    family: int, source: Optional[Address], for_rules: bool = False, egress: Egress = _ANYHOW, tagged: bool = True
) -> SocketType:
    """An unconnected, non-blocking upstream socket with TAG, bound to `source` if one is given. OSError of socket(2) and so on.

    It has no keepalive yet. `for_rules`: packet filter rules are relied on, so its packets have TAG_DSCP, in whose place the
    rules set the other one. Not `tagged`: rules that know TAG leave it alone.
    bind(2) needs no port here, so EADDRNOTAVAIL from it means the address: SourceUnavailable. From connect(2) it means ports.
    """
    sock = SocketType(family, _STREAM)
    try:
        dscp = TAG_DSCP if for_rules else egress.dscp
        if dscp:
            _set_dscp(sock, family, dscp)
        if tagged or dscp:
            sock.setsockopt(_SOCKET, _PRIORITY, TAG if tagged else 0)  # after IP_TOS, which sets it, too (ip(7))
        set_at_once(sock)
        if egress.interface:
            bind_to_interface(sock, egress.interface)  # before bind(2): an address of a VRF is one of its interfaces' alone
        if source is not None:
            # The port is chosen at connect(), by the 4-tuple; bind() would reserve one for all targets.
            sock.setsockopt(socket.IPPROTO_IP, uapi.IP_BIND_ADDRESS_NO_PORT, 1)
            _bind(sock, source._replace(port=0))
    except BaseException:
        sock.close()
        raise
    return sock


def reuseaddr_socket(family: int) -> socket.socket:
    """A non-blocking TCP socket that can be bound to an address of a socket just closed (SO_REUSEADDR)."""
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return sock


def _set_dscp(sock: SocketType, family: int, dscp: int) -> None:
    """Of all packets to come, the SYN too. The kernel keeps the two bits of ECN, which are its own on a TCP socket (ip(7))."""
    level, name = (socket.IPPROTO_IPV6, socket.IPV6_TCLASS) if family == socket.AF_INET6 else (socket.IPPROTO_IP, socket.IP_TOS)
    sock.setsockopt(level, name, dscp << 2)


def _bind(sock: SocketType, address: Address) -> None:
    try:
        sock.bind(address.sockaddr)
    except OSError as error:
        if error.errno in (errno.EADDRNOTAVAIL, errno.ENODEV):
            raise SourceUnavailable(*error.args) from None
        raise


def listener_from_fd(fd: int) -> socket.socket:
    """A non-blocking socket object that owns a listener's descriptor. Its family is read from the kernel (SO_DOMAIN)."""
    with needing("getsockopt(2)", "to take over a listener"):
        sock = socket.socket(fileno=fd)
    sock.setblocking(False)
    return sock


Accept4 = Callable[[], Tuple[int, SockAddr]]


def bind_accept4(listener: socket.socket) -> Accept4:
    """accept4(2) on a listener: each call returns a client's descriptor and address. OSError as accept4(2) raises it.

    socket.accept() calls the same function (Lib/socket.py). The object that it makes, with an enum each for family and type,
    takes 2 us of the 6 that a client's socket costs.
    """
    accept4: Accept4 = listener._accept  # type: ignore[attr-defined]
    return accept4


def from_fd(fd: int) -> SocketType:
    """A non-blocking socket object that owns an accepted descriptor.

    AF_INET does for an IPv6 descriptor, too, as long as no address is given to it: recv, send and options don't read it.
    """
    sock = SocketType(_INET, _ACCEPTED, 0, fd)
    sock.setblocking(False)
    return sock
