"""What every reader of a capture gives: frames, and notes on what can't be had of it.

Knows nothing of a file format.
"""

from __future__ import annotations

from collections import Counter
from typing import Counter as Count
from typing import Iterator, Tuple

Frame = Tuple[int, int, bytes, int]  # ns since 1970, LINKTYPE_*, what was captured, the length on the wire
Frames = Iterator[Frame]

# LINKTYPE_* of www.tcpdump.org/linktypes.html: what the number in a capture means
NULL, ETHERNET, RAW, LOOP, LINUX_SLL, IPV4, IPV6, LINUX_SLL2 = 0, 1, 101, 108, 113, 228, 229, 276
RAW_BY_OTHERS = (12, 14)  # DLT_RAW of BSD and OpenBSD, which old programs wrote to files
NO_PACKET = -1  # a record that Wireshark numbers among the frames, e.g. a line of the systemd journal
NO_INTERFACE = -2  # a frame of an interface that the capture does not describe

LONGEST = 1 << 18  # tcpdump's and Wireshark's greatest snap length; a longer one is no frame but damage
LATEST = (1 << 63) - 1  # ns since 1970: in the year 2262, as long as no file is damaged


class NoCapture(Exception):
    """The file is no capture; the text says why."""


class Notes:
    """What a capture says of itself, and what is wrong with it."""

    def __init__(self) -> None:
        self.problem = ""  # why it ends before its end, "" if it does not
        self._drops: Count[Tuple[int, int]] = Counter()

    @property
    def drops(self) -> int:
        """Frames that the capturing host says it lost."""
        return sum(self._drops.values())

    def lost(self, interface: Tuple[int, int], frames: int) -> None:
        """So many more, by this (section, interface)."""
        self._drops[interface] += frames

    def lost_in_all(self, interface: Tuple[int, int], frames: int) -> None:
        """So many from its beginning on; those that were told one by one are among them."""
        self._drops[interface] = max(self._drops[interface], frames)
