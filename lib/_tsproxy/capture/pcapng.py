"""Frames of a pcapng file: sections in either byte order, each with interfaces of its own (draft-ietf-opsawg-pcapng).

Knows blocks and their options. Knows nothing of what is in a frame.
"""

from __future__ import annotations

import struct
from typing import Dict, Iterator, List, NamedTuple, Tuple

from _tsproxy.capture.records import LATEST, LONGEST, NO_INTERFACE, NO_PACKET, Frame, Frames, NoCapture, Notes
from _tsproxy.capture.stream import Stream

MAGIC = b"\x0a\x0d\x0d\x0a"  # the type of a section header, the same in either byte order
_SECTION, _INTERFACE, _OLD_PACKET, _SIMPLE_PACKET, _STATISTICS, _PACKET = 0x0A0D0D0A, 1, 2, 3, 5, 6
_ORDERS = {b"\x4d\x3c\x2b\x1a": "<", b"\x1a\x2b\x3c\x4d": ">"}
_LONGEST_BLOCK = LONGEST + (1 << 16)  # a frame, with as much as that in options
_RESOLUTION, _OFFSET = 9, 14  # if_tsresol, if_tsoffset
_INTERFACE_DROPS, _SYSTEM_DROPS = 5, 7  # isb_ifdrop, isb_osdrop
_PACKET_DROPS = 4  # epb_dropcount
_UNKNOWN = 0xFFFF  # drops of an old packet block
# systemd's journal, sysdig's events, custom blocks: no packets, but Wireshark numbers them among the frames (tshark 4.0)
_NUMBERED = frozenset({0x009, 0x204, 0x208, 0x216, 0x221, 0x222, 0x223, 0x0BAD, 0x40000BAD})


class _Interface(NamedTuple):
    """How the frames of one interface are to be read."""

    link: int
    snap_length: int
    per_second: int  # units of its clock
    offset_ns: int

    def time_ns(self, high: int, low: int) -> int:
        """ns since 1970 of a time in the interface's own units."""
        time_ns = (high << 32 | low) * 1_000_000_000 // self.per_second + self.offset_ns
        return max(-LATEST, min(time_ns, LATEST))


def frames(stream: Stream, data: bytes, notes: Notes) -> Frames:
    """Each frame of a file whose first bytes are `data`. Where it is cut or damaged it ends, and the notes say so."""
    return _Reader(stream, data, notes).frames()


