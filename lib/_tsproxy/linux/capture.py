"""A look at the segments that leave this host, behind everything that could still change them: an AF_PACKET socket.

The tap stands behind the output hooks of the packet filter and behind the egress hooks of the interface (packet(7)), so
it shows what the interface is given. It sees each interface that a packet goes through, e.g. a VLAN and its parent.
"""

from __future__ import annotations

import socket
import struct
from typing import Collection, Iterator, List, NamedTuple, Optional, Tuple

from _tsproxy.linux import bpf
from _tsproxy.linux.addresses import Address
from _tsproxy.linux.bpf import Instruction
from _tsproxy.linux.printable import printable

_ETH_P_ALL = 0x0003  # include/uapi/linux/if_ether.h; a tap for one protocol alone does not see what is sent
_PACKET_OUTGOING = 4  # include/uapi/linux/if_packet.h
_HEADERS = 256
_TCP = 6
_SYN, _ACK = 0x02, 0x10
_MOST_PORTS = 200  # a conditional jump of classic BPF reaches 255 instructions


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
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, socket.htons(_ETH_P_ALL))
        try:
            bpf.attach(self._socket, _to_ports(sorted(ports)[:_MOST_PORTS]))
        except BaseException:
            self._socket.close()
            raise

    def take(self) -> List[Seen]:
        """The segments that left since the last time."""
        return list(self._take())

    def _take(self) -> Iterator[Seen]:
        while True:
            buffer, size = bytearray(_HEADERS), _HEADERS
            try:
                size, (interface, _, kind, *_) = self._socket.recvfrom_into(buffer)
            except UnicodeDecodeError:  # Python's own, of a name that is no UTF-8; the packet is in the buffer
                interface, kind = "an interface whose name is no UTF-8", _PACKET_OUTGOING
            except BlockingIOError:
                return
            except OSError:
                return  # an interface went down (ENETDOWN): what had come is taken
            seen = _seen(printable(interface), bytes(buffer[:size]))
            if kind == _PACKET_OUTGOING and seen:
                yield seen

    def close(self) -> None:
        """Stop watching."""
        self._socket.close()


def _to_ports(ports: List[int]) -> Tuple[Instruction, ...]:
    """TCP over IPv4 or IPv6 to one of the ports, so that a busy host's other packets never reach Python.

    The packet starts with its IP header; our own segments have no IPv6 extension headers and are not fragmented.
    """
    no = len(ports) + 7  # how far the refusal is from the fifth instruction
    compared = [(0x15, len(ports) - place, 0, port) for place, port in enumerate(ports)]
    return (
        (0x30, 0, 0, 0),  # A = version and header length
        (0x54, 0, 0, 0xF0),
        (0x15, 0, 5, 0x40),  # IPv4, or go on at the IPv6 test
        (0x30, 0, 0, 9),  # A = protocol
        (0x15, 0, no, _TCP),
        (0xB1, 0, 0, 0),  # X = 4 * header length
        (0x48, 0, 0, 2),  # A = destination port behind X
        (0x05, 0, 0, 4),
        (0x15, 0, no - 4, 0x60),
        (0x30, 0, 0, 6),  # A = next header
        (0x15, 0, no - 6, _TCP),
        (0x28, 0, 0, 42),  # A = destination port
        *compared,
        (0x06, 0, 0, 0),
        (0x06, 0, 0, _HEADERS),
    )


def _seen(interface: str, headers: bytes) -> Optional[Seen]:
    """The segment, or None for what is cut short."""
    version = headers[0] >> 4 if headers else 0
    at, size, family = (12, 4, socket.AF_INET) if version == 4 else (8, 16, socket.AF_INET6)
    tcp = (headers[0] & 15) * 4 if version == 4 else 40
    if len(headers) < tcp + 14:
        return None
    ips = [socket.inet_ntop(family, headers[start : start + size]) for start in (at, at + size)]
    source, destination = struct.unpack_from("!HH", headers, tcp)
    return Seen(interface, Address(family, ips[0], source), Address(family, ips[1], destination), headers[tcp + 13], headers)
