"""Captures made by hand: TCP segments with or without TSopt, written as pcap with nanoseconds."""

from __future__ import annotations

import socket
import struct
from pathlib import Path
from typing import Iterable, List, NamedTuple, Optional, Sequence, Tuple

End = Tuple[str, int]
SECOND = 1_000_000_000
BEGIN = 1_795_600_000 * SECOND  # some time in 2026
SYN, ACK, FIN = 2, 16, 1


class Segment(NamedTuple):
    """One TCP segment; `at` in nanoseconds since 1970."""

    at: int
    source: End
    destination: End
    flags: int = ACK
    sequence: int = 1
    tsval: Optional[int] = None

    def frame(self) -> bytes:
        options = b"" if self.tsval is None else struct.pack("!BBBBII", 1, 1, 8, 10, self.tsval, 0)
        ports = struct.pack("!HHII", self.source[1], self.destination[1], self.sequence, 1)
        tcp = ports + struct.pack("!BBHHH", (20 + len(options)) // 4 << 4, self.flags, 1000, 0, 0) + options
        if ":" in self.source[0]:
            ends = b"".join(socket.inet_pton(socket.AF_INET6, end[0]) for end in (self.source, self.destination))
            return _ETHERNET + b"\x86\xdd" + struct.pack("!IHBB", 6 << 28, len(tcp), 6, 64) + ends + tcp
        ends = b"".join(socket.inet_aton(end[0]) for end in (self.source, self.destination))
        return _ETHERNET + b"\x08\x00" + struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(tcp), 0, 0, 64, 6, 0) + ends + tcp


_ETHERNET = b"\2" * 6 + b"\4" * 6


def flow(
    source: End, destination: End, begin: int = BEGIN, tsvals: Sequence[Optional[int]] = (None,) * 4, sequence: int = 100
) -> List[Segment]:
    """A SYN and what follows it, a second apart, each with its TSval or none."""
    return [
        Segment(begin + place * SECOND, source, destination, ACK if place else SYN, sequence + place, tsval)
        for place, tsval in enumerate(tsvals)
    ]


def write(path: Path, segments: Iterable[Segment]) -> Path:
    """The segments in the order of their time."""
    frames = [(segment.at, segment.frame()) for segment in sorted(segments, key=lambda segment: segment.at)]
    head = struct.pack("<IHHiIII", 0xA1B23C4D, 2, 4, 0, 0, 65535, 1)
    records = [struct.pack("<IIII", at // SECOND, at % SECOND, len(frame), len(frame)) + frame for at, frame in frames]
    path.write_bytes(head + b"".join(records))
    return path
