"""Flows: what each sender of each TCP connection was seen to send, counted segment by segment.

Memory grows with the flows and not with the segments: of a flow's TSvals 1,024 are kept at most, spread over all of it.
Knows TCP's flags and TSopt. Knows nothing of files' formats, of verdicts, or of what is shown.
"""

from __future__ import annotations

import socket
import struct
from array import array
from collections import Counter
from typing import Callable, Dict, List, Optional, Set, Tuple
from typing import Counter as Count

from _tsproxy.capture import layers, options
from _tsproxy.capture.layers import Dissector
from _tsproxy.capture.records import ETHERNET, Frames

_SYN, _RST, _ACK = 0x02, 0x04, 0x10
_MOST_SAMPLES = 1024

# Ethernet, IPv4 without options, TCP: EtherType, version and length, total length, flags and offset, protocol, addresses
# and ports, data offset, flags. Most segments are like that, and one look tells it all.
_USUAL = struct.Struct("!12xHBxHxxHxB2x12s8xBB6x")
_HERE, _IS_FRAGMENT = 34, 0x3FFF


class Direction:
    """What one end of a connection sent to the other."""

    __slots__ = (
        "_flow",
        "_initial_sequence",
        "_next_sample",
        "_samples",
        "_stride",
        "_tsval",
        "bare_resets",
        "first_leak_file",
        "first_leak_frame",
        "first_ns",
        "is_judged",
        "is_one_tsval",
        "last_ns",
        "opened_ns",
        "segments",
        "segments_cut",
        "segments_with_timestamps",
        "syn_ack_seen",
        "syn_seen",
    )

    def __init__(self, flow: bytes, time_ns: int) -> None:
        """`flow`: source and destination address, source and destination port, as they stand in the headers."""
        self._flow = flow
        self.segments = self.segments_with_timestamps = self.segments_cut = 0
        self.bare_resets = 0  # without TSopt
        self.first_ns = self.last_ns = time_ns
        self.syn_seen = self.syn_ack_seen = False
        self.opened_ns: Optional[int] = None  # when its own first SYN or SYN-ACK was seen
        self.first_leak_frame: Optional[int] = None
        self.first_leak_file: Optional[str] = None
        self.is_judged = True
        self.is_one_tsval = True
        self._samples: Optional[Tuple[array[int], array[int]]] = None  # a flow without TSopt shall cost no more than it must
        self._initial_sequence: Optional[int] = None
        self._tsval = options.NONE
        self._stride = self._next_sample = 1

    @property
    def source(self) -> str:
        """Its address, as inet_ntop(3) writes it."""
        return _ends(self._flow)[0]

    @property
    def destination(self) -> str:
        """The address that it sends to."""
        return _ends(self._flow)[1]

    @property
    def source_port(self) -> int:
        """From which port it sends."""
        return int.from_bytes(self._flow[-4:-2], "big")

    @property
    def destination_port(self) -> int:
        """To which port it sends."""
        return int.from_bytes(self._flow[-2:], "big")

    @property
    def samples(self) -> List[Tuple[int, int]]:
        """(ns since 1970, TSval) of segments over the whole flow, 1,024 at most."""
        return list(zip(*self._samples)) if self._samples else []

    @property
    def span_ns(self) -> int:
        """From the first segment to the last one."""
        return self.last_ns - self.first_ns

    def leave_unjudged(self) -> None:
        """Its segments are counted, and none of its TSvals is kept."""
        self.is_judged = False
        self._next_sample = 0  # the next one is never counted down to

    def begins_anew(self, time_ns: int, sequence: int) -> bool:
        """Whether a SYN with that sequence number is another connection's, between the same addresses and ports."""
        if self._initial_sequence is None:
            return time_ns > self.first_ns
        return self._initial_sequence != sequence

    def open(self, time_ns: int, flags: int, sequence: int) -> None:
        """Its SYN or SYN-ACK."""
        self._initial_sequence = sequence
        self.opened_ns = time_ns if self.opened_ns is None else min(time_ns, self.opened_ns)
        if flags & _ACK:
            self.syn_ack_seen = True
        else:
            self.syn_seen = True

    def add(self, time_ns: int, flags: int, tsval: int) -> None:
        """A segment; `tsval` as tsval_of() answers."""
        self.segments += 1
        if time_ns > self.last_ns:
            self.last_ns = time_ns
        elif time_ns < self.first_ns:
            self.first_ns = time_ns
        if tsval == options.NONE:
            if flags & _RST:
                self.bare_resets += 1
            return
        if tsval == options.CUT:
            self.segments_cut += 1
            return
        self.segments_with_timestamps += 1
        if tsval != self._tsval:
            self._differs(tsval)
        self._next_sample -= 1
        if not self._next_sample:
            self._sample(time_ns, tsval)

    def _differs(self, tsval: int) -> None:
        if self.segments_with_timestamps > 1 or tsval == options.UNREADABLE:
            self.is_one_tsval = False
        self._tsval = tsval

    def _sample(self, time_ns: int, tsval: int) -> None:
        """Keep one in `_stride`. Once there are too many, every second one goes, and the stride doubles."""
        self._next_sample = self._stride
        if tsval < 0:
            return
        if self._samples is None:
            self._samples = array("q"), array("L")
        times, tsvals = self._samples
        if len(times) >= _MOST_SAMPLES:
            del times[1::2], tsvals[1::2]
            self._next_sample = self._stride = 2 * self._stride
        times.append(time_ns)
        tsvals.append(tsval)


