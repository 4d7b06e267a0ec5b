"""Frames of captures down to TSopt: each format, link type, tag, tunnel and extension, against tshark, and any bytes."""

from __future__ import annotations

import gzip
import os
import shutil
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import captures
import pytest
from _tsproxy.capture import files, layers, options, pcapng, records
from _tsproxy.capture.layers import Dissector
from _tsproxy.capture.records import NoCapture, Notes
from captures import BEGUN_NS, ETHERNET, LINKED, MINIMAL, OTHERS, PLAIN, WRAPPED, Frame, ether, framed, segment
from harness import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st

TSVAL = 0x01020304
ORDERS = pytest.mark.parametrize("order", ["<", ">"], ids=["little-endian", "big-endian"])
FRAMES = framed(captures.connection(7))
Seen = Tuple[str, Optional[int]]


def look(link: int, data: bytes, length: Optional[int] = None) -> Seen:
    """What a frame is found to be, and its TSval as tsval_of() answers."""
    frame = Dissector()
    answer = frame.find(link, data, len(data) if length is None else length)
    if answer != layers.TCP:
        return answer, None
    at = frame.at
    end = at + (frame.data[at + 12] >> 4) * 4 if at + 12 < len(frame.data) else at + 60
    return answer, options.tsval_of(frame.data, at + 20, end)


def read(path: Any) -> Tuple[List[records.Frame], Notes]:
    notes = Notes()
    return list(files.frames(str(path), notes)), notes


def refused(path: Any) -> str:
    with pytest.raises(NoCapture) as caught:
        read(path)
    return str(caught.value)


# Link types, tags, tunnels, extensions


@pytest.mark.parametrize("name", WRAPPED)
def test_tsopt_is_found_in_each_wrapping_of_an_ethernet_frame(name: str) -> None:
    assert look(ETHERNET, WRAPPED[name]) == (layers.TCP, TSVAL)


@pytest.mark.parametrize("name", LINKED)
def test_tsopt_is_found_behind_each_link_type(name: str) -> None:
    assert look(*LINKED[name]) == (layers.TCP, TSVAL)


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_segment_or_can_not_be_read_is_told_by_kind(name: str) -> None:
    frame, kind = OTHERS[name]
    assert look(ETHERNET, frame) == (kind, None)


def test_a_link_type_that_is_not_known_is_told() -> None:
    assert look(147, PLAIN) == (layers.LINK_TYPE, None)


def test_the_innermost_addresses_and_ports_are_those_of_the_flow() -> None:
    frame = Dissector()
    frame.find(ETHERNET, WRAPPED["VXLAN in VXLAN"], 1000)
    assert frame.flow == bytes([10, 1, 0, 1, 10, 2, 0, 2]) + struct.pack("!HH", 40001, 443)


def test_bytes_behind_the_ip_packet_are_no_options() -> None:
    trailer = captures.timestamp(5, 6)
    long_header = MINIMAL[:32] + b"\x80" + MINIMAL[33:]  # it claims options, for which its IP header has no room
    for link, wrapped in ((ETHERNET, ether), (captures.RAW, bytes), (captures.SLL, captures.sll)):
        assert look(link, wrapped(MINIMAL) + trailer) == (layers.TCP, options.NONE)
        assert look(link, wrapped(long_header) + trailer) == (layers.TCP, options.CUT)
    inner = captures.ipv4(17, captures.udp(4789, captures.vxlan(ether(long_header))))
    assert look(ETHERNET, ether(inner) + trailer) == (layers.TCP, options.CUT)
    assert look(ETHERNET, ether(inner, tags=[(0x8100, 1)]) + trailer) == (layers.TCP, options.CUT)


@pytest.mark.parametrize("name", [*WRAPPED, "RAW, IPv6"])
def test_a_frame_that_the_snap_length_cuts_is_cut_and_never_taken_for_one_without_tsopt(name: str) -> None:
    link, whole = LINKED.get(name) or (ETHERNET, WRAPPED[name])
    for size in range(len(whole)):
        answer, tsval = look(link, whole[:size], len(whole))
        if answer == layers.TCP:
            assert tsval in (options.CUT, options.UNREADABLE, TSVAL), size
        else:
            assert answer in (layers.CUT, layers.CUT_PORTS), size


