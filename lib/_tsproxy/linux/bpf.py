"""Classic BPF (include/uapi/linux/filter.h): small programs that the kernel runs on each packet for a socket.

A packet socket's program sees the packet from the IP header on. A TCP socket's sees the segment from the TCP header on,
before TCP itself does (tcp_filter() in net/ipv4/tcp_ipv4.c): what it does not let pass, that socket never receives.
Recent kernels want CAP_NET_ADMIN for the latter (seen on 6.18); the former always takes CAP_NET_RAW, for the socket.
"""

from __future__ import annotations

import socket
import struct
from array import array
from socket import SocketType
from typing import Optional, Sequence, Tuple

from _tsproxy.linux import uapi

Instruction = Tuple[int, int, int, int]  # code, jump if true, jump if false, k

_ALL = 0xFFFF
_TSOPT = 0x080A  # kind 8, length 10 (RFC 7323, section 3.2)


def attach(sock: SocketType, program: Sequence[Instruction]) -> None:
    """Put the program in the place of the one that the socket has. struct sock_fprog points to it; the kernel copies it."""
    code = array("B", b"".join(struct.pack("=HBBI", *instruction) for instruction in program))
    sock.setsockopt(socket.SOL_SOCKET, uapi.SO_ATTACH_FILTER, struct.pack("@HP", len(program), code.buffer_info()[0]))


def by_timestamp(allowed: Optional[int], *, fitting: bool) -> Tuple[Instruction, ...]:
    """For a TCP socket: pass the segments that fit, or those that do not.

    One without TSopt fits. One with it does only if its TSval is `allowed` (None: never). TSopt is looked for where
    Linux writes it: behind MSS and two more bytes in a SYN, behind two NOPs elsewhere (tcp_options_write() in
    net/ipv4/tcp_output.c).
    """
    fits, other = (_ALL, 0) if fitting else (0, _ALL)
    judged = (0x05, 0, 0, 1) if allowed is None else (0x15, 0, 1, allowed)
    return (
        (0x30, 0, 0, 12),  # A = data offset
        (0x54, 0, 0, 0xF0),
        (0x35, 0, 10, 8 << 4),  # below 32 bytes there is no room for TSopt
        (0x30, 0, 0, 13),  # A = flags
        (0x45, 0, 4, 2),  # SYN: go on; else four further
        (0x28, 0, 0, 26),
        (0x15, 0, 6, _TSOPT),
        (0x20, 0, 0, 28),  # A = TSval of a SYN
        (0x05, 0, 0, 3),
        (0x28, 0, 0, 22),
        (0x15, 0, 2, _TSOPT),
        (0x20, 0, 0, 24),  # A = TSval of any other segment
        judged,
        (0x06, 0, 0, fits),
        (0x06, 0, 0, other),
    )
