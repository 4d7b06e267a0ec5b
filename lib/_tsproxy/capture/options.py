"""TSopt among the options of a TCP header (RFC 9293, section 3.1; RFC 7323, section 3.2).

Knows the list of options. Knows nothing of addresses or of frames.
"""

from __future__ import annotations

import struct

_EOL, _NOP, _TIMESTAMP, _LENGTH = 0, 1, 8, 10
_TWO_NOPS = 0x0101080A  # two NOPs, kind 8, length 10: as RFC 7323, appendix A, recommends, and as almost all write it

# What tsval_of() answers where it is no TSval
NONE = -1  # no TSopt
UNREADABLE = -2  # TSopt, but its TSval is not there, or its length is wrong
CUT = -3  # none in what was captured; the list goes on behind it

_HEAD_AND_TSVAL = struct.Struct("!II").unpack_from
_TSVAL = struct.Struct("!I").unpack_from


def tsval_of(data: bytes, at: int, end: int) -> int:
    """TSval of the options from `at` up to `end`, or one of the answers above. `data` may end before `end`.

    A receiver does not read on behind an option whose length is wrong (tcp_parse_options() in net/ipv4/tcp_input.c), nor
    does this.
    """
    if at + 12 <= end <= len(data):
        head, tsval = _HEAD_AND_TSVAL(data, at)
        if head == _TWO_NOPS:
            return int(tsval)
    return _search(data, at, end)


def _search(data: bytes, at: int, end: int) -> int:
    while at < end:
        if at >= len(data):
            return CUT
        if data[at] == _NOP:
            at += 1
            continue
        if data[at] == _EOL or at + 1 == end:
            break
        if data[at] == _TIMESTAMP:
            return _timestamp(data, at, end)
        if at + 1 == len(data):
            return CUT
        length = data[at + 1]
        if length < 2:
            break
        at += length
    return NONE


def _timestamp(data: bytes, at: int, end: int) -> int:
    """Where its kind is seen it is there, unless its length is one that ends the list."""
    if at + 6 <= len(data) and data[at + 1] == _LENGTH and at + _LENGTH <= end:
        return int(_TSVAL(data, at + 2)[0])
    is_option = at + 1 == len(data) or (data[at + 1] >= 2 and at + data[at + 1] <= end)
    return UNREADABLE if is_option else NONE
