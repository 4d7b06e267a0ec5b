"""The TCP options of a SYN, from the headers that TCP_SAVED_SYN returns (RFC 9293, section 3.1; RFC 7323, section 3.2).

Input is the IP header and the TCP header of one segment, as the kernel saved them. Truncated or contradictory headers raise
Malformed, and nothing else is raised.
"""

from __future__ import annotations

from typing import Iterator, List, NamedTuple, Optional, Tuple

EOL, NOP, MSS, WINDOW_SCALE, SACK_PERMITTED, TIMESTAMP = 0, 1, 2, 3, 4, 8
_TCP = 6
_FRAGMENT = 44  # 8 bytes, no length of its own. The kernel keeps it where the fragment is the whole packet (RFC 6946).
_TSOPT_HEADER = bytes((TIMESTAMP, 10))  # kind and length of a well-formed TSopt
_EXTENSIONS = frozenset({0, 43, _FRAGMENT, 60})  # IPv6 hop-by-hop, routing, destination options: length in the second byte
_NAMES = {EOL: "eol", NOP: "nop", MSS: "mss", WINDOW_SCALE: "wscale", SACK_PERMITTED: "sackOK", TIMESTAMP: "TS"}


class Malformed(ValueError):
    """Not the headers of a TCP segment."""


class Syn(NamedTuple):
    """The options in their order: (kind, data without kind and length), and the DSCP of the packet."""

    options: Tuple[Tuple[int, bytes], ...]
    dscp: int = 0

    @property
    def tsval(self) -> Optional[int]:
        """TSval; None without a well-formed TSopt."""
        for kind, data in self.options:
            if kind == TIMESTAMP and len(data) == 8:
                return int.from_bytes(data[:4], "big")
        return None

    @property
    def has_timestamps(self) -> bool:
        """Whether there is an option of kind 8, well formed or not."""
        return any(kind == TIMESTAMP for kind, _ in self.options)

    def __str__(self) -> str:
        """As tcpdump writes it: "mss 1460,sackOK,TS val 1 ecr 0,nop,wscale 10"; runs of NOPs as "nop*10"."""
        texts: List[str] = [_option_text(kind, data) for kind, data in self.options]
        return ",".join(_fold_nops(texts)) or "no options"


def parse(headers: bytes) -> Syn:
    """The options of the segment whose IP and TCP headers these are."""
    start = _tcp_start(headers)
    if len(headers) < start + 20:
        raise Malformed("the TCP header is cut short")
    end = start + (headers[start + 12] >> 4) * 4
    if end < start + 20 or end > len(headers):
        raise Malformed("the TCP header's length is wrong")
    traffic_class = headers[1] if headers[0] >> 4 == 4 else int.from_bytes(headers[:2], "big") >> 4 & 0xFF
    return Syn(tuple(_options(headers[start + 20 : end])), traffic_class >> 2)


def offered_tsval(headers: bytes) -> Optional[int]:
    """TSval of a saved SYN; None if it has none, was not saved (b"", SYN cookies), or is malformed."""
    if _TSOPT_HEADER not in headers:  # the common case, in a tenth of the time of parse()
        return None
    try:
        return parse(headers).tsval
    except Malformed:
        return None


def _tcp_start(headers: bytes) -> int:
    """Offset of the TCP header after an IPv4 or IPv6 header."""
    version = headers[0] >> 4 if headers else 0
    if version == 4 and len(headers) >= 20 and headers[9] == _TCP and headers[0] & 15 >= 5:
        return (headers[0] & 15) * 4
    if version == 6 and len(headers) >= 40:
        return _skip_extensions(headers)
    raise Malformed("no IPv4 or IPv6 header with TCP in it")


def _skip_extensions(headers: bytes) -> int:
    next_header, at = headers[6], 40
    while next_header in _EXTENSIONS and at + 8 <= len(headers):
        if next_header == _FRAGMENT and int.from_bytes(headers[at + 2 : at + 4], "big") >> 3:
            raise Malformed("a later fragment, whose TCP header is in the first")
        units = 0 if next_header == _FRAGMENT else headers[at + 1]
        next_header, at = headers[at], at + 8 + units * 8
    if next_header != _TCP:
        raise Malformed("no TCP header behind the IPv6 headers")
    return at


def _options(field: bytes) -> Iterator[Tuple[int, bytes]]:
    at = 0
    while at < len(field) and field[at] != EOL:
        if field[at] == NOP:
            yield NOP, b""
            at += 1
            continue
        length = field[at + 1] if at + 1 < len(field) else 0
        if length < 2 or at + length > len(field):
            raise Malformed(f"option {field[at]} has a wrong length")
        yield field[at], field[at + 2 : at + length]
        at += length


def _option_text(kind: int, data: bytes) -> str:
    name = _NAMES.get(kind, f"kind {kind}")
    if kind == TIMESTAMP and len(data) == 8:
        return f"TS val {int.from_bytes(data[:4], 'big')} ecr {int.from_bytes(data[4:], 'big')}"
    return f"{name} {int.from_bytes(data, 'big')}" if data else name


def _fold_nops(texts: List[str]) -> Iterator[str]:
    at = 0
    while at < len(texts):
        run = 1
        while at + run < len(texts) and texts[at + run] == texts[at] == "nop":
            run += 1
        yield texts[at] if run < 3 else f"nop*{run}"
        at += run if run >= 3 else 1
