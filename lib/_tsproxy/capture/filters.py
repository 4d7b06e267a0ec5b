"""Programs of classic BPF for a packet socket.

They keep what can hold no TCP away from Python; they look no further than they must, and let pass what only may hold TCP.
Knows headers and instructions. Knows nothing of sockets.
"""

from __future__ import annotations

from typing import Collection, Dict, Iterable, List, Sequence, Tuple, Union

from _tsproxy.linux.bpf import Instruction

_BYTE, _HALF, _HALF_AT_X = 0x30, 0x28, 0x48  # BPF_LD into A: from k, and from X + k
_HEADER_LENGTH = 0xB1  # BPF_LDX: X = 4 * (the low four bits of the byte at k)
_AND, _EQUAL, _ANY_BIT, _ALWAYS, _RETURN = 0x54, 0x15, 0x45, 0x05, 0x06
# include/uapi/linux/filter.h: the EtherType (SKF_AD_OFF + SKF_AD_PROTOCOL), and where the network header begins (SKF_NET_OFF)
_PROTOCOL, _NETWORK = 0xFFFFF000, 0xFFF00000
MOST_PORTS = 200  # a conditional jump of classic BPF reaches 255 instructions
_WHOLE = 0xFFFF
_OFFSET = 0x1FFF  # of an IPv4 fragment

_TCP, _UDP = 6, 17
_HOLDING = (4, 41, 47, 51, 137)  # IP in IP, GRE, AH, MPLS in IP
_HOP_BY_HOP, _ICMPV6 = 0, 58
_EXTENSIONS = (43, 44, 60, 135, 139, 140)
_TUNNELS = (4789, 8472, 6081, 6635)  # VXLAN, GENEVE, MPLS
_TAGS = (0x8100, 0x88A8, 0x9100, 0x8847, 0x8848)

Line = Union[str, Tuple[int, int], Tuple[int, int, str]]  # a label; an instruction and k; the same, and where to if it is so


def _any_of(values: Iterable[int], where: str) -> List[Line]:
    return [(_EQUAL, value, where) for value in values]


_ANY_TCP: Sequence[Line] = [
    (_HALF, _PROTOCOL),
    (_EQUAL, 0x0800, "ipv4"),
    (_EQUAL, 0x86DD, "ipv6"),
    *_any_of(_TAGS, "pass"),
    (_RETURN, 0),
    "ipv4",
    (_BYTE, _NETWORK + 9),
    *_any_of((_TCP, *_HOLDING), "pass"),
    (_EQUAL, _UDP, "udp over ipv4"),
    (_RETURN, 0),
    "udp over ipv4",
    (_HALF, _NETWORK + 6),
    (_ANY_BIT, _OFFSET, "drop"),
    (_HEADER_LENGTH, _NETWORK),
    (_HALF_AT_X, _NETWORK + 2),
    *_any_of(_TUNNELS, "pass"),
    (_HALF_AT_X, _NETWORK),
    *_any_of(_TUNNELS, "pass"),
    (_RETURN, 0),
    "ipv6",
    (_BYTE, _NETWORK + 6),
    *_any_of((_TCP, *_HOLDING, *_EXTENSIONS), "pass"),
    (_EQUAL, _UDP, "udp over ipv6"),
    (_EQUAL, _HOP_BY_HOP, "hop-by-hop"),
    (_RETURN, 0),
    "hop-by-hop",
    (_BYTE, _NETWORK + 40),
    (_EQUAL, _ICMPV6, "drop"),  # multicast listeners report so, on each network
    (_ALWAYS, 0, "pass"),
    "udp over ipv6",
    (_HALF, _NETWORK + 42),
    *_any_of(_TUNNELS, "pass"),
    (_HALF, _NETWORK + 40),
    *_any_of(_TUNNELS, "pass"),
    "drop",
    (_RETURN, 0),
    "pass",
    (_RETURN, _WHOLE),
]


def tcp() -> Tuple[Instruction, ...]:
    """TCP over IPv4 or IPv6, and what it may be wrapped in: tags, labels, tunnels."""
    return _assembled(_ANY_TCP)


def tcp_to(ports: Collection[int]) -> Tuple[Instruction, ...]:
    """TCP over IPv4 or IPv6 to one of MOST_PORTS ports: our own segments have no IPv6 extensions and are not fragmented."""
    return _assembled(
        [
            (_BYTE, _NETWORK),
            (_AND, 0xF0),
            (_EQUAL, 0x60, "ipv6"),
            (_BYTE, _NETWORK + 9),
            (_EQUAL, _TCP, "tcp over ipv4"),
            (_RETURN, 0),
            "tcp over ipv4",
            (_HEADER_LENGTH, _NETWORK),
            (_HALF_AT_X, _NETWORK + 2),
            (_ALWAYS, 0, "ports"),
            "ipv6",
            (_BYTE, _NETWORK + 6),
            (_EQUAL, _TCP, "tcp over ipv6"),
            (_RETURN, 0),
            "tcp over ipv6",
            (_HALF, _NETWORK + 42),
            "ports",
            *_any_of(sorted(ports), "pass"),
            (_RETURN, 0),
            "pass",
            (_RETURN, _WHOLE),
        ]
    )


def _assembled(lines: Sequence[Line]) -> Tuple[Instruction, ...]:
    """Labels into distances, counted from behind the jump. A test that fails goes on with the next instruction."""
    labels: Dict[str, int] = {}
    jumps: List[Tuple[int, int, str]] = []
    for line in lines:
        if isinstance(line, str):
            labels[line] = len(jumps)
        else:
            jumps.append((line[0], line[1], line[2] if len(line) == 3 else ""))
    return tuple(_instruction(*jump, labels.get(jump[2], at + 1) - at - 1) for at, jump in enumerate(jumps))


def _instruction(code: int, k: int, label: str, distance: int) -> Instruction:
    if code == _ALWAYS:
        return code, 0, 0, distance
    return code, distance, 0, k
