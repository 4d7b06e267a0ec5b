"""`audit FILE...`: flows, verdicts, exit codes, the JSON objects and the table, from captures made by hand."""

from __future__ import annotations

import ast
import contextlib
import gzip
import io
import json
import re
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import captures
import pytest
from _tsproxy.capture import files
from _tsproxy.capture.records import NoCapture, Notes
from _tsproxy.cli import parser
from _tsproxy.cli.config import UsageError
from _tsproxy.cli.exits import Exit
from _tsproxy.tools import audit
from _tsproxy.tools.audit import objects
from _tsproxy.tools.audit import table as tables
from _tsproxy.tools.audit.flows import Flows
from _tsproxy.tools.audit.report import report
from _tsproxy.tools.audit.scope import Scope
from captures import BEGUN_NS, CLIENT, CLIENT6, MS, SERVER, SERVER6, Frame, ether, framed, segment
from common.segments import ACK, RST, SYN
from docopt import docopt
from harness import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st
from unprivileged import as_nobody

MANUAL = ast.get_docstring(ast.parse((ROOT / "tsproxy.py").read_text()), clean=False) or ""
CLEAN_CODE, LEAK_CODE, NO_VERDICT, USAGE = 0, 78, 65, 2
REVERSE = {"source": SERVER, "target": CLIENT}
FLOW_FIELDS = {
    *("event", "source", "source_port", "destination", "destination_port", "segments", "segments_with_timestamps"),
    *("segments_cut", "syn_seen", "syn_ack_seen", "first_leak_frame", "first_leak_file", "verdict", "span_s"),
    *("clock_hz", "clock_hz_low", "clock_hz_high", "clock_class", "clock_group", "skew_ppm", "skew_ppm_error"),
}
END_FIELDS = {
    *("event", "verdict", "files", "frames", "flows", "senders", "segments", "segments_with_timestamps"),
    *("judged_from", "judged_to", "reported_drops", "unparsed"),
}
Object = Dict[str, Any]


class Verdict(NamedTuple):
    """What `audit --json` said and ended with."""

    code: int
    flows: List[Object]
    end: Object

    def of(self, source: str = CLIENT[0], port: int = CLIENT[1]) -> Object:
        """The flow of that sender."""
        return next(flow for flow in self.flows if (flow["source"], flow["source_port"]) == (source, port))

    @property
    def words(self) -> List[str]:
        return [flow["verdict"] for flow in self.flows]


Audit = Callable[..., Verdict]


