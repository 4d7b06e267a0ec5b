"""Captures made by hand: frames of each link type, tag, tunnel and extension, and the files that hold them.

Written apart from the product's own readers, which they judge, from the formats' own descriptions.
"""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple, Union

from common.segments import ACK, FIN, PSH, SYN, Segment, packed, timestamp

ETHERNET, NULL, RAW, LOOP, SLL, IPV4, IPV6, SLL2 = 1, 0, 101, 108, 113, 228, 229, 276
CLIENT, SERVER = ("10.1.0.1", 40001), ("10.2.0.2", 443)
CLIENT6, SERVER6 = ("2001:db8::1", 40001), ("2001:db8::2", 443)
BEGUN_NS = 1_700_000_000_000_000_000
MS = 1_000_000


class Frame(NamedTuple):
    """`length` is that on the wire; None: all of it was captured."""

    time_ns: int
    data: bytes
    length: Optional[int] = None
    interface: int = 0


# Segments


def segment(
    tsval: Optional[int] = None,
    flags: int = ACK,
    source: Tuple[str, int] = CLIENT,
    target: Tuple[str, int] = SERVER,
    sequence: int = 1000,
    payload: bytes = b"",
    options: bytes = b"",
) -> bytes:
    """An IP packet with a TCP segment; TSopt behind the other options, if there is a TSval."""
    stamped = options + (b"" if tsval is None else timestamp(tsval, 7))
    return packed(Segment(source, target, flags, sequence, 1, options=stamped, payload=payload))