class _Reader:
    """Block after block, with what the section has said so far."""

    def __init__(self, stream: Stream, data: bytes, notes: Notes) -> None:
        self._stream, self._data, self._at, self._notes = stream, data, 0, notes
        self._order = ""
        self._section = 0
        self._interfaces: List[_Interface] = []

    def frames(self) -> Frames:
        """The frames of all sections."""
        while self._has(12):
            kind = self._data[self._at : self._at + 4]
            if kind == MAGIC and not self._begin_section():
                return
            number, size = struct.unpack_from(self._order + "II", self._data, self._at)
            if size < 12 or size % 4:
                self._notes.problem = f"a block of {size} bytes: it is damaged from there on"
                return
            yield from self._block(number, size)
            if self._notes.problem:
                return
        self._notes.problem = "it is cut in its last block" if self._at < len(self._data) else ""

    def _has(self, size: int) -> bool:
        if self._at + size > len(self._data):
            self._data, self._at = self._stream.extend(self._data, self._at, size), 0
        return self._at + size <= len(self._data)

    def _begin_section(self) -> bool:
        """The byte order, which is told behind the block's length. False if it is not told."""
        order = _ORDERS.get(self._data[self._at + 8 : self._at + 12])
        if order is None:
            if not self._order:
                raise NoCapture("a pcapng file without a byte order")
            self._notes.problem = "a section without a byte order: it is damaged from there on"
            return False
        self._order, self._interfaces = order, []
        self._section += 1
        return True

    def _block(self, number: int, size: int) -> Frames:
        """The frame in the block of that type and length, if there is one."""
        if size > _LONGEST_BLOCK:
            yield from self._pass_over(number, size)
            return
        if not self._has(size):
            self._notes.problem = "it is cut in its last block"
            return
        start, end = self._at + 8, self._at + size - 4
        if struct.unpack_from(self._order + "I", self._data, end)[0] != size:
            self._notes.problem = "a block with two lengths: it is damaged from there on"
            return
        self._at += size
        try:
            yield from self._content(number, start, end)
        except (struct.error, IndexError):
            self._notes.problem = f"a block of type {number} that contradicts itself: it is damaged from there on"

    def _content(self, number: int, start: int, end: int) -> Frames:
        if number == _PACKET:
            yield self._packet(start, end)
        elif number == _SIMPLE_PACKET:
            yield self._simple_packet(start, end)
        elif number == _OLD_PACKET:
            yield self._old_packet(start, end)
        elif number == _INTERFACE:
            self._interfaces.append(self._interface(start, end))
        elif number == _STATISTICS:
            self._statistics(start, end)
        elif number in _NUMBERED:
            yield 0, NO_PACKET, b"", 0

    def _pass_over(self, number: int, size: int) -> Frames:
        """A block that is too long for a packet."""
        if number in {_PACKET, _SIMPLE_PACKET, _OLD_PACKET}:
            self._notes.problem = f"a packet block of {size} bytes: it is damaged from there on"
            return
        at = self._at + size
        while at > len(self._data):
            at -= len(self._data)
            self._data = self._stream.extend(b"", 0, 1)
            if not self._data:
                self._notes.problem = "it is cut in its last block"
                return
        self._at = at
        if number in _NUMBERED:
            yield 0, NO_PACKET, b"", 0

    # Blocks, each from `start` up to `end`

    def _packet(self, start: int, end: int) -> Frame:
        """Enhanced Packet Block."""
        which, high, low, size, length = struct.unpack_from(self._order + "IIIII", self._data, start)
        at = start + 20
        after = at + size
        if after > end:
            raise IndexError
        if after + 4 <= end:
            self._drops_of_packet(which, at + (size + 3) // 4 * 4, end)
        return self._frame(which, high, low, self._data[at:after], length)

    def _drops_of_packet(self, which: int, start: int, end: int) -> None:
        drops = self._options(start, end).get(_PACKET_DROPS)
        if drops is not None and len(drops) == 8:
            self._notes.lost((self._section, which), struct.unpack(self._order + "Q", drops)[0])

    def _simple_packet(self, start: int, end: int) -> Frame:
        """No interface but the first one, no time, and no length but its own and the snap length."""
        length = struct.unpack_from(self._order + "I", self._data, start)[0]
        snap_length = self._interfaces[0].snap_length if self._interfaces else 0
        size = min(length, snap_length or length, end - start - 4)
        link = self._interfaces[0].link if self._interfaces else NO_INTERFACE
        return 0, link, self._data[start + 4 : start + 4 + size], length

    def _old_packet(self, start: int, end: int) -> Frame:
        """Packet Block, which newer programs do not write any more."""
        which, drops, high, low, size, length = struct.unpack_from(self._order + "HHIIII", self._data, start)
        if start + 20 + size > end:
            raise IndexError
        if drops != _UNKNOWN:
            self._notes.lost((self._section, which), drops)
        return self._frame(which, high, low, self._data[start + 20 : start + 20 + size], length)

    def _frame(self, which: int, high: int, low: int, data: bytes, length: int) -> Frame:
        if which >= len(self._interfaces):
            return 0, NO_INTERFACE, data, length
        interface = self._interfaces[which]
        return interface.time_ns(high, low), interface.link, data, length

    def _interface(self, start: int, end: int) -> _Interface:
        link, snap_length = struct.unpack_from(self._order + "HxxI", self._data, start)
        options = self._options(start + 8, end)
        resolution = options.get(_RESOLUTION, b"\x06")[:1] or b"\x06"
        base, power = (2, resolution[0] & 0x7F) if resolution[0] & 0x80 else (10, resolution[0])
        offset = options.get(_OFFSET, b"")
        offset_s = struct.unpack(self._order + "q", offset)[0] if len(offset) == 8 else 0
        return _Interface(link, snap_length, base**power, offset_s * 1_000_000_000)

    def _statistics(self, start: int, end: int) -> None:
        which = struct.unpack_from(self._order + "I", self._data, start)[0]
        options = self._options(start + 12, end)
        counts = [options[code] for code in (_INTERFACE_DROPS, _SYSTEM_DROPS) if len(options.get(code, b"")) == 8]
        lost = sum(struct.unpack(self._order + "Q", count)[0] for count in counts)
        self._notes.lost_in_all((self._section, which), lost)

    def _options(self, start: int, end: int) -> Dict[int, bytes]:
        """Code -> value; where one is there several times, the first."""
        found: Dict[int, bytes] = {}
        for code, value in self._each_option(start, end):
            found.setdefault(code, value)
        return found

    def _each_option(self, start: int, end: int) -> Iterator[Tuple[int, bytes]]:
        at = start
        while at + 4 <= end:
            code, size = struct.unpack_from(self._order + "HH", self._data, at)
            if code == 0 or at + 4 + size > end:
                return
            yield code, self._data[at + 4 : at + 4 + size]
            at += 4 + (size + 3) // 4 * 4