@pytest.fixture
def judge(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> Audit:
    """judge(captures or frames..., options...) -> Verdict."""

    def run(*given: Any, options: Sequence[str] = ()) -> Verdict:
        paths = []
        for number, data in enumerate(given):
            whole = data if isinstance(data, bytes) else captures.pcap(data)
            paths.append(captures.write(tmp_path / f"{number}.pcap", whole))
        code = audit.run(parser.read(MANUAL, ["audit", *paths, "--json", *options], docopt))
        sys.stdout.flush()
        *flows, end = [json.loads(line) for line in capfdbinary.readouterr().out.splitlines()]
        return Verdict(code, flows, end)

    return run


def at(*packets: bytes, gap_ms: int = 400) -> List[Frame]:
    """Packets one after the other."""
    return [Frame(BEGUN_NS + count * gap_ms * MS, ether(packet)) for count, packet in enumerate(packets)]


SYN_CLEAN, SYN_ACK_CLEAN = segment(flags=SYN), segment(flags=SYN | ACK, **REVERSE)
SYN_STAMPED = segment(5, SYN)


# The objects


def test_a_clean_connection_is_clean_in_both_directions(judge: Audit) -> None:
    found = judge(framed(captures.connection()))
    assert (found.code, found.end["verdict"], found.words) == (CLEAN_CODE, "CLEAN", ["CLEAN", "CLEAN"])
    assert all(flow.keys() == FLOW_FIELDS for flow in found.flows) and found.end.keys() == END_FIELDS
    client, server = found.of(), found.of(*SERVER)
    assert (client["segments"], client["syn_seen"], client["syn_ack_seen"], client["span_s"]) == (5, True, False, 1.75)
    assert (server["segments"], server["syn_seen"], server["syn_ack_seen"]) == (3, False, True)
    assert (client["destination"], client["destination_port"]) == SERVER
    assert [client[name] for name in ("segments_with_timestamps", "segments_cut", "first_leak_frame")] == [0, 0, None]
    counts = {"event": "audit", "files": 1, "frames": 8, "flows": 2, "senders": 2, "segments": 8}
    assert {name: found.end[name] for name in counts} == counts
    assert [found.end[name] for name in ("judged_from", "judged_to", "reported_drops", "unparsed")] == [[], [], 0, 0]


def test_one_segment_with_tsopt_makes_a_leak_and_its_frame_is_named(judge: Audit) -> None:
    clean = at(SYN_CLEAN, SYN_ACK_CLEAN, segment(), segment(), segment(9), segment(10))
    found = judge(framed(captures.connection(port=40002)), clean)
    assert (found.code, found.end["verdict"]) == (LEAK_CODE, "LEAK")
    flow = found.of()
    assert (flow["verdict"], flow["first_leak_frame"], flow["segments_with_timestamps"]) == ("LEAK", 5, 2)
    assert flow["first_leak_file"].endswith("/1.pcap")
    assert found.of(CLIENT[0], 40002)["verdict"] == found.of(*SERVER)["verdict"] == "CLEAN"


def test_frames_are_numbered_as_wireshark_does_from_one_in_each_file_with_those_that_are_no_packets(judge: Audit) -> None:
    blocks = [captures.section(), captures.interface(), captures.enhanced(Frame(BEGUN_NS, ether(bytes(28), 0x0806)))]
    blocks += [
        captures.block("<", 9, b"MESSAGE=journal\n"),
        captures.statistics(ifdrop=0),
        captures.section(),
        captures.interface(),
    ]
    found = judge(framed(captures.connection(port=1)), b"".join([*blocks, captures.enhanced(at(SYN_STAMPED)[0])]))
    assert (found.of()["first_leak_frame"], found.end["frames"], found.end["files"]) == (3, 8 + 3, 2)


def test_first_offending_frame_is_that_of_a_segment_whose_tsval_is_cut(judge: Audit) -> None:
    frame = at(SYN_STAMPED)[0]
    cut = frame._replace(data=frame.data[:59], length=len(frame.data))
    found = judge([cut, *at(segment(5))])
    assert (found.of()["first_leak_frame"], found.of()["segments_with_timestamps"], found.of()["verdict"]) == (1, 2, "LEAK")


# Verdicts


@pytest.mark.parametrize(
    ("frames", "word", "code"),
    [
        (at(SYN_CLEAN, segment()), "CLEAN", CLEAN_CODE),
        (at(SYN_CLEAN), "CLEAN", CLEAN_CODE),
        (at(segment(flags=SYN | ACK), segment()), "CLEAN", CLEAN_CODE),
        (at(segment(), segment()), "UNDECIDED", NO_VERDICT),
        (at(segment(), SYN_CLEAN), "UNDECIDED", NO_VERDICT),  # another connection, before which one was
        (at(SYN_STAMPED), "LEAK", LEAK_CODE),
        (at(SYN_STAMPED, segment(), segment()), "LEAK", LEAK_CODE),
        (at(segment(5), segment(6)), "LEAK", LEAK_CODE),
        (at(SYN_STAMPED, segment(5), segment(5), segment(5)), "CONSTANT", CLEAN_CODE),
        (at(segment(0, SYN), segment(0), segment(0), segment(0)), "CONSTANT", CLEAN_CODE),
        (at(SYN_STAMPED, segment(5), segment(5), segment(flags=RST)), "CONSTANT", CLEAN_CODE),  # it answers for no socket
        (at(SYN_STAMPED, segment(5), segment(5), segment(6)), "LEAK", LEAK_CODE),
        (at(SYN_STAMPED, segment(5), segment(), segment(5)), "LEAK", LEAK_CODE),
        (at(SYN_STAMPED, segment(5), gap_ms=999), "LEAK", LEAK_CODE),  # less than a second
        (at(SYN_STAMPED, segment(5), gap_ms=1000), "CONSTANT", CLEAN_CODE),
        (at(segment(5), segment(5), segment(5), segment(5)), "UNDECIDED", NO_VERDICT),  # and its SYN?
        (at(SYN_STAMPED, segment(5), segment(options=bytes([8, 4, 0, 0])), segment(5)), "LEAK", LEAK_CODE),
        (at(SYN_CLEAN, segment(options=bytes([8, 4, 0, 0]))), "LEAK", LEAK_CODE),
        ([], "UNDECIDED", NO_VERDICT),
        (at(captures.ipv4(17, captures.udp(53, b"x" * 40))), "UNDECIDED", NO_VERDICT),
    ],
)
def test_verdict_of_a_flow(judge: Audit, frames: List[Frame], word: str, code: int) -> None:
    found = judge(frames)
    assert (found.end["verdict"], found.code) == (word, code)
    assert found.words in ([word], []) or word == "UNDECIDED"


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["CLEAN", "CONSTANT"], CLEAN_CODE),
        (["CLEAN", "CONSTANT", "UNDECIDED"], NO_VERDICT),
        (["CLEAN", "CONSTANT", "UNDECIDED", "LEAK"], LEAK_CODE),
    ],
)
def test_the_worst_flow_decides(judge: Audit, words: List[str], code: int) -> None:
    each = {
        "CLEAN": at(segment(flags=SYN, source=("10.1.0.1", 1))),
        "CONSTANT": at(*[segment(5, flags, ("10.1.0.1", 2)) for flags in (SYN, ACK, ACK, ACK)]),
        "UNDECIDED": at(segment(source=("10.1.0.1", 3))),
        "LEAK": at(segment(5, source=("10.1.0.1", 4))),
    }
    found = judge(*(each[word] for word in words))
    assert (found.words, found.end["verdict"], found.code) == (words, words[-1], code)


