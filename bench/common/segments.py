"""TCP segments and ICMP errors as bytes (RFC 9293, RFC 7323, RFC 792, RFC 4443): made as one likes them, and read.

A segment is made with whatever it is given, right or wrong, but for lengths and checksums, without which no kernel would
look at it. What is read comes from a capture. Knows bytes; knows nothing of sockets, nor of what tsproxy reads itself.
"""

from __future__ import annotations

import socket
import struct
from typing import Iterator, NamedTuple, Optional, Tuple

FIN, SYN, RST, PSH, ACK, URG, ECE, CWR = 1, 2, 4, 8, 16, 32, 64, 128
NOP, TIMESTAMP = 1, 8  # option kinds
_TCP, _ICMP, _ICMPV6 = 6, 1, 58
_LETTERS = "FSRPAUEW"
_MOST_OPTIONS = 40

End = Tuple[str, int]


def mss(size: int = 1460) -> bytes:
    """Maximum segment size."""
    return struct.pack("!BBH", 2, 4, size)


def timestamp(tsval: int, tsecr: int = 0) -> bytes:
    """TSopt behind two NOPs, as Linux aligns it."""
    return struct.pack("!BBBBII", NOP, NOP, TIMESTAMP, 10, tsval & 0xFFFFFFFF, tsecr & 0xFFFFFFFF)


class Segment(NamedTuple):
    """One TCP segment. `size` is that of its payload, of which a capture keeps only the beginning, or nothing."""

    source: End
    target: End
    flags: int
    sequence: int
    acknowledged: int
    window: int = 65535
    options: bytes = b""
    payload: bytes = b""
    size: int = 0
    urgent: int = 0
    dscp: int = 0

    @property
    def stamps(self) -> Iterator[Tuple[Optional[int], Optional[int]]]:
        """(TSval, TSecr) of each TSopt; (None, None) for one that is malformed, and where options can't be read on."""
        at, options = 0, self.options
        while at < len(options) and options[at]:
            if options[at] == NOP:
                at += 1
                continue
            length = options[at + 1] if at + 1 < len(options) else 0
            if length < 2 or at + length > len(options):
                yield None, None
                return
            if options[at] == TIMESTAMP:
                yield struct.unpack_from("!II", options, at + 2) if length == 10 else (None, None)
            at += length

    @property
    def tsval(self) -> Optional[int]:
        """TSval of the first TSopt."""
        return next(self.stamps, (None, None))[0]

    @property
    def span(self) -> int:
        """How many sequence numbers it takes."""
        return self.size + bool(self.flags & SYN) + bool(self.flags & FIN)

    def __str__(self) -> str:
        """For people: ends, flags, numbers, and the options in hexadecimal."""
        letters = "".join(letter for bit, letter in enumerate(_LETTERS) if self.flags >> bit & 1) or "-"
        ends = " > ".join(f"{host}.{port}" for host, port in (self.source, self.target))
        numbers = f"seq {self.sequence} ack {self.acknowledged} win {self.window} len {self.size}"
        dscp = f" dscp {self.dscp}" if self.dscp else ""
        return f"{ends} [{letters}] {numbers} options {self.options.hex() or 'none'}{dscp}"


def packed(segment: Segment) -> bytes:
    """The IP packet, checksums included; the options are filled up with zeros to whole words and cut at 40 bytes."""
    family = family_of(segment.source[0])
    source, target = (socket.inet_pton(family, end[0]) for end in (segment.source, segment.target))
    options = segment.options[:_MOST_OPTIONS]
    options += bytes(-len(options) % 4)
    numbers = struct.pack("!HHII", segment.source[1], segment.target[1], segment.sequence, segment.acknowledged)
    rest = struct.pack("!BBHHH", (5 + len(options) // 4) << 4, segment.flags, segment.window, 0, segment.urgent)
    body = b"".join((numbers, rest, options, segment.payload))
    return _headed(family, source, target, _TCP, _summed(body, 16, source + target + struct.pack("!II", _TCP, len(body))))


def icmp_error(kind: int, code: int, about: bytes, rest: int = 0) -> bytes:
    """An ICMP message from whom the packet `about` went to; `rest` is the second word (an MTU, a gateway, a pointer)."""
    six = about[0] >> 4 == 6
    body = struct.pack("!BBHI", kind, code, 0, rest) + about[:120]
    if not six:
        return _headed(socket.AF_INET, about[16:20], about[12:16], _ICMP, _summed(body, 2, b""))
    source, target = about[24:40], about[8:24]
    return _headed(
        socket.AF_INET6, source, target, _ICMPV6, _summed(body, 2, source + target + struct.pack("!II", len(body), 58))
    )


def parsed(packet: bytes) -> Optional[Segment]:
    """The segment in an IP packet; None for what is no TCP, or a later fragment. A truncated header reads as it stands."""
    six = packet[0] >> 4 == 6
    if packet[6 if six else 9] != _TCP or (not six and struct.unpack_from("!H", packet, 6)[0] & 0x1FFF):
        return None
    family, width, first = (socket.AF_INET6, 16, 8) if six else (socket.AF_INET, 4, 12)
    start = 40 if six else (packet[0] & 15) * 4
    end = struct.unpack_from("!H", packet, 4 if six else 2)[0] + (40 if six else 0)
    sport, dport, sequence, acknowledged, offset, flags, window, _, urgent = struct.unpack_from("!HHIIBBHHH", packet, start)
    source, target = (socket.inet_ntop(family, packet[at : at + width]) for at in (first, first + width))
    payload = start + (offset >> 4) * 4
    return Segment(
        (source, sport),
        (target, dport),
        flags,
        sequence,
        acknowledged,
        window,
        packet[start + 20 : payload],
        packet[payload:end],
        end - payload,
        urgent,
        (struct.unpack_from("!H", packet)[0] >> (6 if six else 2)) & 63,
    )


def family_of(host: str) -> socket.AddressFamily:
    """Of an address in its usual spelling."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _headed(family: int, source: bytes, target: bytes, protocol: int, body: bytes) -> bytes:
    if family == socket.AF_INET6:
        return struct.pack("!IHBB", 6 << 28, len(body), protocol, 64) + source + target + body
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 0, 0x4000, 64, protocol, 0) + source + target
    return _summed(header, 10, b"") + body


def _summed(data: bytes, at: int, pseudo: bytes) -> bytes:
    """`data` with the Internet checksum (RFC 1071) of itself and the pseudo header at that place."""
    every = pseudo + data + bytes(len(data) & 1)
    total = sum(struct.unpack(f"!{len(every) // 2}H", every))
    total = (total & 0xFFFF) + (total >> 16)
    total += total >> 16
    return data[:at] + struct.pack("!H", ~total & 0xFFFF) + data[at + 2 :]
