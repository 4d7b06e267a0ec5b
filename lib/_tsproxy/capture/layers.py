"""From a frame to its innermost TCP header: link layer, tags and labels, IPv4 and IPv6 with their extensions, tunnels.

Each step knows one header, and answers with what follows it: an EtherType (1,536 and up), an IP protocol number (below
256), or a word for find()'s caller, which ends the descent. Where the length in an IP or UDP header ends a packet, the rest
of the frame (padding, a checksum, a tap's trailer) is cut off, so that no step sees it. A fragment, and a packet that is
longer than what was captured, are `cut`: what is missing of them is elsewhere, and they are not malformed.

Knows headers. Knows nothing of files, flows or verdicts.
"""

from __future__ import annotations

import struct
from typing import Callable, Dict, Union

from _tsproxy.capture import records

# What find() answers: there is TCP, there is none, or why that can't be told
TCP, NO_TCP = "tcp", ""
CUT = "cut"  # by the snap length, in front of a TCP header
CUT_PORTS = "cut_ports"  # the same, in the first bytes of a TCP header
MALFORMED = "malformed"
LINK_TYPE = "link_type"
INTERFACE = "interface"  # one that the capture does not describe
NO_PACKET = "no_packet"  # a record of another kind that is numbered among the frames
ENCAPSULATION = "encapsulation"  # one that may hold IP, and is not looked into
ENCRYPTED = "encrypted"
NESTED = "nested"  # more headers in one another than any network has
_DEEPEST = 32

Following = Union[int, str]

_ETHER_TYPES = 0x0600  # below it: the length of an IEEE 802.3 frame
_IPV4, _IPV6, _BRIDGED, _ERSPAN, _ERSPAN_OLD, _MPLS = 0x0800, 0x86DD, 0x6558, 0x22EB, 0x88BE, 0x8847
_TCP, _UDP = 6, 17
_SNAP = b"\xaa\xaa\x03\0\0\0"  # IEEE 802.2 SNAP, and an EtherType behind it (RFC 1042)
_MORE_FRAGMENTS, _OFFSET = 0x2000, 0x1FFF
_AF_INET, _AF_INET6 = 2, frozenset({10, 23, 24, 28, 30})  # Linux, Windows, NetBSD and OpenBSD, FreeBSD, Darwin

_U16 = struct.Struct("!H").unpack_from
_IPV4_HEADER = struct.Struct("!BxHxxHxB").unpack_from  # version and length, total length, flags and offset, protocol
_IPV6_HEADER = struct.Struct("!BxxxHB").unpack_from  # version, payload length, next header
_UDP_HEADER = struct.Struct("!HHH").unpack_from


class Dissector:
    """Where the TCP header is in the frame that find() was given last.

    `data` is the frame without what lies behind the packet; the TCP header begins at `at`. `addresses` are those of the
    innermost IP header, source and destination, `flow` the same with the two ports: 12 or 36 bytes. `cut`: a part of the
    packet is not in `data`.
    """

    def __init__(self) -> None:
        self.data, self.at, self.cut = b"", 0, False
        self.addresses = self.flow = b""

    def find(self, link: int, data: bytes, length: int) -> str:
        """TCP, NO_TCP or why not, of a frame that was `length` bytes long on the wire. Any bytes are taken."""
        self.data, self.at, self.cut = data, 0, len(data) < length
        try:
            following = _LINKS[link](self) if link in _LINKS else _otherwise(link)
            for _ in range(_DEEPEST):
                if isinstance(following, str):
                    return following
                following = _STEPS[following](self) if following in _STEPS else _UNREAD.get(following, NO_TCP)
        except (IndexError, struct.error):
            return CUT if self.cut else MALFORMED
        return NESTED

    def end_at(self, end: int) -> None:
        """The packet ends there, says its header."""
        if end < len(self.data):
            self.data, self.cut = self.data[:end], False
        elif end > len(self.data):
            self.cut = True


# Link types


def _otherwise(link: int) -> Following:
    """Why there is nothing to read."""
    return {records.NO_INTERFACE: INTERFACE, records.NO_PACKET: NO_PACKET}.get(link, LINK_TYPE)


def _ethernet(frame: Dissector) -> Following:
    return _tagged(frame, 12)


def _vlan(frame: Dissector) -> Following:
    """IEEE 802.1Q and 802.1ad: two bytes, and an EtherType or a length as in front of them."""
    return _tagged(frame, 2)


