"""A packet socket (packet(7)): what an interface receives and sends, without its link-layer header, and what was dropped.

Knows the kernel's interface. Knows nothing of what is in a packet. Needs CAP_NET_RAW in the network namespace's user
namespace.
"""

from __future__ import annotations

import socket
import struct
import time
from contextlib import suppress
from typing import Any, NamedTuple, Optional, Sequence, Tuple

from _tsproxy.capture.records import COOKED, RAW
from _tsproxy.host import bpf, linux
from _tsproxy.host.bpf import Instruction

_HEADERS = 512  # enough for TCP in two tunnels, one in the other; what is longer is read up to there
_BUFFER = 64 << 20
_STAMP = struct.Struct("@ll")  # struct timespec
_CONTROL = socket.CMSG_SPACE(_STAMP.size)
_STATISTICS = struct.Struct("=II")  # packets, drops: since the last time that was asked


class Packet(NamedTuple):
    """The beginning of a packet; `length` is greater than that of `data` where there is more of it."""

    time_ns: int
    link: int
    data: bytes
    length: int
    interface: str
    kind: int  # socket.PACKET_OUTGOING and its like
    hardware: int  # ARPHRD_*


class Tap:
    """Open from its creation on, with a filter that the kernel runs before anything is queued."""

    def __init__(self, program: Sequence[Instruction], interface: Optional[str] = None) -> None:
        """One interface, or all. OSError: EPERM without the right to, ENODEV if there is no such interface."""
        self._drops = 0
        nothing_yet = 0  # before bind(2), which Python does not let name all interfaces
        protocol = nothing_yet if interface else socket.htons(linux.ETH_P_ALL)
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, protocol)
        try:
            bpf.attach(self._socket, program)
            self._socket.setsockopt(socket.SOL_SOCKET, linux.SO_TIMESTAMPNS, 1)
            self._enlarge()
            if interface:
                self._socket.bind((interface, linux.ETH_P_ALL))
        except BaseException:
            self._socket.close()
            raise

    def _enlarge(self) -> None:
        """A burst shall fit. Without CAP_NET_ADMIN net.core.rmem_max bounds it."""
        for option in (socket.SO_RCVBUF, linux.SO_RCVBUFFORCE):
            with suppress(OSError):
                self._socket.setsockopt(socket.SOL_SOCKET, option, _BUFFER)

    def fileno(self) -> int:
        """For poll(2)."""
        return self._socket.fileno()

    def receive(self) -> Optional[Packet]:
        """The next packet, None if there is none. OSError (ENETDOWN) once for each time that an interface went down."""
        buffer = bytearray(_HEADERS)
        try:
            size, control, flags, address = self._socket.recvmsg_into([buffer], _CONTROL)
        except BlockingIOError:
            return None
        except UnicodeDecodeError:  # Python's own, of a name that is no UTF-8; the packet is in the buffer
            unnamed = "an interface whose name is no UTF-8"
            return Packet(time.time_ns(), RAW, bytes(buffer), _HEADERS, unnamed, socket.PACKET_OUTGOING, 0)
        interface, protocol, kind, hardware, _ = address
        length = _HEADERS + 1 if flags & socket.MSG_TRUNC else size
        return Packet(_stamp(control), COOKED | protocol, bytes(buffer[:size]), length, interface, kind, hardware)

    def drops(self) -> int:
        """How many packets were dropped so far because they came faster than they were read (PACKET_STATISTICS)."""
        found = self._socket.getsockopt(linux.SOL_PACKET, linux.PACKET_STATISTICS, _STATISTICS.size)
        self._drops += _STATISTICS.unpack(found)[1]
        return self._drops

    def close(self) -> None:
        """Stop watching."""
        self._socket.close()


def _stamp(control: Sequence[Tuple[int, int, Any]]) -> int:
    """When the kernel saw the packet."""
    for level, kind, data in control:
        if (level, kind, len(data)) == (socket.SOL_SOCKET, linux.SO_TIMESTAMPNS, _STAMP.size):
            seconds, rest = _STAMP.unpack(data)
            return int(seconds) * 1_000_000_000 + int(rest)
    return time.time_ns()
