"""Linux numbers that Python does not name on every version from 3.9 on, and the errno families.

Each number stands beside the kernel header it was read from. They are the same on every
architecture that Linux's generic headers serve (x86_64, aarch64, ppc64le, s390x, riscv64).
"""

import errno

# include/uapi/linux/tcp.h, level IPPROTO_TCP
TCP_INFO = 11
TCP_QUICKACK = 12
TCP_USER_TIMEOUT = 18
TCP_TIMESTAMP = 24
TCP_SAVE_SYN = 27
TCP_SAVED_SYN = 28

# include/net/tcp_states.h, tcpi_state: ESTABLISHED, and CLOSE_WAIT where the peer's FIN is here already
TCP_CONNECTED = frozenset({1, 8})

# include/uapi/linux/tcp.h, tcpi_options
TCPI_OPT_TIMESTAMPS = 1
TCPI_OPT_USEC_TS = 64

# include/uapi/linux/in.h, level IPPROTO_IP (it serves IPv6 sockets too)
IP_BIND_ADDRESS_NO_PORT = 24

# include/uapi/asm-generic/socket.h; Linux 5.14
SO_NETNS_COOKIE = 71

# include/uapi/linux/in.h
IPPROTO_MPTCP = 262

# include/net/scm.h: the most descriptors in one message
SCM_MAX_FD = 253

# include/uapi/linux/fcntl.h
F_SETPIPE_SZ = 1031

# Try again when the descriptor is ready. EINTR never shows: Python retries it (PEP 475).
RETRY = frozenset({errno.EAGAIN, errno.EWOULDBLOCK, errno.EINPROGRESS, errno.EALREADY})

# The peer, or the path to it, ended the connection.
PEER_RESET = frozenset({errno.ECONNRESET, errno.EPIPE, errno.ECONNABORTED, errno.ENOTCONN})
PEER_GONE = PEER_RESET | {
    errno.ETIMEDOUT,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.EHOSTDOWN,
    errno.ENETDOWN,
    errno.ENONET,
    errno.ECONNREFUSED,
    errno.EPROTO,
}

# The host has no room: pause, try again by the clock, never spin (accept(2), socket(2)).
CAPACITY = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
