"""A TCP address: as text for people, as a sockaddr for the kernel, packed into 24 bytes for messages and records."""

from __future__ import annotations

import socket
import struct
import sys
from typing import NamedTuple, Tuple, Union

SockAddr = Union[Tuple[str, int], Tuple[str, int, int, int]]

_PACKED = struct.Struct("=HHI16s")  # family, port, scope id, address
PACKED_SIZE = _PACKED.size
_PORT = slice(2, 4)  # where the port stands in it
_FAMILIES = {struct.pack("=H", family) for family in (socket.AF_INET, socket.AF_INET6)}
_MAPPED = b"\0" * 10 + b"\xff\xff"  # RFC 4291, section 2.5.5.2: an IPv4 client of an IPv6 listener


class Address(NamedTuple):
    """An IPv4 or IPv6 address and port. `ip` is bare: no brackets, no zone."""

    family: int
    ip: str
    port: int
    scope: int = 0

    @property
    def sockaddr(self) -> SockAddr:
        """The argument of bind(2) and connect(2), as the socket module has it."""
        if self.family == socket.AF_INET6:
            return (self.ip, self.port, 0, self.scope)
        return (self.ip, self.port)

    @property
    def zone(self) -> str:
        """The interface of a link-local address: its name, or its index if it has no name here; "" for other addresses."""
        if not self.scope:
            return ""
        try:
            return socket.if_indextoname(self.scope)
        except OSError:
            return str(self.scope)

    def __str__(self) -> str:
        """In the form of --target."""
        zone = f"%{self.zone}" if self.scope else ""
        return f"[{self.ip}{zone}]:{self.port}" if self.family == socket.AF_INET6 else f"{self.ip}:{self.port}"


def from_sockaddr(family: int, sockaddr: SockAddr) -> Address:
    """The Address of a sockaddr from accept(2) or getaddrinfo(3); an IPv4-mapped one as IPv4."""
    return unpack(pack(family, sockaddr))


def pack(family: int, sockaddr: SockAddr) -> bytes:
    """24 bytes for unpack(). Of a zone ("fe80::1%eth0") the scope id is kept, not the name."""
    ip, port = sockaddr[0], sockaddr[1]
    if family == socket.AF_INET:
        return _PACKED.pack(family, port, 0, socket.inet_aton(ip))
    raw = socket.inet_pton(socket.AF_INET6, ip.partition("%")[0])
    if raw.startswith(_MAPPED):
        return _PACKED.pack(socket.AF_INET, port, 0, raw[12:])
    return _PACKED.pack(family, port, sockaddr[3] if len(sockaddr) == 4 else 0, raw)


def unpack(packed: bytes) -> Address:
    """The Address in 24 bytes from pack()."""
    family, port, scope, raw = _PACKED.unpack(packed)
    return Address(family, socket.inet_ntop(family, raw if family == socket.AF_INET6 else raw[:4]), port, scope)


def ip_and_port(packed: bytes) -> Tuple[str, int]:
    """`ip` and `port` of the Address in 24 bytes, without making one."""
    family, port, _, raw = _PACKED.unpack(packed)
    return socket.inet_ntop(family, raw if family == socket.AF_INET6 else raw[:4]), port


def is_packed(data: bytes) -> bool:
    """Whether these 24 bytes can be from pack()."""
    return data[: _PORT.start] in _FAMILIES


def family_of(packed: bytes) -> int:
    """AF_INET or AF_INET6 of a packed address."""
    return int.from_bytes(packed[: _PORT.start], sys.byteorder)


def without_port(packed: bytes) -> bytes:
    """A packed address without its port: family, zone and address, the same for all connections of one client address."""
    return packed[: _PORT.start] + packed[_PORT.stop :]


def raw_ip(packed: bytes) -> Tuple[int, int]:
    """(family, address as an integer) of a packed address, to compare with an access list."""
    family, _, _, raw = _PACKED.unpack(packed)
    return family, int.from_bytes(raw if family == socket.AF_INET6 else raw[:4], "big")
