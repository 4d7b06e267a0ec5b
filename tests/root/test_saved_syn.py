"""TCP_SAVED_SYN of SYNs behind headers that the kernel takes."""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
from typing import Iterator, Tuple

import pytest
from _tsproxy.policy import syn
from namespaces import Namespace


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


class HandMade:
    """A client of a listener in a namespace, whose packets are made by hand: its address is nobody's."""

    def __init__(self, family: socket.AddressFamily, listener: socket.socket) -> None:
        self.family, self.listener, self.ports = family, listener, itertools.count(5000)
        self.raw = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW)
        self.sniffer = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3))  # ETH_P_ALL: what leaves, too
        self.sniffer.bind(("near", 0))
        self.sniffer.settimeout(20)

    def close(self) -> None:
        self.raw.close()
        self.sniffer.close()

    def segment(self, ends: bytes, port: int, numbers: Tuple[int, int], flags: int, options: bytes = b"") -> bytes:
        far = self.listener.getsockname()[1]
        tcp = struct.pack("!HHIIBBHHH", port, far, *numbers, (20 + len(options)) // 4 << 4, flags, 64240, 0, 0) + options
        pseudo = ends + struct.pack("!II", len(tcp), socket.IPPROTO_TCP)
        return tcp[:16] + struct.pack("!H", checksum(pseudo + tcp)) + tcp[18:]

    def send(self, tcp: bytes, ends: bytes, between: bytes, first: int) -> None:
        """`between` the IP header and TCP stand IPv6's extension headers, whose `first` is, or IPv4's options."""
        if self.family == socket.AF_INET6:
            head = struct.pack("!IHBB", 6 << 28, len(between + tcp), first, 64)
        else:
            words = 5 + len(between) // 4
            head = struct.pack("!BBHHHBBH", 4 << 4 | words, 0, words * 4 + len(tcp), 1, 0x4000, 64, socket.IPPROTO_TCP, 0)
        self.raw.sendto(head + ends + between + tcp, (self.listener.getsockname()[0], 0))

    def sequence_of_the_answer(self, port: int) -> int:
        while True:
            packet = self.sniffer.recv(2048)
            start = 40 if packet[0] >> 4 == 6 else (packet[0] & 15) * 4
            if packet[start + 2 : start + 4] == struct.pack("!H", port) and packet[start + 13] == 0x12:
                return int(struct.unpack_from("!I", packet, start + 4)[0])

    def connect(self, between: bytes, first: int, options: bytes) -> bytes:
        """What the listener's kernel saved of a SYN with these options."""
        port = next(self.ports)
        near = "fd00::2" if self.family == socket.AF_INET6 else "10.9.0.2"
        ends = b"".join(socket.inet_pton(self.family, ip) for ip in (near, self.listener.getsockname()[0]))
        self.send(self.segment(ends, port, (1, 0), 2, options), ends, between, first)
        answer = self.sequence_of_the_answer(port)
        self.send(self.segment(ends, port, (2, answer + 1), 16), ends, b"", socket.IPPROTO_TCP)
        accepted, _ = self.listener.accept()
        with accepted:
            return bytes(accepted.getsockopt(socket.IPPROTO_TCP, 28, 512))


@contextlib.contextmanager
def hand_made(family: socket.AddressFamily) -> Iterator[HandMade]:
    """With a veth whose other end leads nowhere."""
    with contextlib.closing(Namespace()) as space:
        space.run("ip", "link", "add", "near", "type", "veth", "peer", "name", "far")
        for end in ("near", "far"):
            space.run("ip", "link", "set", end, "up")
        space.run("ip", "address", "add", "fd00::1/64", "dev", "near", "nodad")
        space.run("ip", "address", "add", "10.9.0.1/24", "dev", "near")
        for neighbour in ("fd00::2", "10.9.0.2"):
            space.run("ip", "neigh", "add", neighbour, "lladdr", "02:00:00:00:00:09", "dev", "near", "nud", "permanent")
        here = "fd00::1" if family == socket.AF_INET6 else "10.9.0.1"
        with space, socket.create_server((here, 0), family=family) as listener:
            listener.setsockopt(socket.IPPROTO_TCP, 27, 1)
            listener.settimeout(20)
            with contextlib.closing(HandMade(family, listener)) as client:
                yield client


OFFER = bytes.fromhex("020405a00402080a112233440000000001030307")


HOP_BY_HOP, DESTINATION = b"\0\1\4\0\0\0\0", b"\1\x1e\x0c" + bytes(12)  # padding; an experimental option (RFC 4727)


ROUTING, FRAGMENT = b"\2\2\0" + bytes(20), b"\xff\0\0\0\0\0\7"  # no segments left; the whole packet in one fragment


UNUSUAL = [
    (socket.AF_INET6, b"", 6),
    (socket.AF_INET6, b"\6" + HOP_BY_HOP, 0),
    (socket.AF_INET6, b"\6" + DESTINATION, 60),
    (socket.AF_INET6, b"\6" + ROUTING, 43),
    (socket.AF_INET6, b"\6" + FRAGMENT, 44),
    (socket.AF_INET6, b"\x3c" + HOP_BY_HOP + b"\x2c" + DESTINATION + b"\6" + FRAGMENT, 0),
    (socket.AF_INET, b"", 6),
    (socket.AF_INET, b"\1" * 12, 6),
]


@pytest.mark.root
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_syn_behind_headers_that_the_kernel_takes_is_read(family: socket.AddressFamily) -> None:
    with hand_made(family) as client:
        for between, first in [(between, first) for of, between, first in UNUSUAL if of == family]:
            saved = client.connect(between, first, OFFER)
            assert between in saved, "the kernel keeps it"
            assert str(syn.parse(saved)) == "mss 1440,sackOK,TS val 287454020 ecr 0,nop,wscale 7"
            assert syn.offered_tsval(saved) == 0x11223344