def connection(
    tsval: Optional[int] = None,
    port: int = CLIENT[1],
    begun_ns: int = BEGUN_NS,
    server: Tuple[str, int] = SERVER,
    hz: int = 1000,
    segments: int = 8,
    gap_ms: int = 250,
) -> List[Tuple[int, bytes]]:
    """(time, IP packet) of a connection, both directions; `tsval` is the client's at its SYN, whose clock runs at `hz`."""
    client = (CLIENT[0], port)
    kinds = [(SYN, client, server), (SYN | ACK, server, client), (ACK, client, server)]
    kinds += [(ACK | PSH, client, server), (ACK, server, client)] * ((segments - 4) // 2) + [(ACK | FIN, client, server)]
    found = []
    for count, (flags, source, target) in enumerate(kinds):
        at_ms = count * gap_ms
        value = None if tsval is None or source == server else tsval + at_ms * hz // 1000
        payload = b"order" if flags & PSH else b""
        packet = segment(value, flags, source, target, 1000 if flags & SYN else 1001, payload)
        found.append((begun_ns + at_ms * MS, packet))
    return found


# Link layers, tags, tunnels, extensions


def kind_of(packet: bytes) -> int:
    """The EtherType of an IP packet."""
    return 0x0800 if packet[0] >> 4 == 4 else 0x86DD


def ether(packet: bytes, kind: Optional[int] = None, tags: Sequence[Tuple[int, int]] = ()) -> bytes:
    """An Ethernet frame; `tags` are (EtherType, VLAN)."""
    head = bytes.fromhex("020000000002020000000001"[:24])
    for tag, vlan in tags:
        head += struct.pack("!HH", tag, vlan)
    return head + struct.pack("!H", kind or kind_of(packet)) + packet


def snap(packet: bytes) -> bytes:
    """IEEE 802.3 with a length, LLC and SNAP."""
    rest = bytes.fromhex("aaaa03000000") + struct.pack("!H", kind_of(packet)) + packet
    return bytes.fromhex("020000000002020000000001") + struct.pack("!H", len(rest)) + rest


def ipv4(protocol: int, payload: bytes, total: Optional[int] = None, fragment: int = 0x4000, options: bytes = b"") -> bytes:
    size = 20 + len(options)
    length = size + len(payload) if total is None else total
    head = struct.pack("!BBHHHBBH", 0x40 | size // 4, 0, length, 1, fragment, 64, protocol, 0)
    return head + bytes([192, 0, 2, 1, 192, 0, 2, 2]) + options + payload


def ipv6(following: int, payload: bytes, size: Optional[int] = None) -> bytes:
    head = struct.pack("!IHBB", 6 << 28, len(payload) if size is None else size, following, 64)
    return (
        head + bytes.fromhex("20010db8000000000000000000000003") + bytes.fromhex("20010db8000000000000000000000004") + payload
    )


def udp(port: int, payload: bytes) -> bytes:
    return struct.pack("!HHHH", 50000, port, 8 + len(payload), 0) + payload


def gre(protocol: int, payload: bytes, flags: int = 0) -> bytes:
    words = sum(bool(flags & bit) for bit in (0x8000, 0x2000, 0x1000))
    return struct.pack("!HH", flags, protocol) + bytes(4 * words) + payload


def vxlan(frame: bytes) -> bytes:
    return bytes.fromhex("0800000000002a00") + frame


def geneve(protocol: int, payload: bytes, options: bytes = b"") -> bytes:
    return struct.pack("!BBHI", len(options) // 4, 0, protocol, 42 << 8) + options + payload


def mpls(payload: bytes, labels: int = 1) -> bytes:
    stack = b"".join(struct.pack("!I", (100 + at) << 12 | (at == labels - 1) << 8 | 64) for at in range(labels))
    return stack + payload


def erspan2(frame: bytes) -> bytes:
    return struct.pack("!HHI", 1 << 12 | 5, 77, 0) + frame


def erspan3(frame: bytes, platform: bool = False, kind: int = 0) -> bytes:
    head = struct.pack("!HHIHH", 2 << 12 | 5, 77, 0, 0, kind << 10 | platform)
    return head + (bytes(8) if platform else b"") + frame


def within6(packet: bytes, *extensions: Tuple[int, bytes]) -> bytes:
    """An IPv6 packet with extension headers, each (its number, its bytes behind the first), in front of its TCP."""
    kinds = [number for number, _ in extensions] + [packet[6]]
    inside = b"".join(bytes([kinds[at + 1]]) + rest for at, (_, rest) in enumerate(extensions)) + packet[40:]
    return packet[:4] + struct.pack("!HB", len(inside), kinds[0]) + packet[7:40] + inside


OPTIONS8 = bytes.fromhex("00010400000000")  # a length of 0 (8 bytes in all), PadN
ROUTING = bytes.fromhex("00000000000000")
AH = bytes.fromhex("04") + bytes(22)  # 24 bytes in all
JUMBO = bytes.fromhex("00c20400012000")


def fragment6(offset: int, more: bool) -> bytes:
    return struct.pack("!BHI", 0, offset << 3 | more, 1)


def sll(packet: bytes) -> bytes:
    return struct.pack("!HHH8sH", 0, 1, 6, bytes(8), kind_of(packet)) + packet


def sll2(packet: bytes) -> bytes:
    return struct.pack("!HHIHBB8s", kind_of(packet), 0, 3, 1, 0, 6, bytes(8)) + packet


def null(packet: bytes, order: str = "<", af6: int = 30) -> bytes:
    return struct.pack(order + "I", 2 if packet[0] >> 4 == 4 else af6) + packet


# Files


def pcap(frames: Iterable[Frame], link: int = ETHERNET, order: str = "<", ns: bool = False, snap: int = 262144) -> bytes:
    magic, unit = (0xA1B23C4D, 1) if ns else (0xA1B2C3D4, 1000)
    out = [struct.pack(order + "IHHiIII", magic, 2, 4, 0, 0, snap, link)]
    for frame in frames:
        length = len(frame.data) if frame.length is None else frame.length
        seconds, rest = divmod(frame.time_ns, 1_000_000_000)
        out.append(struct.pack(order + "IIII", seconds, rest // unit, len(frame.data), length) + frame.data)
    return b"".join(out)


def option(order: str, code: int, value: bytes) -> bytes:
    return struct.pack(order + "HH", code, len(value)) + value + bytes(-len(value) % 4)


def block(order: str, kind: int, body: bytes) -> bytes:
    body += bytes(-len(body) % 4)
    size = struct.pack(order + "I", 12 + len(body))
    return struct.pack(order + "I", kind) + size + body + size


def section(order: str = "<") -> bytes:
    return block(order, 0x0A0D0D0A, struct.pack(order + "IHHq", 0x1A2B3C4D, 1, 0, -1))


def interface(order: str = "<", link: int = ETHERNET, snap: int = 0, options: bytes = b"") -> bytes:
    return block(order, 1, struct.pack(order + "HHI", link, 0, snap) + options)


def enhanced(frame: Frame, order: str = "<", per_second: int = 1_000_000, options: bytes = b"") -> bytes:
    ticks = frame.time_ns * per_second // 1_000_000_000
    length = len(frame.data) if frame.length is None else frame.length
    head = struct.pack(order + "IIIII", frame.interface, ticks >> 32, ticks & 0xFFFFFFFF, len(frame.data), length)
    return block(order, 6, head + frame.data + bytes(-len(frame.data) % 4) + options)


def simple(frame: Frame, order: str = "<") -> bytes:
    length = len(frame.data) if frame.length is None else frame.length
    return block(order, 3, struct.pack(order + "I", length) + frame.data)


def old_packet(frame: Frame, order: str = "<", drops: int = 0xFFFF) -> bytes:
    ticks = frame.time_ns // 1000
    length = len(frame.data) if frame.length is None else frame.length
    head = struct.pack(order + "HHIIII", frame.interface, drops, ticks >> 32, ticks & 0xFFFFFFFF, len(frame.data), length)
    return block(order, 2, head + frame.data)


def statistics(order: str = "<", which: int = 0, **counts: int) -> bytes:
    """`ifdrop` and `osdrop`."""
    codes = {"ifdrop": 5, "osdrop": 7}
    options = b"".join(option(order, codes[name], struct.pack(order + "Q", count)) for name, count in counts.items())
    return block(order, 5, struct.pack(order + "III", which, 0, 0) + options)


def framed(packets: Iterable[Tuple[int, bytes]]) -> List[Frame]:
    """IP packets as Ethernet frames."""
    return [Frame(at, ether(packet)) for at, packet in packets]


def write(path: Path, data: Union[bytes, Sequence[bytes]], packed_by_gzip: bool = False) -> str:
    whole = data if isinstance(data, bytes) else b"".join(data)
    path.write_bytes(gzip.compress(whole) if packed_by_gzip else whole)
    return str(path)


# One segment with TSopt in each kind of wrapping that is to be looked into

PLAIN, PLAIN6 = segment(0x01020304, payload=b"order"), segment(0x01020304, source=CLIENT6, target=SERVER6, payload=b"order")
MINIMAL = segment(None, FIN | ACK)  # 40 bytes: an Ethernet frame is filled up behind it

WRAPPED: Dict[str, bytes] = {
    "IPv4": ether(PLAIN),
    "IPv6": ether(PLAIN6),
    "802.1Q": ether(PLAIN, tags=[(0x8100, 5)]),
    "802.1Q, IPv6": ether(PLAIN6, tags=[(0x8100, 5)]),
    "802.1ad": ether(PLAIN, tags=[(0x88A8, 5), (0x8100, 6)]),
    "QinQ": ether(PLAIN, tags=[(0x8100, 5), (0x8100, 6)]),
    "QinQ of 9100": ether(PLAIN, tags=[(0x9100, 5), (0x8100, 6)]),
    "SNAP": snap(PLAIN),
    "IPv4 with options": ether(PLAIN[:0] + ipv4(6, PLAIN[20:], options=bytes([7, 7, 4, 0, 0, 0, 0, 0]))),
    "IPv4 of total length 0": ether(ipv4(6, PLAIN[20:], total=0)),
    "IPv4, first fragment": ether(ipv4(6, PLAIN[20:], fragment=0x2000)),
    "AH over IPv4": ether(ipv4(51, bytes([6]) + AH + PLAIN[20:])),
    "IP in IP": ether(ipv4(4, PLAIN)),
    "6in4": ether(ipv4(41, PLAIN6)),
    "4in6": ether(ipv6(4, PLAIN)),
    "6in6": ether(ipv6(41, PLAIN6)),
    "IP in IP in IP": ether(ipv4(4, ipv4(4, PLAIN))),
    "hop-by-hop": ether(within6(PLAIN6, (0, OPTIONS8))),
    "jumbo": ether(within6(PLAIN6, (0, JUMBO))[:4] + b"\0\0" + within6(PLAIN6, (0, JUMBO))[6:]),
    "IPv6 of payload length 0": ether(PLAIN6[:4] + b"\0\0" + PLAIN6[6:]),
    "routing": ether(within6(PLAIN6, (43, ROUTING))),
    "destination options": ether(within6(PLAIN6, (60, OPTIONS8))),
    "AH": ether(within6(PLAIN6, (51, AH))),
    "each extension": ether(within6(PLAIN6, (0, OPTIONS8), (43, ROUTING), (44, fragment6(0, True)), (51, AH), (60, OPTIONS8))),
    "IPv6, first fragment": ether(within6(PLAIN6, (44, fragment6(0, True)))),
    "IPv6, atomic fragment": ether(within6(PLAIN6, (44, fragment6(0, False)))),
    "GRE": ether(ipv4(47, gre(0x0800, PLAIN))),
    "GRE, IPv6": ether(ipv4(47, gre(0x86DD, PLAIN6))),
    "GRE over IPv6": ether(ipv6(47, gre(0x0800, PLAIN))),
    "GRE with a key": ether(ipv4(47, gre(0x0800, PLAIN, 0x2000))),
    "GRE with all": ether(ipv4(47, gre(0x0800, PLAIN, 0xB000))),
    "GRE, bridging": ether(ipv4(47, gre(0x6558, ether(PLAIN)))),
    "NVGRE, tagged": ether(ipv4(47, gre(0x6558, ether(PLAIN, tags=[(0x8100, 9)]), 0x2000))),
    "GRE, MPLS": ether(ipv4(47, gre(0x8847, mpls(PLAIN)))),
    "WCCP": ether(ipv4(47, gre(0x883E, PLAIN))),
    "WCCP 2": ether(ipv4(47, gre(0x883E, bytes([0, 1, 2, 3]) + PLAIN))),
    "ERSPAN I": ether(ipv4(47, gre(0x88BE, ether(PLAIN)))),
    "ERSPAN II": ether(ipv4(47, gre(0x88BE, erspan2(ether(PLAIN)), 0x1000))),
    "ERSPAN II, tagged": ether(ipv4(47, gre(0x88BE, erspan2(ether(PLAIN, tags=[(0x8100, 9)])), 0x1000))),
    "ERSPAN III": ether(ipv4(47, gre(0x22EB, erspan3(ether(PLAIN)), 0x1000))),
    "ERSPAN III with a subheader": ether(ipv4(47, gre(0x22EB, erspan3(ether(PLAIN), True), 0x1000))),
    "VXLAN": ether(ipv4(17, udp(4789, vxlan(ether(PLAIN))))),
    "VXLAN, IPv6 in IPv6": ether(ipv6(17, udp(4789, vxlan(ether(PLAIN6))))),
    "VXLAN in VXLAN": ether(ipv4(17, udp(4789, vxlan(ether(ipv4(17, udp(4789, vxlan(ether(PLAIN))))))))),
    "GENEVE": ether(ipv4(17, udp(6081, geneve(0x6558, ether(PLAIN))))),
    "GENEVE with options": ether(ipv4(17, udp(6081, geneve(0x6558, ether(PLAIN), bytes.fromhex("0102000100000001"))))),
    "GENEVE, IPv4": ether(ipv4(17, udp(6081, geneve(0x0800, PLAIN)))),
    "MPLS": ether(mpls(PLAIN), 0x8847),
    "MPLS, three labels": ether(mpls(PLAIN, 3), 0x8847),
    "MPLS, IPv6": ether(mpls(PLAIN6), 0x8847),
    "MPLS, multicast": ether(mpls(PLAIN), 0x8848),
    "MPLS, tagged": ether(mpls(PLAIN), 0x8847, [(0x8100, 5)]),
    "MPLS, Ethernet with a control word": ether(mpls(bytes(4) + ether(PLAIN)), 0x8847),
    "MPLS over UDP": ether(ipv4(17, udp(6635, mpls(PLAIN)))),
    "MPLS over IP": ether(ipv4(137, mpls(PLAIN))),
}
# The same of other link types: link type, frame
LINKED: Dict[str, Tuple[int, bytes]] = {
    "NULL": (NULL, null(PLAIN)),
    "NULL, big-endian": (NULL, null(PLAIN, ">")),
    "NULL, IPv6 of Darwin": (NULL, null(PLAIN6)),
    "NULL, IPv6 of FreeBSD": (NULL, null(PLAIN6, af6=28)),
    "NULL, IPv6 of OpenBSD": (NULL, null(PLAIN6, af6=24)),
    "LOOP": (LOOP, null(PLAIN, ">")),
    "LOOP, IPv6": (LOOP, null(PLAIN6, ">", 24)),
    "RAW": (RAW, PLAIN),
    "RAW, IPv6": (RAW, PLAIN6),
    "IPV4": (IPV4, PLAIN),
    "IPV6": (IPV6, PLAIN6),
    "SLL": (SLL, sll(PLAIN)),
    "SLL, IPv6": (SLL, sll(PLAIN6)),
    "SLL2": (SLL2, sll2(PLAIN)),
    "SLL2, IPv6": (SLL2, sll2(PLAIN6)),
}
# No segment, or none that can be read -> what it is counted as, "" for nothing
OTHERS: Dict[str, Tuple[bytes, str]] = {
    "ARP": (ether(bytes(28), 0x0806), ""),
    "UDP": (ether(ipv4(17, udp(53, b"x" * 40))), ""),
    "IPv4, later fragment": (ether(ipv4(6, PLAIN[20:], fragment=0x2001)), ""),
    "IPv6, later fragment": (ether(within6(PLAIN6, (44, fragment6(1, False)))), ""),
    "IP in IP, later fragment": (ether(ipv4(4, ipv4(6, PLAIN[20:], fragment=3))), ""),
    "no next header": (ether(ipv6(59, PLAIN6[40:])), ""),
    "ESP": (ether(ipv4(50, bytes(40))), "encrypted"),
    "MACsec": (ether(bytes(40), 0x88E5), "encrypted"),
    "PPPoE": (ether(bytes.fromhex("110000010020") + b"\0\x21" + PLAIN, 0x8864), "encapsulation"),
    "IPv4 with another version": (ether(b"\x75" + PLAIN[1:], 0x0800), "malformed"),
    "IPv4 with a header of 16 bytes": (ether(b"\x44" + PLAIN[1:], 0x0800), "malformed"),
    "TCP with a header of 16 bytes": (ether(PLAIN[:32] + b"\x40" + PLAIN[33:]), "malformed"),
    "a frame of 10 bytes": (bytes(10), "malformed"),
    "40 labels": (ether(mpls(PLAIN, 40), 0x8847), "nested"),
}