def test_a_refused_syn_leaves_the_refusing_side_clean(judge: Audit) -> None:
    found = judge(at(SYN_CLEAN, segment(flags=RST | ACK, **REVERSE)))
    assert found.words == ["CLEAN", "CLEAN"]
    assert judge(at(SYN_CLEAN, segment(flags=RST, **REVERSE), segment(**REVERSE))).of(*SERVER)["verdict"] == "UNDECIDED"
    assert judge(at(segment(flags=RST | ACK, **REVERSE))).words == ["UNDECIDED"]


def test_a_direction_needs_its_own_syn_or_syn_ack(judge: Audit) -> None:
    found = judge(at(SYN_CLEAN, segment(**REVERSE), segment()))
    assert (found.of()["verdict"], found.of(*SERVER)["verdict"]) == ("CLEAN", "UNDECIDED")


# What is missing makes UNDECIDED, never CLEAN


def cut_to(size: int) -> List[Frame]:
    return [frame._replace(data=frame.data[:size], length=len(frame.data)) for frame in framed(captures.connection(7))]


@pytest.mark.parametrize("size", range(38, 60))
def test_segments_that_the_snap_length_cuts_before_their_options_make_no_flow_clean(judge: Audit, size: int) -> None:
    found = judge(cut_to(size))
    client = found.of()
    assert client["segments"] == 5
    assert client["verdict"] == ("UNDECIDED" if client["segments_with_timestamps"] == 0 else "LEAK")
    assert client["segments_cut"] + client["segments_with_timestamps"] == 5
    assert found.code == (LEAK_CODE if size >= 57 else NO_VERDICT)


@pytest.mark.parametrize("source", [CLIENT, CLIENT6], ids=["IPv4", "IPv6"])
def test_a_segment_that_is_cut_in_front_of_its_ports_is_of_no_flow(judge: Audit, source: Tuple[str, int]) -> None:
    frame = at(segment(7, SYN, source, SERVER if source == CLIENT else SERVER6))[0]
    ports = 34 if source == CLIENT else 54
    for size in range(ports + 4):
        found = judge([frame._replace(data=frame.data[:size], length=len(frame.data))])
        kind = "unparsed_cut_ports" if size >= ports else "unparsed_cut"
        assert (found.code, found.flows, found.end["unparsed"], found.end[kind]) == (NO_VERDICT, [], 1, 1), size


def test_segments_that_are_cut_behind_their_options_are_clean(judge: Audit) -> None:
    found = judge([frame._replace(data=frame.data[:54], length=200) for frame in framed(captures.connection())])
    assert (found.words, found.code) == (["CLEAN", "CLEAN"], CLEAN_CODE)