@pytest.mark.parametrize("kept", [34, 36, 38, 50, 54, 56, 60, 64, 66])
def test_a_packet_that_its_mirror_has_cut_is_cut_though_the_frame_is_whole(kept: int) -> None:
    inside = captures.erspan2(ether(PLAIN)[:kept])
    answer, tsval = look(ETHERNET, ether(captures.ipv4(47, captures.gre(0x88BE, inside, 0x1000))))
    assert (answer, tsval) == (layers.CUT_PORTS, None) if kept < 38 else tsval in (options.CUT, options.UNREADABLE, TSVAL)


def test_a_first_fragment_that_ends_in_the_tcp_header_is_cut() -> None:
    assert look(ETHERNET, ether(captures.ipv4(6, PLAIN[20:42], fragment=0x2000))) == (layers.TCP, options.CUT)
    assert look(ETHERNET, ether(captures.ipv4(6, PLAIN[20:44], fragment=0x2000))) == (layers.TCP, options.UNREADABLE)
    assert look(ETHERNET, ether(captures.ipv4(6, PLAIN[20:28], fragment=0x2000))) == (layers.TCP, options.CUT)


# Options

MSS, SACK, SCALE = bytes([2, 4, 5, 180]), bytes([4, 2]), bytes([1, 3, 3, 7])
STAMP = bytes([8, 10]) + struct.pack("!II", TSVAL, 9)


@pytest.mark.parametrize(
    ("field", "found"),
    [
        (b"", options.NONE),
        (MSS + SACK + STAMP + SCALE, TSVAL),
        (b"\1\1" + STAMP, TSVAL),
        (STAMP + b"\1\1", TSVAL),
        (b"\1" * 30 + STAMP, TSVAL),
        (b"\0\1" + STAMP, options.NONE),  # behind the end of the list
        (bytes([30, 12]) + bytes(10) + b"\1\1" + STAMP, TSVAL),
        (bytes([254, 0, 1, 1]) + STAMP, options.NONE),  # a length of 0: a receiver stops there
        (bytes([254, 1]) + STAMP, options.NONE),
        (bytes([254, 40]) + STAMP, options.NONE),
        (bytes([8, 4, 0, 0]) + MSS, options.UNREADABLE),
        (bytes([8, 10, 0, 0]), options.NONE),  # beyond the header
        (bytes([1, 1, 1, 8]), options.NONE),
        (STAMP + b"\0\0" + STAMP, TSVAL),
    ],
)
def test_options_are_read_as_a_receiver_reads_them(field: bytes, found: int) -> None:
    assert options.tsval_of(field, 0, len(field)) == found
    assert options.tsval_of(b"x" * 20 + field + b"\1\1" + STAMP, 20, 20 + len(field)) == found


@pytest.mark.parametrize("size", range(22))
def test_options_that_are_cut_tell_what_is_there(size: int) -> None:
    field = MSS + SACK + STAMP + SCALE + b"\1\1"
    known = options.CUT if size <= 6 else options.UNREADABLE if size < 12 else TSVAL
    assert options.tsval_of(field[:size], 0, len(field)) == known


# Formats


