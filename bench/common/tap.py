"""A raw end of a wire: each packet that comes, in order, with the kernel's own time, and any packet sent (packet(7)).

Made in the namespace that the interface is in. Knows packets as bytes; knows nothing of what they say.
"""

from __future__ import annotations

import errno
import fcntl
import socket
import struct
from typing import NamedTuple, Optional

_ETH_P_ALL = 3  # include/uapi/linux/if_ether.h
_ETHERTYPES = {4: 0x0800, 6: 0x86DD}
_SOL_PACKET, _PACKET_STATISTICS, _PACKET_IGNORE_OUTGOING = 263, 6, 23  # include/uapi/linux/if_packet.h
_SO_RCVBUFFORCE, _SO_TIMESTAMPNS = 33, 35  # include/uapi/asm-generic/socket.h
_SIOCGIFHWADDR = 0x8927  # include/uapi/linux/sockios.h
_NO_ROOM = frozenset({errno.EAGAIN, errno.ENOBUFS})
_ROOM = 512 << 20
_TIMESPEC = struct.Struct("=qq")
SNAP = 2048


class Packet(NamedTuple):
    """What came, from its IP header on, and when, on CLOCK_REALTIME in ns."""

    data: bytes
    at_ns: int


class Tap:
    """Sees what comes in on one interface, and sends out of it. OSError (EPERM) without CAP_NET_RAW."""

    def __init__(self, interface: str, mac: bytes) -> None:
        """`mac` is of the other end, where all is sent to."""
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, 0)
        self._to = {version: (interface, kind, 0, 0, mac) for version, kind in _ETHERTYPES.items()}
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _ROOM)
        self._socket.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        self._socket.bind((interface, _ETH_P_ALL))

    def fileno(self) -> int:
        """For poll(2)."""
        return self._socket.fileno()

    def take(self) -> Optional[Packet]:
        """The next packet, cut to SNAP bytes; None if there is none now."""
        try:
            data, messages, _, _ = self._socket.recvmsg(SNAP, 64)
        except BlockingIOError:
            return None
        seconds, ns = _TIMESPEC.unpack(messages[0][2])
        return Packet(data, seconds * 10**9 + ns)

    def send(self, packet: bytes) -> None:
        """Put it on the wire. What the interface has no room for is lost, as on any wire."""
        try:
            self._socket.sendto(packet, self._to[packet[0] >> 4])
        except OSError as problem:
            if problem.errno not in _NO_ROOM:
                raise

    def drops(self) -> int:
        """How many packets the kernel had no room for since the last time this was asked."""
        return int(struct.unpack("II", self._socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))[1])

    def close(self) -> None:
        """See and send no more."""
        self._socket.close()


def mac_of(interface: str) -> bytes:
    """The hardware address of an interface of this thread's namespace (SIOCGIFHWADDR, netdevice(7))."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        return fcntl.ioctl(sock, _SIOCGIFHWADDR, struct.pack("16s24x", interface.encode()))[18:24]
