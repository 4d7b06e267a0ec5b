"""The SYN parser: real SYNs read right, anything else refused and never worse."""

from __future__ import annotations

import socket
import struct
from typing import List, Tuple

import pytest
from _tsproxy.policy import syn
from hypothesis import given
from hypothesis import strategies as st

V4 = bytes.fromhex("4500003c1c4640004006b1e6c0a80068c0a80001")
V6 = bytes.fromhex("6000000000280640") + bytes(16) + bytes(16)
TCP = bytes.fromhex("a0b41f9000000001000000000002faf000000000")


def headers(ip: bytes, options: bytes) -> bytes:
    padded = options + bytes(-len(options) % 4)
    tcp = bytearray(TCP)
    tcp[12] = (20 + len(padded)) // 4 << 4
    return ip + bytes(tcp) + padded


@pytest.mark.parametrize(
    ("options", "text", "tsval"),
    [
        ("020405b40402080a112233440000000001030307", "mss 1460,sackOK,TS val 287454020 ecr 0,nop,wscale 7", 0x11223344),
        ("020405b4010104020103030a", "mss 1460,nop,nop,sackOK,nop,wscale 10", None),
        ("020405b404020101010101010101010103030a", "mss 1460,sackOK," + "nop*10" + ",wscale 10", None),
        ("080a0000000000000000", "TS val 0 ecr 0", 0),
        ("", "no options", None),
        ("fe04abcd", "kind 254 43981", None),
    ],
)
@pytest.mark.parametrize("ip", [V4, V6])
def test_the_options_of_a_syn_read_as_tcpdump_writes_them(ip: bytes, options: str, text: str, tsval: object) -> None:
    if "nop*10" in text:
        options = "020405b40402" + "01" * 10 + "03030a"
    seen = syn.parse(headers(ip, bytes.fromhex(options)))
    assert (str(seen), seen.tsval, seen.has_timestamps) == (text, tsval, tsval is not None)


def test_ipv6_extension_headers_are_passed_over() -> None:
    ip = bytearray(V6)
    ip[6] = 0
    hop_by_hop = bytes([60, 0]) + bytes(6)
    destination = bytes([6, 1]) + bytes(14)
    seen = syn.parse(headers(bytes(ip) + hop_by_hop + destination, bytes.fromhex("080a0000000700000000")))
    assert seen.tsval == 7


kinds = st.integers(2, 255)
option = st.tuples(kinds, st.binary(max_size=10))


@given(st.lists(option, max_size=4).filter(lambda found: sum(2 + len(data) for _, data in found) <= 40))
def test_well_formed_options_come_back_as_they_went_in(found: List[Tuple[int, bytes]]) -> None:
    field = b"".join(struct.pack("BB", kind, 2 + len(data)) + data for kind, data in found)
    assert syn.parse(headers(V4, field)).options == tuple(found)


@given(st.binary(max_size=120))
def test_any_bytes_are_read_or_refused(raw: bytes) -> None:
    for ip in (b"", V4, V6, V4 + TCP, V6 + TCP):
        try:
            seen = syn.parse(ip + raw)
        except syn.Malformed:
            continue
        assert isinstance(str(seen), str)


@given(st.integers(0, 99))
def test_headers_cut_anywhere_are_refused(end: int) -> None:
    whole = headers(V4, bytes.fromhex("020405b40402080a112233440000000001030307"))
    if end < len(whole):
        with pytest.raises(syn.Malformed):
            syn.parse(whole[:end])


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_the_kernels_own_saved_syn_is_read(family: socket.AddressFamily) -> None:
    host = "127.0.0.1" if family == socket.AF_INET else "::1"
    with socket.create_server((host, 0), family=family) as listener:
        listener.setsockopt(socket.IPPROTO_TCP, 27, 1)
        with socket.create_connection(listener.getsockname()[:2]) as client:
            accepted, _ = listener.accept()
            with accepted:
                seen = syn.parse(accepted.getsockopt(socket.IPPROTO_TCP, 28, 256))
        del client
    assert syn.MSS in dict(seen.options)


# SYNs as no kernel of ours sends them, sent by hand to a kernel that saves them