@ORDERS
@pytest.mark.parametrize("ns", [False, True], ids=["us", "ns"])
def test_pcap_is_read_in_each_resolution_and_byte_order(order: str, ns: bool, tmp_path: Path) -> None:
    stamped = [frame._replace(time_ns=frame.time_ns + 123_456) for frame in FRAMES]
    found, notes = read(captures.write(tmp_path / "x", captures.pcap(stamped, order=order, ns=ns)))
    unit = 1 if ns else 1000
    assert found == [(frame.time_ns // unit * unit, ETHERNET, frame.data, len(frame.data)) for frame in stamped]
    assert (notes.problem, notes.drops) == ("", 0)


def test_the_checksum_flags_beside_the_link_type_are_no_part_of_it(tmp_path: Path) -> None:
    data = bytearray(captures.pcap(FRAMES))
    data[20:24] = struct.pack("<I", 0x44000001)
    assert {link for _, link, _, _ in read(captures.write(tmp_path / "x", bytes(data)))[0]} == {ETHERNET}


@ORDERS
@pytest.mark.parametrize(
    ("resolution", "per_second"),
    [(None, 10**6), (3, 10**3), (6, 10**6), (9, 10**9), (10, 10**10), (0x80 | 20, 1 << 20), (0, 1)],
)
def test_pcapng_times_have_the_resolution_of_their_interface(
    order: str, resolution: Optional[int], per_second: int, tmp_path: Path
) -> None:
    told = b"" if resolution is None else captures.option(order, 9, bytes([resolution]))
    blocks = [captures.section(order), captures.interface(order, options=told)]
    blocks += [captures.enhanced(frame, order, per_second) for frame in FRAMES]
    found, _ = read(captures.write(tmp_path / "x", blocks))
    for (time_ns, *_), frame in zip(found, FRAMES):
        assert 0 <= frame.time_ns - time_ns <= 10**9 // per_second
    assert [data for _, _, data, _ in found] == [frame.data for frame in FRAMES]


def test_pcapng_times_are_counted_from_the_offset_of_their_interface(tmp_path: Path) -> None:
    options_ = captures.option("<", 14, struct.pack("<q", -3600))
    blocks = [captures.section(), captures.interface(options=options_), captures.enhanced(FRAMES[0])]
    found, _ = read(captures.write(tmp_path / "x", blocks))
    assert found[0][0] == FRAMES[0].time_ns - 3600 * 10**9


def test_pcapng_sections_have_interfaces_and_a_byte_order_of_their_own(tmp_path: Path) -> None:
    raw = Frame(BEGUN_NS, PLAIN, interface=1)
    blocks = [
        *(captures.section("<"), captures.interface("<", ETHERNET), captures.interface("<", captures.RAW)),
        *(captures.enhanced(FRAMES[0], "<"), captures.enhanced(raw, "<")),
        *(captures.section(">"), captures.interface(">", captures.RAW), captures.enhanced(raw._replace(interface=0), ">")),
        captures.old_packet(raw._replace(interface=0), ">"),
        captures.simple(raw, ">"),
        captures.enhanced(raw._replace(interface=5), ">"),
        captures.enhanced(raw._replace(interface=0), ">"),
    ]
    found, notes = read(captures.write(tmp_path / "x", blocks))
    assert [link for _, link, _, _ in found] == [ETHERNET, *[captures.RAW] * 4, records.NO_INTERFACE, captures.RAW]
    assert {data for _, _, data, _ in found[1:]} == {PLAIN} and notes.problem == ""


def test_a_simple_packet_is_as_long_as_the_snap_length_of_the_first_interface(tmp_path: Path) -> None:
    cut = Frame(0, FRAMES[0].data[:50], len(FRAMES[0].data))
    blocks = [captures.section(), captures.interface(snap=50), captures.interface(snap=10), captures.simple(cut)]
    assert read(captures.write(tmp_path / "x", blocks))[0] == [(0, ETHERNET, cut.data, cut.length)]


@ORDERS
def test_drops_are_those_that_the_statistics_or_the_packets_tell_and_none_is_counted_twice(order: str, tmp_path: Path) -> None:
    one = captures.option(order, 4, struct.pack(order + "Q", 3))
    blocks = [captures.section(order), captures.interface(order), captures.interface(order)]
    blocks += [captures.enhanced(FRAMES[0], order, options=one), captures.enhanced(FRAMES[1], order, options=one)]
    blocks += [captures.old_packet(FRAMES[2]._replace(interface=1), order, 5), captures.old_packet(FRAMES[2], order)]
    assert read(captures.write(tmp_path / "packets", blocks))[1].drops == 3 + 3 + 5
    blocks += [captures.statistics(order, 0, ifdrop=4, osdrop=1), captures.statistics(order, 0, ifdrop=7, osdrop=2)]
    assert read(captures.write(tmp_path / "both", blocks))[1].drops == 7 + 2 + 5
    blocks += [captures.section(order), captures.interface(order), captures.statistics(order, 0, osdrop=100)]
    assert read(captures.write(tmp_path / "sections", blocks))[1].drops == 7 + 2 + 5 + 100


def test_blocks_of_any_other_kind_are_passed_over_however_long(tmp_path: Path) -> None:
    secrets, names = captures.block("<", 10, bytes(3_000_000)), captures.block("<", 4, bytes(4))
    blocks = [captures.section(), captures.interface(), secrets, captures.enhanced(FRAMES[0]), names]
    blocks += [captures.block("<", 0x1234, bytes(8)), captures.enhanced(FRAMES[1])]
    found, notes = read(captures.write(tmp_path / "x", blocks))
    assert [data for _, _, data, _ in found] == [frame.data for frame in FRAMES[:2]]
    assert notes.problem == ""


@pytest.mark.parametrize("size", [16, 3_000_000])
def test_blocks_that_wireshark_numbers_among_the_frames_are_numbered_too(size: int, tmp_path: Path) -> None:
    journal = captures.block("<", 9, b"MESSAGE=hello\n" + b"x" * size)
    custom = [captures.block("<", kind, struct.pack("<I", 32473) + bytes(size)) for kind in (0x0BAD, 0x40000BAD)]
    blocks = [captures.section(), captures.interface(), journal, *custom, captures.enhanced(FRAMES[0])]
    path = tmp_path / "x"
    found, _ = read(captures.write(path, blocks))
    assert [link for _, link, _, _ in found] == [*[records.NO_PACKET] * 3, ETHERNET]
    if TSHARK and size == 16:
        assert by_tshark(path) == by_us(path)


@pytest.mark.parametrize("kind", ["pcap", "pcapng"])
def test_gzip_is_unpacked_also_of_several_members(kind: str, tmp_path: Path) -> None:
    whole = whole_file(kind)
    members = gzip.compress(whole[:100]) + gzip.compress(whole[100:])
    path = captures.write(tmp_path / "x", members)
    assert read(path)[0] == read(captures.write(tmp_path / "y", whole))[0]
    assert read(path)[1].problem == ""


def whole_file(kind: str, order: str = "<") -> bytes:
    if kind == "pcap":
        return captures.pcap(FRAMES, order=order)
    blocks = [captures.section(order), captures.interface(order), *(captures.enhanced(frame, order) for frame in FRAMES)]
    return b"".join(blocks)


@ORDERS
@pytest.mark.parametrize("kind", ["pcap", "pcapng"])
def test_a_file_that_is_cut_anywhere_gives_its_whole_records_and_says_that_it_is_cut(
    kind: str, order: str, tmp_path: Path
) -> None:
    whole = whole_file(kind, order)
    every = read(captures.write(tmp_path / "whole", whole))[0]
    ends = {len(whole_file_of(kind, order, count)) for count in range(len(FRAMES) + 1)}
    first = min(ends)
    ends |= {28} if kind == "pcapng" else set()  # behind the section's header
    for size in range(28 if kind == "pcapng" else first, len(whole)):
        found, notes = read(captures.write(tmp_path / "x", whole[:size]))
        assert found == every[: len(found)]
        assert bool(notes.problem) == (size not in ends), size
        assert len(found) == sum(end <= size for end in ends - {first, 28}), size


def whole_file_of(kind: str, order: str, count: int) -> bytes:
    if kind == "pcap":
        return captures.pcap(FRAMES[:count], order=order)
    blocks = [captures.section(order), captures.interface(order)]
    return b"".join([*blocks, *(captures.enhanced(frame, order) for frame in FRAMES[:count])])


def test_a_gzip_file_that_is_cut_or_damaged_says_so(tmp_path: Path) -> None:
    packed = gzip.compress(whole_file("pcap"), mtime=0)
    found, notes = read(captures.write(tmp_path / "x", packed[:-20]))
    assert notes.problem == "the gzip file is cut short"
    assert len(found) < len(FRAMES)
    damaged = gzip.compress(captures.pcap(FRAMES * 1000), mtime=0)[:-8] + bytes(8)  # another checksum
    found, notes = read(captures.write(tmp_path / "y", damaged))
    assert notes.problem == "the gzip file is damaged"
    assert [data for _, _, data, _ in found[:8]] == [frame.data for frame in FRAMES]
    assert read(captures.write(tmp_path / "z", packed + b"more"))[1].problem == "the gzip file is damaged"


def test_a_record_of_an_impossible_length_ends_the_file_and_is_told(tmp_path: Path) -> None:
    head, tail = captures.pcap(FRAMES[:2]), captures.pcap(FRAMES[2:])[24:]
    found, notes = read(captures.write(tmp_path / "x", head + struct.pack("<IIII", 0, 0, 0x7FFFFFFF, 60) + tail))
    assert len(found) == 2 and "damaged" in notes.problem
    blocks = [captures.section(), captures.interface(), captures.enhanced(FRAMES[0])]
    for wrong in (struct.pack("<II", 6, 33), struct.pack("<II", 6, 8), struct.pack("<II", 6, 0x7FFFFFF0)):
        found, notes = read(captures.write(tmp_path / "x", [*blocks, wrong + bytes(100)]))
        assert len(found) == 1 and "damaged" in notes.problem, wrong
    wrong = captures.enhanced(FRAMES[1])[:-4] + struct.pack("<I", 12)
    found, notes = read(captures.write(tmp_path / "x", [*blocks, wrong, captures.enhanced(FRAMES[1])]))
    assert len(found) == 1 and "two lengths" in notes.problem


def test_what_is_no_capture_is_refused_with_the_reason(tmp_path: Path) -> None:
    assert refused(captures.write(tmp_path / "x", b"")) == "empty"
    for data in (b"x", b"GIF89a", b"\xa1\xb2\xc3", gzip.compress(b"hello"), b"\x1f\x8b"):
        assert refused(captures.write(tmp_path / "x", data)), data
    assert refused(captures.write(tmp_path / "x", captures.pcap([])[:20])) == "a pcap file that is cut in its header"
    assert refused(captures.write(tmp_path / "x", pcapng.MAGIC + bytes(40))) == "a pcapng file without a byte order"


def test_frames_come_as_a_pipe_brings_them_byte_by_byte(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for whole in (captures.pcap(FRAMES[:2]), gzip.compress(captures.pcap(FRAMES[:2]))):
        writer = threading.Thread(target=_dribble, args=(fifo, whole))
        writer.start()
        assert [data for _, _, data, _ in read(fifo)[0]] == [frame.data for frame in FRAMES[:2]]
        writer.join()


def _dribble(path: Path, data: bytes) -> None:
    with path.open("wb", buffering=0) as pipe:
        for at in range(len(data)):
            pipe.write(data[at : at + 1])


# tshark, the independent second opinion

TSHARK = shutil.which("tshark")
WORDS = "-n -o ip.defragment:FALSE -o ipv6.defragment:FALSE -T fields -e tcp.srcport -e tcp.option_kind".split()
needs_tshark = pytest.mark.skipif(TSHARK is None, reason="LOUD: no tshark: nobody else has read these captures")
# Where tshark 4.0 and the RFCs differ: a payload length of 0 without a jumbo option (BIG TCP), a control word of zeros,
# which it takes for the beginning of an address, PPPoE, which it looks into, a header of 16 bytes, which it calls bogus
OWN_WAY = {
    "IPv6 of payload length 0",
    "MPLS, Ethernet with a control word",
    "PPPoE",
    "TCP with a header of 16 bytes",
    "40 labels",
}


def by_tshark(path: Path) -> List[Seen]:
    """(layers.TCP or "", 8 or None) for each frame."""
    done = subprocess.run([str(TSHARK), *WORDS, "-r", str(path)], capture_output=True, text=True, check=True)
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    return [("tcp" if port else "", 8 if "8" in kinds.split(",") else None) for port, kinds in rows]


def by_us(path: Path) -> List[Seen]:
    found = []
    for _, link, data, length in read(path)[0]:
        answer, tsval = look(link, data, length)
        stamped = answer == layers.TCP and tsval not in (options.NONE, options.CUT)
        found.append(("tcp" if answer == layers.TCP else "", 8 if stamped else None))
    return found


@needs_tshark
def test_tshark_finds_the_same_in_each_wrapping(tmp_path: Path) -> None:
    wrapped = {**WRAPPED, **{name: frame for name, (frame, _) in OTHERS.items()}}
    chosen = {name: frame for name, frame in wrapped.items() if name not in OWN_WAY}
    path = tmp_path / "x"
    captures.write(path, captures.pcap([Frame(BEGUN_NS, frame) for frame in chosen.values()]))
    assert dict(zip(chosen, by_us(path))) == dict(zip(chosen, by_tshark(path)))


@needs_tshark
def test_tshark_finds_the_same_behind_each_link_type(tmp_path: Path) -> None:
    blocks = [captures.section(">")]
    for number, (link, frame) in enumerate(LINKED.values()):
        blocks += [captures.interface(">", link), captures.enhanced(Frame(BEGUN_NS, frame, interface=number), ">")]
    path = tmp_path / "x"
    captures.write(path, blocks)
    assert dict(zip(LINKED, by_us(path))) == dict(zip(LINKED, by_tshark(path)))


PUBLIC = ROOT / "tests/support/captures-of-tcpdump"
EXPECTED: Dict[str, List[int]] = {
    name: [int(count) for count in counts]
    for name, *counts in (line.split("\t") for line in (PUBLIC / "EXPECTED.tsv").read_text().splitlines()[1:])
}


def test_each_public_capture_has_its_expected_counts() -> None:
    assert EXPECTED.keys() == {path.name for path in PUBLIC.glob("*.pcap*")}


@pytest.mark.parametrize("name", EXPECTED)
def test_public_captures_have_as_many_segments_and_tsopts_as_tshark_says(name: str) -> None:
    found = by_us(PUBLIC / name)
    segments = [stamped for answer, stamped in found if answer == layers.TCP]
    assert [len(found), len(segments), segments.count(8)] == EXPECTED[name]


# Any bytes

unhurried = settings(deadline=None, max_examples=300)
every_frame = [*((ETHERNET, frame) for frame in WRAPPED.values()), *LINKED.values()]


@unhurried
@given(
    st.sampled_from([0, 1, 12, 101, 108, 113, 228, 229, 276, 1 << 16, -1, -2, 147]),
    st.binary(max_size=200),
    st.integers(0, 300),
)
def test_any_bytes_are_a_frame(link: int, data: bytes, more: int) -> None:
    assert isinstance(look(link, data, len(data) + more)[0], str)


@unhurried
@given(st.sampled_from(every_frame), st.data())
def test_a_frame_with_any_bytes_changed_is_still_read(chosen: Tuple[int, bytes], data: st.DataObject) -> None:
    link, frame = chosen
    changed = bytearray(frame)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    assert isinstance(look(link, bytes(changed))[0], str)


@unhurried
@given(st.sampled_from([whole_file(kind, order) for kind in ("pcap", "pcapng") for order in "<>"]), st.data())
def test_a_file_with_any_bytes_changed_is_read_or_refused(whole: bytes, data: st.DataObject) -> None:
    changed = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 6))):
        changed[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    taken(bytes(changed[: data.draw(st.integers(0, len(whole)))]))


@unhurried
@given(
    st.sampled_from([b"", captures.pcap([]), captures.section(), captures.section() + captures.interface(), b"\x1f\x8b"]),
    st.binary(),
)
@example(captures.section(), b"\1\0\0\0\x0c\0\0\0\x0c\0\0\0")  # an interface without a body
@example(captures.section() + captures.interface(), b"\6\0\0\0\x0c\0\0\0\x0c\0\0\0")  # a packet without one
def test_any_bytes_are_a_file_or_none(head: bytes, rest: bytes) -> None:
    taken(head + rest)


def taken(data: bytes) -> None:
    """Through a pipe, so that nothing is left behind."""
    reader, writer = os.pipe()
    os.write(writer, data)
    os.close(writer)
    try:
        for time_ns, link, frame, length in files.frames(f"/proc/self/fd/{reader}", Notes()):
            assert -(2**63) <= time_ns < 2**63
            look(link, frame, length)
    except NoCapture:
        pass
    finally:
        os.close(reader)


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    code = """if True:
        import sys
        from _tsproxy.capture import files
        from _tsproxy.capture.records import Notes
        count = sum(1 for _ in files.frames(sys.argv[1], Notes()))
        print(count, open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
    """
    small = captures.pcap([Frame(BEGUN_NS, ether(segment(5, payload=bytes(1400))))] * 100)
    told = []
    for count in (1, 400):
        path = captures.write(tmp_path / "x", small + small[24:] * (count - 1))
        words = [sys.executable, "-c", code, path]
        done = subprocess.run(
            words, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT / "lib")}
        )
        told.append([int(word) for word in done.stdout.split()])
    assert [count for count, _ in told] == [100, 40_000]
    assert told[1][1] - told[0][1] < 8_000, told  # KiB; the second file has 59 MB