def test_segments_that_are_cut_in_front_of_their_ports_blur_the_flows_between_these_addresses(judge: Audit) -> None:
    other = at(segment(flags=SYN, source=("10.1.0.9", 1)))
    blurred = at(segment())[0]
    found = judge([*framed(captures.connection()), *other, blurred._replace(data=blurred.data[:36], length=54)])
    assert (found.of()["verdict"], found.of(*SERVER)["verdict"]) == ("UNDECIDED", "CLEAN")
    assert found.of("10.1.0.9", 1)["verdict"] == "CLEAN"
    assert (found.end["unparsed"], found.end["unparsed_cut_ports"]) == (1, 1)


@pytest.mark.parametrize(("frames", "word"), [(captures.connection(), "UNDECIDED"), (captures.connection(7), "LEAK")])
def test_reported_drops_make_no_flow_clean(judge: Audit, frames: List[Tuple[int, bytes]], word: str) -> None:
    blocks = [captures.section(), captures.interface(), *(captures.enhanced(frame) for frame in framed(frames))]
    found = judge(b"".join([*blocks, captures.statistics(ifdrop=0, osdrop=2)]))
    assert (found.end["reported_drops"], found.end["verdict"]) == (2, word)
    constant = [captures.enhanced(frame) for frame in at(SYN_STAMPED, segment(5), segment(5), segment(5))]
    assert judge(b"".join([*blocks[:2], *constant, captures.statistics(ifdrop=1)])).words == ["UNDECIDED"]
    assert judge(b"".join([*blocks[:2], *constant, captures.statistics(ifdrop=0)])).words == ["CONSTANT"]


def test_a_file_that_is_cut_or_damaged_makes_no_flow_clean(judge: Audit) -> None:
    whole = captures.pcap(framed(captures.connection()))
    packed = gzip.compress(whole * 2, mtime=0)[:-9]
    for data in (whole[:-1], whole + b"\0" * 8, whole + struct.pack("<IIII", 0, 0, 1 << 30, 1), packed):
        found = judge(data)
        assert (found.code, found.end["unparsed_record"]) == (NO_VERDICT, 1)
        assert set(found.words) == {"UNDECIDED"}


@pytest.mark.parametrize("tags", [[], [(0x8100, 5)]], ids=["plain", "tagged"])
def test_a_taps_trailer_is_no_option(judge: Audit, tags: List[Tuple[int, int]]) -> None:
    trailer = captures.timestamp(5, 6)
    padded = [Frame(BEGUN_NS, ether(packet, tags=tags) + trailer) for packet in (SYN_CLEAN, segment())]
    assert judge(padded).of()["verdict"] == "CLEAN"
    claims_more = segment()[:32] + b"\x80" + segment()[33:]  # options for which its IP header has no room
    flow = judge([*padded, Frame(BEGUN_NS, ether(claims_more, tags=tags) + trailer)]).of()
    assert (flow["segments_with_timestamps"], flow["segments_cut"], flow["verdict"]) == (0, 1, "UNDECIDED")


# Flows


def test_what_was_sent_before_the_syn_makes_the_flow_undecided_whatever_the_order_of_the_files(judge: Audit) -> None:
    earlier = [frame._replace(time_ns=frame.time_ns - 60_000 * MS) for frame in at(segment(), segment())]
    assert judge(framed(captures.connection()), earlier).of()["verdict"] == "UNDECIDED"
    assert judge(framed(captures.connection())).of()["verdict"] == "CLEAN"


def test_a_port_that_is_used_again_begins_another_flow(judge: Audit) -> None:
    first = framed(captures.connection(7))
    second = at(segment(flags=SYN, sequence=5_000_000), segment(flags=SYN | ACK, sequence=9, **REVERSE))
    found = judge([*first, *(frame._replace(time_ns=frame.time_ns + 60_000 * MS) for frame in second)])
    assert [(flow["source_port"], flow["verdict"], flow["segments"]) for flow in found.flows] == [
        *[(40001, "LEAK", 5), (443, "CLEAN", 3)],
        *[(40001, "CLEAN", 1), (443, "CLEAN", 1)],
    ]


