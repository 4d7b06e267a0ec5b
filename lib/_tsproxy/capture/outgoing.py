"""A look at the segments that leave this host, behind everything that could still change them.

A packet socket stands behind the output hooks of the packet filter and behind the egress hooks of the interface
(packet(7)), so it shows what the interface is given. It sees each interface that a packet goes through, e.g. a VLAN and
its parent.
"""

from __future__ import annotations

import socket
import struct
from contextlib import suppress
from typing import Collection, Iterator, List, NamedTuple, Optional

from _tsproxy.capture import filters, layers
from _tsproxy.capture.layers import Dissector
from _tsproxy.capture.tap import Packet, Tap
from _tsproxy.linux.addresses import Address
from _tsproxy.linux.printable import printable

_FLAGS = 13  # their byte in a TCP header
_SYN, _ACK = 0x02, 0x10


class Seen(NamedTuple):
    """A segment on its way out: through which interface, from and to where, its flags, and its IP and TCP header."""

    interface: str
    source: Address
    destination: Address
    flags: int
    headers: bytes

    @property
    def is_syn(self) -> bool:
        """Whether it opens a connection."""
        return self.flags & (_SYN | _ACK) == _SYN


class Capture:
    """Watches from its creation on. Needs CAP_NET_RAW in the network namespace's user namespace."""

    def __init__(self, ports: Collection[int]) -> None:
        """Segments to these ports. OSError (EPERM without the right) if the host does not let us watch."""
        wanted = sorted(ports)
        self._taps: List[Tap] = []
        self._dissector = Dissector()
        try:
            for at in range(0, len(wanted), filters.MOST_PORTS):
                self._taps.append(Tap(filters.tcp_to(wanted[at : at + filters.MOST_PORTS])))
        except BaseException:
            self.close()
            raise

    def take(self) -> List[Seen]:
        """The segments that left since the last time."""
        return [seen for tap in self._taps for seen in self._take(tap)]

    def _take(self, tap: Tap) -> Iterator[Seen]:
        with suppress(OSError):  # an interface went down (ENETDOWN): what had come is taken
            while True:
                packet = tap.receive()
                if packet is None:
                    return
                seen = self._seen(packet)
                if packet.kind == socket.PACKET_OUTGOING and seen:
                    yield seen

    def _seen(self, packet: Packet) -> Optional[Seen]:
        """The segment, or None for what is none, or is cut short."""
        frame = self._dissector
        answer = frame.find(packet.link, packet.data, packet.length)
        if answer != layers.TCP or frame.at + _FLAGS >= len(frame.data):
            return None
        half = len(frame.addresses) // 2
        family = socket.AF_INET if half == 4 else socket.AF_INET6
        ips = [socket.inet_ntop(family, frame.addresses[at : at + half]) for at in (0, half)]
        source, destination = struct.unpack("!HH", frame.flow[-4:])
        ends = Address(family, ips[0], source), Address(family, ips[1], destination)
        return Seen(printable(packet.interface), *ends, frame.data[frame.at + _FLAGS], frame.data)

    def lost(self) -> int:
        """How many packets to these ports were dropped so far, in either direction, because the buffer was full."""
        return sum(tap.drops() for tap in self._taps)

    def close(self) -> None:
        """Stop watching."""
        for tap in self._taps:
            tap.close()