def _tagged(frame: Dissector, offset: int) -> Following:
    kind = _U16(frame.data, frame.at + offset)[0]
    frame.at += offset + 2
    if kind >= _ETHER_TYPES:
        return int(kind)
    if not _SNAP.startswith(frame.data[frame.at : frame.at + 6]):
        return NO_TCP
    kind = _U16(frame.data, frame.at + 6)[0]
    frame.at += 8
    return _ether_type(kind)


def _ether_type(kind: int) -> Following:
    return kind if kind >= _ETHER_TYPES else NO_TCP


def _linux_sll(frame: Dissector) -> Following:
    frame.at = 16
    return _ether_type(_U16(frame.data, 14)[0])


def _linux_sll2(frame: Dissector) -> Following:
    frame.at = 20
    return _ether_type(_U16(frame.data, 0)[0])


def _null(frame: Dissector) -> Following:
    """An address family in the byte order of the host that captured; LOOP has the network's."""
    frame.at = 4
    if len(frame.data) < 4:
        raise IndexError
    orders = {int.from_bytes(frame.data[:4], order) for order in ("little", "big")}
    if _AF_INET in orders:
        return _IPV4
    return _IPV6 if orders & _AF_INET6 else NO_TCP


def _raw(frame: Dissector) -> Following:
    """IPv4 or IPv6, as its first four bits say."""
    return {4: _IPV4, 6: _IPV6}.get(frame.data[frame.at] >> 4, MALFORMED)


# IP


def _ip4(frame: Dissector) -> Following:
    """A total length of 0 is that of a segment which the network card was to cut (TSO), or of BIG TCP."""
    version, total, offset, protocol = _IPV4_HEADER(frame.data, frame.at)
    size = (version & 15) * 4
    if version >> 4 != 4 or size < 20 or 0 < total < size:
        return MALFORMED
    if total:
        frame.end_at(frame.at + total)
    frame.addresses = _whole(frame, frame.at + 12, 8)
    frame.at += size
    if offset & _OFFSET:
        return NO_TCP
    frame.cut = frame.cut or bool(offset & _MORE_FRAGMENTS)
    return int(protocol)


def _ip6(frame: Dissector) -> Following:
    """A payload length of 0 is that of a jumbogram (RFC 2675), or of BIG TCP: the frame ends it."""
    version, size, following = _IPV6_HEADER(frame.data, frame.at)
    if version >> 4 != 6:
        return MALFORMED
    if size:
        frame.end_at(frame.at + 40 + size)
    frame.addresses = _whole(frame, frame.at + 8, 32)
    frame.at += 40
    return int(following)


def _whole(frame: Dissector, at: int, size: int) -> bytes:
    """So many bytes, or none: IndexError."""
    found = frame.data[at : at + size]
    if len(found) < size:
        raise IndexError
    return found


def _extension(frame: Dissector) -> Following:
    """Hop-by-hop, routing, destination options and their like (RFC 8200, section 4)."""
    following, size = frame.data[frame.at], frame.data[frame.at + 1]
    frame.at += 8 + size * 8
    return following


def _authentication(frame: Dissector) -> Following:
    """AH counts in units of four bytes, less two of them (RFC 4302, section 2.2)."""
    following, size = frame.data[frame.at], frame.data[frame.at + 1]
    frame.at += 8 + size * 4
    return following


def _fragment(frame: Dissector) -> Following:
    offset, following = _U16(frame.data, frame.at + 2)[0], frame.data[frame.at]
    frame.at += 8
    if offset >> 3:
        return NO_TCP
    frame.cut = frame.cut or bool(offset & 1)
    return following


def _tcp(frame: Dissector) -> Following:
    """The first four bytes tell the ports; whether all of the header is there, the caller sees."""
    data, at = frame.data, frame.at
    if at + 4 > len(data) or (at + 20 > len(data) and not frame.cut):
        return CUT_PORTS if frame.cut else MALFORMED
    if at + 12 < len(data) and data[at + 12] >> 4 < 5:
        return MALFORMED
    frame.flow = frame.addresses + data[at : at + 4]
    return TCP


# Tunnels


def _gre(frame: Dissector) -> Following:
    """RFC 2784 and 2890. Version 1 is PPTP's, whose PPP is not looked into; nor is source routing (RFC 1701)."""
    flags, protocol = _U16(frame.data, frame.at)[0], _U16(frame.data, frame.at + 2)[0]
    if flags & 0x4007:
        return ENCAPSULATION
    frame.at += 4 + 4 * sum(bool(flags & bit) for bit in (0x8000, 0x2000, 0x1000))  # checksum, key, sequence number
    if protocol == _ERSPAN_OLD:
        return _ERSPAN if flags & 0x1000 else _BRIDGED  # without a sequence number it is type I, which has no header
    return _ether_type(protocol)


