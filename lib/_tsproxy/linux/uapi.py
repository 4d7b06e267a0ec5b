"""Linux constants that Python does not have on every version from 3.9 on, and the kinds of errnos.

Above each constant is the kernel header that defines it. They are the same on every
architecture that uses Linux's generic headers (x86_64, aarch64, ppc64le, s390x, riscv64).
"""

import errno
import struct

# include/uapi/linux/tcp.h, level IPPROTO_TCP
TCP_INFO = 11
TCP_USER_TIMEOUT = 18
TCP_TIMESTAMP = 24
TCP_SAVE_SYN = 27
TCP_SAVED_SYN = 28
TCP_RTO_MAX_MS = 44  # Linux 6.15

# include/net/tcp_states.h, tcpi_state
TCP_ESTABLISHED = 1
TCP_CLOSE = 7  # also in TCP_INFO of a socket whose connection is in TIME_WAIT
TCP_CONNECTED = frozenset({TCP_ESTABLISHED, 8})  # and CLOSE_WAIT: the peer's FIN has come

# include/uapi/linux/tcp.h, struct tcp_info: tcpi_unacked, last_data_sent, last_ack_recv, bytes_acked, notsent_bytes, snd_wnd
# (Linux 5.4), by their offsets. It has only ever grown at its end.
TCPI_OUTSTANDING = struct.Struct("=24xI16xI8xI60xQ16xI80xI")
# And tcpi_state, options, unacked, rtt, total_retrans, bytes_acked, segs_out and segs_in (Linux 4.2), notsent_bytes.
TCPI_SUMMARY = struct.Struct("=B4xB18xI40xI28xI16xQ8xIII")

# include/uapi/linux/tcp.h, tcpi_options
TCPI_OPT_TIMESTAMPS = 1
TCPI_OPT_USEC_TS = 64

# include/uapi/linux/in.h, level IPPROTO_IP (it serves IPv6 sockets too)
IP_BIND_ADDRESS_NO_PORT = 24

# include/uapi/asm-generic/socket.h, level SOL_SOCKET
SO_ATTACH_FILTER = 26
SO_RCVBUFFORCE = 33
SO_TIMESTAMPNS = 35  # its control message has the same number
SO_NETNS_COOKIE = 71  # Linux 5.14

# include/uapi/linux/in.h
IPPROTO_MPTCP = 262

# include/uapi/linux/if_ether.h: a packet socket for one protocol does not receive outgoing packets
ETH_P_ALL = 0x0003

# include/linux/socket.h, include/uapi/linux/if_packet.h, include/uapi/linux/if_arp.h
SOL_PACKET = 263
PACKET_ADD_MEMBERSHIP = 1
PACKET_STATISTICS = 6
PACKET_MR_PROMISC = 1
ARPHRD_ETHER, ARPHRD_LOOPBACK = 1, 772

# include/net/scm.h: the most descriptors in one message
SCM_MAX_FD = 253
PIPE_BUF = 4096  # include/uapi/linux/limits.h: so many bytes are written to a pipe as one, or not at all (pipe(7))

# include/uapi/linux/fcntl.h
F_SETPIPE_SZ = 1031

# Kind "retry": try again when the descriptor is ready. EINTR never shows: Python retries it (PEP 475).
RETRY = frozenset({errno.EAGAIN, errno.EWOULDBLOCK, errno.EINPROGRESS, errno.EALREADY})

# Kind "peer": errnos of recv(2), send(2) and SO_ERROR when an established connection has ended. An ICMP error does not end one
# by itself (RFC 1122 4.2.3.9): it is kept, and reported instead of ETIMEDOUT when no ACK comes (sk_err_soft, tcp_write_err(),
# net/ipv4/tcp_timer.c). While connecting any errno ends the attempt, so none needs to be listed.
PEER_RESET = frozenset({errno.ECONNRESET, errno.EPIPE, errno.ECONNABORTED, errno.ENOTCONN})
# An ICMP error: icmp_err_convert[] (net/ipv4/icmp.c), tab_unreach[] and icmpv6_err_convert() (net/ipv6/icmp.c), ip(7).
_ICMP = {
    errno.ENETUNREACH,  # network unreachable, unknown, or not for this type of service; IPv6: no route
    errno.EHOSTUNREACH,  # host unreachable, time exceeded, IPv4: prohibited; IPv6: address unreachable
    errno.ECONNREFUSED,  # port unreachable
    errno.ENOPROTOOPT,  # IPv4: protocol unreachable
    errno.EMSGSIZE,  # too big
    errno.EOPNOTSUPP,  # IPv4: source route failed
    errno.EHOSTDOWN,  # IPv4: host unknown
    errno.ENONET,  # IPv4: host isolated
    errno.EPROTO,  # parameter problem, and unknown types
    errno.EACCES,  # IPv6: administratively prohibited, source address failed policy, route rejected
}
# This host: its routes (fib_props[], net/ipv4/fib_semantics.c, and ip6_route_info_create()), interfaces, filters, modules.
_LOCAL = {
    errno.EACCES,  # a route of type prohibit; SELinux
    errno.EINVAL,  # a route of type blackhole
    errno.EPERM,  # a filter on output; a BPF program of the cgroup
    errno.ENETDOWN,
    errno.ENODEV,
    errno.EADDRNOTAVAIL,
}
PEER_ERRORS = PEER_RESET | _ICMP | _LOCAL | {errno.ETIMEDOUT}

# accept(2) reports errors of the new connection. EINVAL is not one of them: it means that the socket does not listen.
ACCEPT_PEER_ERRORS = PEER_ERRORS - {errno.EINVAL}

# Kind "unsupported": the kernel, its security module or a filter (seccomp(2), gVisor) refuses the call for good: fall back.
UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.ENOTSUP})

# Kind "capacity": out of descriptors or memory. Pause, retry by a timer, never spin (accept(2), socket(2)).
CAPACITY = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
