"""A look at the SYNs that leave this host, behind everything that could still change them: an AF_PACKET socket.

The tap stands behind the output hooks of the packet filter and behind the egress hooks of the interface (packet(7)), so
it shows what the interface is given. It sees each interface that a packet goes through, e.g. a VLAN and its parent.
"""

from __future__ import annotations

import socket
import struct
from array import array
from typing import Iterator, List, NamedTuple, Optional, Tuple

from _tsproxy.host.addresses import Address
from _tsproxy.host.printable import printable

_ETH_P_ALL = 0x0003  # include/uapi/linux/if_ether.h; a tap for one protocol alone does not see what is sent
_PACKET_OUTGOING = 4  # include/uapi/linux/if_packet.h
_SO_ATTACH_FILTER = 26  # include/uapi/asm-generic/socket.h
_HEADERS = 256
_TCP = 6

# SYN without ACK over IPv4 or IPv6, as classic BPF (include/uapi/linux/bpf_common.h), so that a busy host's other packets
# never reach Python: (code, jump if true, jump if false, k). The packet starts with its IP header.
_SYN_ONLY: Tuple[Tuple[int, int, int, int], ...] = (
    (0x30, 0, 0, 0),  # A = version and header length
    (0x54, 0, 0, 0xF0),
    (0x15, 0, 5, 0x40),  # IPv4, or go on at the IPv6 test
    (0x30, 0, 0, 9),  # A = protocol
    (0x15, 0, 9, _TCP),
    (0xB1, 0, 0, 0),  # X = 4 * header length
    (0x50, 0, 0, 13),  # A = TCP flags behind X
    (0x05, 0, 0, 4),
    (0x15, 0, 5, 0x60),  # IPv6; our own SYN has no extension headers
    (0x30, 0, 0, 6),  # A = next header
    (0x15, 0, 3, _TCP),
    (0x30, 0, 0, 53),  # A = TCP flags
    (0x54, 0, 0, 0x12),
    (0x15, 1, 0, 0x02),  # SYN, and not ACK
    (0x06, 0, 0, 0),
    (0x06, 0, 0, _HEADERS),
)


class Seen(NamedTuple):
    """A SYN on its way out: through which interface, from and to where, and its IP and TCP header."""

    interface: str
    source: Address
    destination: Address
    headers: bytes


class Capture:
    """Watches from its creation on. Needs CAP_NET_RAW in the network namespace's user namespace."""

    def __init__(self) -> None:
        """OSError (EPERM without the right) if the host does not let us watch."""
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, socket.htons(_ETH_P_ALL))
        try:
            _attach(self._socket)
        except BaseException:
            self._socket.close()
            raise

    def take(self) -> List[Seen]:
        """The SYNs that left since the last time."""
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
            headers = bytes(buffer[:size])
            ends = _ends(headers)
            if kind == _PACKET_OUTGOING and ends:
                yield Seen(printable(interface), *ends, headers)

    def close(self) -> None:
        """Stop watching."""
        self._socket.close()


def _attach(sock: socket.socket) -> None:
    """Let the kernel keep all but SYNs away. struct sock_fprog holds a pointer, and the kernel copies what it points to."""
    program = array("B", b"".join(struct.pack("=HBBI", *instruction) for instruction in _SYN_ONLY))
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HP", len(_SYN_ONLY), program.buffer_info()[0]))


def _ends(headers: bytes) -> Optional[Tuple[Address, Address]]:
    """Source and destination, or None for what is cut short."""
    version = headers[0] >> 4 if headers else 0
    at, size, family = (12, 4, socket.AF_INET) if version == 4 else (8, 16, socket.AF_INET6)
    ports = (headers[0] & 15) * 4 if version == 4 else 40
    if len(headers) < ports + 4:
        return None
    ips = [socket.inet_ntop(family, headers[start : start + size]) for start in (at, at + size)]
    source, destination = struct.unpack_from("!HH", headers, ports)
    return Address(family, ips[0], source), Address(family, ips[1], destination)