def test_a_syn_that_is_sent_again_or_captured_twice_begins_no_other_flow(judge: Audit) -> None:
    frames = framed(captures.connection())
    found = judge([frames[0], *(frame for frame in frames for _ in range(2))])
    assert [flow["segments"] for flow in found.flows] == [11, 6]


def test_files_may_be_given_in_any_order(judge: Audit) -> None:
    frames = framed(captures.connection())
    assert judge(frames[:3], frames[3:]).words == judge(frames[3:], frames[:3]).words == ["CLEAN", "CLEAN"]
    assert judge(frames[3:], frames[:3]).of()["span_s"] == 1.75
    assert judge(frames[3:]).words == ["UNDECIDED", "UNDECIDED"]


def test_segments_inside_and_outside_a_tunnel_are_one_flow(judge: Audit) -> None:
    packets = [packet for _, packet in captures.connection()]
    tunnel = [ether(captures.ipv4(47, captures.gre(0x0800, packet))) for packet in packets[1:]]
    found = judge([*at(packets[0]), *(Frame(BEGUN_NS + MS, frame) for frame in tunnel)])
    assert [flow["segments"] for flow in found.flows] == [5, 3] and found.end["verdict"] == "CLEAN"


def test_samples_span_the_whole_flow_and_their_number_is_bounded() -> None:
    direction = audit.flows.Direction(bytes([10, 0, 0, 1, 10, 0, 0, 2, 0, 1, 0, 2]), 0)
    for count in range(100_000):
        direction.add(count * MS, ACK, count)
        assert len(direction.samples) <= 1024 if count % 1000 == 0 else True
    samples = direction.samples
    assert 512 <= len(samples) <= 1024
    assert samples[0] == (0, 0) and samples[-1][1] > 99_000
    steps = {later[1] - earlier[1] for earlier, later in zip(samples, samples[1:])}
    assert steps == {128}
    assert all(time_ns == tsval * MS for time_ns, tsval in samples)


def test_a_flow_that_is_not_judged_keeps_no_samples() -> None:
    flows = Flows(lambda flow: flow.source == SERVER[0])
    flows.read(iter([(at_ns, 101, packet, len(packet)) for at_ns, packet in captures.connection(7)]), "x")
    client, server = flows.directions
    assert (client.is_judged, client.segments_with_timestamps, client.samples) == (False, 5, [])
    assert server.is_judged


# What is not read is counted by kind


def test_frames_that_can_not_be_read_are_counted_by_kind(judge: Audit) -> None:
    wanted = [kind for _, kind in captures.OTHERS.values()]
    found = judge([*framed(captures.connection()), *(Frame(BEGUN_NS, frame) for frame, _ in captures.OTHERS.values())])
    kinds = {name[len("unparsed_") :]: count for name, count in found.end.items() if name.startswith("unparsed_")}
    assert kinds == {kind: wanted.count(kind) for kind in wanted if kind}
    assert found.end["unparsed"] == sum(kinds.values())
    assert found.end["frames"] == 8 + len(captures.OTHERS)
    assert found.end["verdict"] == "CLEAN"


# --from and -t


def judged(found: Verdict) -> List[str]:
    return [f"{flow['source']}:{flow['source_port']}" for flow in found.flows]


@pytest.mark.parametrize(
    ("options", "who"),
    [
        (["--from=10.1.0.0/16"], ["10.1.0.1:40001"]),
        (["--from=10.1.0.0/16", "--from=10.2.0.2"], ["10.1.0.1:40001", "10.2.0.2:443"]),
        (["-t", "10.2.0.2:443"], ["10.1.0.1:40001"]),
        (["-t", "10.2.0.2:444"], []),
        (["-t", "10.2.0.2:443", "-t", "[2001:db8::2]:443"], ["10.1.0.1:40001", "2001:db8::1:40001"]),
        (["-t", "[2001:DB8:0::2]:443"], ["2001:db8::1:40001"]),
        (["--from=2001:db8::/32", "-t", "10.2.0.2:443"], []),
        (["--from=2001:db8::1"], ["2001:db8::1:40001"]),
    ],
)
def test_options_say_which_senders_are_judged_and_both_must_hold(judge: Audit, options: List[str], who: List[str]) -> None:
    six = at(segment(flags=SYN, source=CLIENT6, target=SERVER6), segment(8, SYN | ACK, source=SERVER6, target=CLIENT6))
    found = judge([*framed(captures.connection()), *six], options=options)
    assert judged(found) == who
    assert (found.end["flows"], found.end["segments"]) == (len(who), sum(flow["segments"] for flow in found.flows))
    assert found.end["judged_from"] == [word[7:] for word in options if word.startswith("--from=")]
    assert found.end["judged_to"] == [word for word in options if not word.startswith("-")]
    assert found.code == (CLEAN_CODE if who else NO_VERDICT)