def _erspan(frame: Dissector) -> Following:
    """Types II and III (draft-foschiano-erspan-03, section 4), told by their version."""
    version = frame.data[frame.at] >> 4
    if version == 1:
        frame.at += 8
        return _BRIDGED
    if version != 2:
        return ENCAPSULATION
    kind, has_platform = frame.data[frame.at + 10] >> 2 & 0x1F, frame.data[frame.at + 11] & 1
    frame.at += 20 if has_platform else 12
    if kind == 2:
        return _raw(frame)
    return ENCAPSULATION if kind else _BRIDGED


def _redirected(frame: Dissector) -> Following:
    """WCCP in GRE: IPv4, with four bytes in front of it in version 2 (draft-wilson-wrec-wccp-v2, section 4.12)."""
    if frame.data[frame.at] >> 4 != 4:
        frame.at += 4
    return _IPV4


def _datagram(frame: Dissector) -> Following:
    """UDP: a tunnel is known by either port, as Wireshark does."""
    source, destination, size = _UDP_HEADER(frame.data, frame.at)
    if size >= 8:
        frame.end_at(frame.at + size)
    step = _PORTS.get(destination) or _PORTS.get(source)
    frame.at += 8
    return step(frame) if step else NO_TCP


def _vxlan(frame: Dissector) -> Following:
    """RFC 7348, section 5: the flag that says that a network is named must be set."""
    if not frame.data[frame.at] & 0x08:
        return NO_TCP
    frame.at += 8
    return _BRIDGED


def _geneve(frame: Dissector) -> Following:
    """RFC 8926, section 3.4."""
    first, protocol = frame.data[frame.at], _U16(frame.data, frame.at + 2)[0]
    if first >> 6:
        return NO_TCP
    frame.at += 8 + (first & 0x3F) * 4
    return _ether_type(protocol)


def _mpls(frame: Dissector) -> Following:
    """One label (RFC 3032). What follows the last one is not told: IP by its version, or Ethernet (RFC 4448)."""
    is_last = frame.data[frame.at + 2] & 1
    frame.at += 4
    if not is_last:
        return _MPLS
    version = frame.data[frame.at] >> 4
    if version in (4, 6):
        return _raw(frame)
    if version == 0 and _U16(frame.data, frame.at + 16)[0] in _STEPS:
        frame.at += 4  # a control word
    return _BRIDGED if version == 0 or _U16(frame.data, frame.at + 12)[0] in _STEPS else NO_TCP


Step = Callable[[Dissector], Following]
_LINKS: Dict[int, Step] = {
    records.NULL: _null,
    records.ETHERNET: _ethernet,
    records.RAW: _raw,
    records.LOOP: _null,
    records.LINUX_SLL: _linux_sll,
    records.IPV4: _raw,
    records.IPV6: _raw,
    records.LINUX_SLL2: _linux_sll2,
    **dict.fromkeys(records.RAW_BY_OTHERS, _raw),
}
_STEPS: Dict[int, Step] = {
    _IPV4: _ip4,
    _IPV6: _ip6,
    0x8100: _vlan,
    0x88A8: _vlan,
    0x9100: _vlan,  # of switches from before 802.1ad
    _MPLS: _mpls,
    0x8848: _mpls,
    _BRIDGED: _ethernet,
    _ERSPAN: _erspan,
    0x883E: _redirected,
    _TCP: _tcp,
    _UDP: _datagram,
    4: _ip4,
    41: _ip6,
    47: _gre,
    137: _mpls,
    0: _extension,  # hop-by-hop
    43: _extension,  # routing
    60: _extension,  # destination options
    135: _extension,  # mobility
    139: _extension,  # host identity
    140: _extension,  # shim6
    44: _fragment,
    51: _authentication,
}
_UNREAD = {
    50: ENCRYPTED,  # ESP
    0x88E5: ENCRYPTED,  # MACsec
    97: ENCAPSULATION,  # EtherIP
    108: ENCAPSULATION,  # IPComp
    115: ENCAPSULATION,  # L2TP
    0x8864: ENCAPSULATION,  # PPPoE
    0x880B: ENCAPSULATION,  # PPP
    0x88E7: ENCAPSULATION,  # provider backbone bridges
    0x894F: ENCAPSULATION,  # network service header
}
_PORTS: Dict[int, Step] = {4789: _vxlan, 8472: _vxlan, 6081: _geneve, 6635: _mpls}
