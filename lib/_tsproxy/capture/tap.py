"""A packet socket (packet(7)): what an interface receives and sends, and what was dropped.

An Ethernet's frames come whole: where the kernel takes the link-layer header away, it leaves some tags and not others, and
kernels differ in what they say follows. Of any other interface, and of all at once, packets begin with their IP header.

Knows the kernel's interface. Knows nothing of what is in a packet. Needs CAP_NET_RAW in the network namespace's user
namespace.
"""

from __future__ import annotations

import socket
import struct
import time
from contextlib import suppress
from typing import Any, NamedTuple, Optional, Sequence, Tuple

from _tsproxy.capture.records import ETHERNET, RAW
from _tsproxy.linux import bpf, uapi
from _tsproxy.linux.bpf import Instruction

_HEADERS = 512  # enough for TCP in two tunnels, one in the other; what is longer is read up to there
_BUFFER = 64 << 20
_STAMP = struct.Struct("@ll")  # struct timespec
_CONTROL = socket.CMSG_SPACE(_STAMP.size)
_MEMBERSHIP = struct.Struct("=iH10x")  # struct packet_mreq
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
        self._link = ETHERNET if interface and _is_ethernet(interface) else RAW
        kind = socket.SOCK_RAW if self._link == ETHERNET else socket.SOCK_DGRAM
        nothing_yet = 0  # before bind(2), which Python does not let name all interfaces
        protocol = nothing_yet if interface else socket.htons(uapi.ETH_P_ALL)
        self._socket = socket.socket(socket.AF_PACKET, kind | socket.SOCK_NONBLOCK, protocol)
        try:
            bpf.attach(self._socket, program)
            self._socket.setsockopt(socket.SOL_SOCKET, uapi.SO_TIMESTAMPNS, 1)
            self._enlarge()
            if interface:
                self._socket.bind((interface, uapi.ETH_P_ALL))
                self._see_what_is_for_others(socket.if_nametoindex(interface))
        except BaseException:
            self._socket.close()
            raise

    def _enlarge(self) -> None:
        """A burst shall fit. Without CAP_NET_ADMIN net.core.rmem_max bounds it."""
        for option in (socket.SO_RCVBUF, uapi.SO_RCVBUFFORCE):
            with suppress(OSError):
                self._socket.setsockopt(socket.SOL_SOCKET, option, _BUFFER)

    def _see_what_is_for_others(self, index: int) -> None:
        """A mirror port's frames are: promiscuous mode, until this socket is closed. Where it can't be had, do without."""
        with suppress(OSError):
            wanted = _MEMBERSHIP.pack(index, uapi.PACKET_MR_PROMISC)
            self._socket.setsockopt(uapi.SOL_PACKET, uapi.PACKET_ADD_MEMBERSHIP, wanted)

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
            return Packet(time.time_ns(), self._link, bytes(buffer), _HEADERS, unnamed, socket.PACKET_OUTGOING, 0)
        interface, _, kind, hardware, _ = address
        length = _HEADERS + 1 if flags & socket.MSG_TRUNC else size
        return Packet(_stamp(control), self._link, bytes(buffer[:size]), length, interface, kind, hardware)

    def stop(self) -> None:
        """Queue no more packets, and count no more drops. Those that are queued can still be received."""
        bpf.attach(self._socket, bpf.NOTHING)

    def drops(self) -> int:
        """How many packets were dropped so far because they came faster than they were read (PACKET_STATISTICS)."""
        found = self._socket.getsockopt(uapi.SOL_PACKET, uapi.PACKET_STATISTICS, _STATISTICS.size)
        self._drops += _STATISTICS.unpack(found)[1]
        return self._drops

    def close(self) -> None:
        """Stop watching."""
        self._socket.close()


def _is_ethernet(interface: str) -> bool:
    """Whether its frames have an Ethernet header; OSError if there is no such interface."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0) as asking:
        asking.bind((interface, 0))
        return asking.getsockname()[3] in (uapi.ARPHRD_ETHER, uapi.ARPHRD_LOOPBACK)


def _stamp(control: Sequence[Tuple[int, int, Any]]) -> int:
    """When the kernel saw the packet."""
    for level, kind, data in control:
        if (level, kind, len(data)) == (socket.SOL_SOCKET, uapi.SO_TIMESTAMPNS, _STAMP.size):
            seconds, rest = _STAMP.unpack(data)
            return int(seconds) * 1_000_000_000 + int(rest)
    return time.time_ns()
