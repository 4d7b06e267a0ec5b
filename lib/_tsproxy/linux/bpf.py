"""Classic BPF (include/uapi/linux/filter.h): small programs that the kernel runs on each packet for a socket.

The program of a packet socket gets the packet from the IP header on. That of a TCP socket gets the segment from the TCP header
on, before TCP handles it (tcp_filter() in net/ipv4/tcp_ipv4.c): the socket never receives a segment that it drops. To attach to
a TCP socket recent kernels require CAP_NET_ADMIN (seen on 6.18); to make a packet socket all require CAP_NET_RAW.
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


NOTHING: Sequence[Instruction] = ((0x06, 0, 0, 0),)  # passes


def attach(sock: SocketType, program: Sequence[Instruction]) -> None:
    """Attach the program (SO_ATTACH_FILTER), instead of any before it. struct sock_fprog points to it; the kernel copies it."""
    code = array("B", b"".join(struct.pack("=HBBI", *instruction) for instruction in program))
    sock.setsockopt(socket.SOL_SOCKET, uapi.SO_ATTACH_FILTER, struct.pack("@HP", len(program), code.buffer_info()[0]))


def by_timestamp(allowed: Optional[int], *, fitting: bool) -> Tuple[Instruction, ...]:
    """A program for a TCP socket: pass the segments that fit, or those that do not.

    A segment without TSopt fits. One with TSopt fits only if its TSval is `allowed` (None: never). TSopt is expected where
    Linux writes it: after MSS and two more bytes in a SYN, after two NOPs elsewhere (tcp_options_write() in
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