def test_a_name_is_resolved_and_one_that_can_not_be_ends_with_75(judge: Audit) -> None:
    frames = at(segment(flags=SYN, target=("127.0.0.1", 443)), segment(flags=SYN))
    assert judged(judge(frames, options=["-t", "localhost:443"])) == ["10.1.0.1:40001"]
    with pytest.raises(Exit) as caught:
        judge(frames, options=["-t", "no-such-host.invalid:443"])
    assert caught.value.code == 75 and "no-such-host.invalid" in str(caught.value)


# For people


CHECKOUT = [sys.executable, str(ROOT / "tsproxy.py")]


def table(tmp_path: Path, frames: List[Frame]) -> Tuple[int, List[str]]:
    path = captures.write(tmp_path / "x.pcap", captures.pcap(frames))
    done = subprocess.run([*CHECKOUT, "audit", path], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()


def test_the_table_fits_80_columns_has_the_verdict_last_and_no_colour_in_a_pipe(tmp_path: Path) -> None:
    long = [(f"2001:db8:1111:2222:3333:4444:5555:{host:x}", 65535) for host in (0xAAAA, 0xBBBB)]
    stamped = [segment(5, SYN, *long), segment(6, ACK, *long)]
    frames = [*framed(captures.connection(7)), *at(*stamped), *at(segment(source=("10.1.0.3", 1))), Frame(0, bytes(3))]
    code, lines = table(tmp_path, frames)
    assert code == LEAK_CODE
    assert max(map(len, lines)) <= 80
    assert lines[-1].startswith("LEAK: timestamps left 10.1.0.1")
    assert not any("\x1b" in line for line in lines)
    text = "\n".join(lines)
    assert re.search(r"10\.1\.0\.1:40001 > 10\.2\.0\.2:443 +5 +5 SYN +LEAK\n +first in frame 1\n", text)
    assert "5 flows of 4 senders (" not in text and "4 flows of 4 senders (" in text
    assert "not read: 1 frame (1 malformed)" in text
    assert "its SYN or SYN-ACK, is not in the capture" in text
    assert text.index("CLEAN") < text.index("UNDECIDED") < text.rindex("LEAK")


def test_of_many_flows_with_one_verdict_the_table_shows_some_and_says_how_many_there_are(tmp_path: Path) -> None:
    code, lines = table(tmp_path, at(*(segment(flags=SYN, source=("10.1.0.1", port)) for port in range(1, 501)), gap_ms=1))
    assert (code, len(lines) < 40) == (CLEAN_CODE, True)
    assert "  and 480 more flows CLEAN" in lines
    assert lines[-1] == "CLEAN: no segment that 10.1.0.1 sent has a timestamp"


def test_an_empty_capture_is_undecided_and_says_so(tmp_path: Path) -> None:
    code, lines = table(tmp_path, [])
    assert (code, lines[-1]) == (NO_VERDICT, "UNDECIDED: no such flow in this capture")


# What can't be read


@pytest.mark.parametrize(("kind", "why"), [("missing", "no such file"), ("directory", "it is a directory")])
def test_a_file_that_is_not_there_ends_with_2_before_any_is_read(kind: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    whole = captures.write(tmp_path / "x", captures.pcap(framed(captures.connection(7))))
    with pytest.raises(UsageError) as caught:
        audit.run(parser.read(MANUAL, ["audit", whole, str(tmp_path / kind)], docopt))
    assert str(caught.value).startswith(f"FILE: given {str(tmp_path / kind)!r}: {why}; allowed: ")


@pytest.mark.root
def test_a_file_that_this_user_may_not_read_ends_with_2(bundle: Path) -> None:
    with as_nobody(bundle) as command, tempfile.NamedTemporaryFile() as ours:
        done = subprocess.run([*command, "audit", ours.name], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (USAGE, "", 1)
    assert "it can't be read" in done.stderr


@pytest.mark.parametrize(
    "data",
    [b"", b"no capture", gzip.compress(b"no capture", mtime=0), captures.pcap([])[:10]],
    ids=["empty", "text", "gzip of text", "cut in its header"],
)
def test_what_is_no_capture_ends_with_65_and_one_line(data: bytes, tmp_path: Path) -> None:
    path = captures.write(tmp_path / "x", data)
    with pytest.raises(Exit) as caught:
        audit.run(parser.read(MANUAL, ["audit", path], docopt))
    assert caught.value.code == NO_VERDICT
    assert str(caught.value).startswith(f"{path}: no capture: ")


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_standard_input_is_a_capture_too(packed: bool, tmp_path: Path) -> None:
    whole = captures.pcap(framed(captures.connection(7)))
    command = [*CHECKOUT, "audit", "-", "--json"]
    done = subprocess.run(command, input=gzip.compress(whole, mtime=0) if packed else whole, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (LEAK_CODE, b"")
    assert json.loads(done.stdout.splitlines()[0])["first_leak_file"] == "-"


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--from=10.0.0.1/8"], "--from: given '10.0.0.1/8'; allowed:"),
        (["--from=hosts"], "--from: given 'hosts'; allowed:"),
        (["-t", "10.0.0.1"], "--target: given '10.0.0.1'; allowed:"),
    ],
)
def test_a_bad_option_is_answered_in_one_line(words: List[str], why: str) -> None:
    with pytest.raises(UsageError) as caught:
        audit.run(parser.read(MANUAL, ["audit", "-", *words], docopt))
    assert str(caught.value).startswith(why)


# Any bytes


def stamped_pcapng(order: str) -> bytes:
    """Two senders' clocks, with an interface that tells its resolution and offset."""
    told = captures.option(order, 9, b"\x09") + captures.option(order, 14, struct.pack(order + "q", 1))
    packets = captures.connection(7, segments=30) + captures.connection(1 << 31, 40002, segments=30)
    blocks = [captures.section(order), captures.interface(order, options=told)]
    blocks += [captures.enhanced(frame, order, 10**9) for frame in framed(packets)]
    return b"".join([*blocks, captures.statistics(order, ifdrop=0)])


WHOLE = [captures.pcap(framed(captures.connection(7, segments=40))), stamped_pcapng("<"), stamped_pcapng(">")]


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(WHOLE), st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=12))
@example(WHOLE[1], [(28 + 24 + at, 0x80) for at in range(8)])  # an offset of 10^18 s
@example(WHOLE[1], [(28 + 20, 0)])  # a resolution of a second: 10^18 of them
def test_any_changed_bytes_of_a_capture_are_judged_and_shown(whole: bytes, changes: List[Tuple[int, int]]) -> None:
    changed = bytearray(whole)
    for place, value in changes:
        changed[place % len(whole)] = value
    with tempfile.NamedTemporaryFile() as file:
        file.write(changed)
        file.flush()
        flows, notes = Flows(lambda _: True), Notes()
        with contextlib.suppress(NoCapture):
            flows.read(files.frames(file.name, notes), file.name)
    found = report(flows, Scope(), 1, notes.drops, [notes.problem] if notes.problem else [])
    shown = tables.table(found, io.StringIO())
    assert shown.splitlines()[-1].strip()
    for flow in found.judged:
        assert json.loads(objects.line(objects.of_flow(flow, found.judgements[flow].verdict, found.clocks.get(flow))))
    assert json.loads(objects.line(objects.of_end(found)))["verdict"] == found.verdict


# Each form of the program


def test_each_form_of_the_program_gives_the_same_verdict(form: Tuple[List[str], Optional[Path]], tmp_path: Path) -> None:
    path = captures.write(tmp_path / "x.pcap", captures.pcap(framed(captures.connection(7))))
    command, cwd = form
    done = subprocess.run([*command, "audit", path, "--json"], cwd=cwd, capture_output=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert (done.returncode, done.stderr, [line["verdict"] for line in lines]) == (LEAK_CODE, b"", ["LEAK", "CLEAN", "LEAK"])