def _ends(flow: bytes) -> Tuple[str, str]:
    """Source and destination address in front of two ports."""
    half = (len(flow) - 4) // 2
    family = socket.AF_INET if half == 4 else socket.AF_INET6
    return socket.inet_ntop(family, flow[:half]), socket.inet_ntop(family, flow[half:-4])


class Flows:
    """All directions that were seen, and what could not be read."""

    def __init__(self, is_judged: Callable[[Direction], bool]) -> None:
        self.frames = 0
        self.directions: List[Direction] = []
        self.unparsed: Count[str] = Counter()
        self.blurred: Set[Tuple[str, str]] = set()  # addresses between which a segment was cut in front of its ports
        self._is_judged = is_judged
        self._current: Dict[bytes, Direction] = {}
        self._dissector = Dissector()

    def read(self, frames: Frames, file: str) -> None:
        """All frames of one capture, to its end."""
        number, directions, unpack, tsval_of = 0, self._current, _USUAL.unpack_from, options.tsval_of
        for time_ns, link, data, length in frames:
            number += 1
            self.frames += 1
            if link == ETHERNET and len(data) >= _USUAL.size:
                kind, version, total, fragment, protocol, flow, offset, flags = unpack(data)
                end = _HERE + (offset >> 2 & 0x3C)
                if (
                    kind == 0x0800
                    and version == 0x45
                    and protocol == 6
                    and not fragment & _IS_FRAGMENT
                    and _USUAL.size <= end <= len(data)
                    and end <= total + 14
                ):
                    direction = directions.get(flow)
                    if direction is None or flags & _SYN:
                        direction = self._direction(flow, time_ns, flags, data, _HERE)
                    tsval = tsval_of(data, _USUAL.size, end) if end > _USUAL.size else -1
                    direction.add(time_ns, flags, tsval)
                    if tsval >= -2 and tsval != -1 and direction.first_leak_frame is None:
                        direction.first_leak_frame, direction.first_leak_file = number, file
                    continue
            self._unusual(time_ns, link, data, length, number, file)

    def _unusual(self, time_ns: int, link: int, data: bytes, length: int, number: int, file: str) -> None:
        """Any frame."""
        frame = self._dissector
        answer = frame.find(link, data, length)
        if answer != layers.TCP:
            self._no_segment(answer)
            return
        data, at = frame.data, frame.at
        flags = data[at + 13] if at + 13 < len(data) else 0
        end = at + (data[at + 12] >> 2 & 0x3C) if at + 12 < len(data) else at + 60
        direction = self._current.get(frame.flow)
        if direction is None or flags & _SYN:
            direction = self._direction(frame.flow, time_ns, flags, data, at)
        tsval = options.tsval_of(data, at + 20, end)
        direction.add(time_ns, flags, tsval)
        if tsval not in (options.NONE, options.CUT) and direction.first_leak_frame is None:
            direction.first_leak_frame, direction.first_leak_file = number, file

    def _no_segment(self, answer: str) -> None:
        if answer == layers.CUT_PORTS:
            self.blurred.add(_ends(self._dissector.addresses + bytes(4)))
        if answer:
            self.unparsed[answer] += 1

    def _direction(self, flow: bytes, time_ns: int, flags: int, data: bytes, at: int) -> Direction:
        """Of a flow that is new, or of one that opens."""
        direction = self._current.get(flow)
        sequence = int.from_bytes(data[at + 4 : at + 8], "big")
        if direction is None or (flags & _SYN and direction.begins_anew(time_ns, sequence)):
            direction = Direction(flow, time_ns)
            if not self._is_judged(direction):
                direction.leave_unjudged()
            self._current[flow] = direction
            self.directions.append(direction)
        if flags & _SYN:
            direction.open(time_ns, flags, sequence)
        return direction
