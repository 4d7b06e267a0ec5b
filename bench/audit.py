#!/usr/bin/env python3
"""How fast `audit` reads captures, beside tshark, and how much memory that takes. No relay is started.

  stamped   Ethernet, IPv4, TSopt in each segment: 20 connections, orders and answers.
  clean     the same without TSopt.
  vxlan     the first again, inside VXLAN.

Both are whole processes, from their start to their verdict or last line: `tsproxy.py audit FILE --json`, and
`tshark -n -r FILE -T fields -e frame.number -e tcp.options.timestamp.tsval`, which only prints what audit judges. Both read
a file that is in the page cache. Without tshark there are no ratios.

How to read it: the figure is the median of the rounds, in which both take turns; the ratio is audit's time to tshark's in
the same round: 0.10x is a tenth. Memory is the process's greatest resident set.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence

from common import layout, options, report, session
from common.segments import ACK, PSH, SYN, Segment, packed, timestamp

CASES = ("stamped", "clean", "vxlan")
TOOLS = ("audit", "tshark")
_CONNECTIONS = 20
_FIELDS = "-T fields -e frame.number -e tcp.options.timestamp.tsval".split()
_STATISTIC = "median of the rounds"
_BEGUN_US = 1_700_000_000_000_000
_GAP_US = 50


class Run(NamedTuple):
    """What one process took."""

    seconds: float
    peak_mib: float


def parse() -> argparse.Namespace:
    """The command line."""
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    whole = options.whole
    parser.add_argument("--rounds", type=whole(1, 1000), default=3, help="how often each is measured (default: %(default)s)")
    parser.add_argument("--segments", type=whole(100, 10**8), default=300_000, help="in a file (default: %(default)s)")
    parser.add_argument("--only", choices=CASES, help="one case alone")
    parser.add_argument("--json", action="store_true", help="JSON lines instead of a table")
    parser.add_argument("--tsproxy", type=Path, default=options.CHECKOUT / "tsproxy.py", help="another one, e.g. a bundle")
    return parser.parse_args()


# The capture


def write(path: Path, case: str, segments: int) -> None:
    """Connections one beside the other: a handshake, and orders that are answered."""
    with path.open("wb") as file:
        file.write(bytes.fromhex("d4c3b2a1020004000000000000000000" + "0000040001000000"))  # us, little-endian, Ethernet
        for number, segment in enumerate(_segments(segments, case != "clean")):
            frame = _frame(packed(segment), case)
            at = _BEGUN_US + number * _GAP_US
            head = (at // 10**6, at % 10**6, len(frame), len(frame))
            file.write(b"".join(value.to_bytes(4, "little") for value in head) + frame)


def _segments(count: int, stamped: bool) -> Iterator[Segment]:
    ends = [(("10.1.0.1", 40000 + number), ("10.2.0.2", 443)) for number in range(_CONNECTIONS)]
    sent = [[1, 1] for _ in ends]  # the next sequence numbers of either side
    for number in range(count):
        which, turn = number % _CONNECTIONS, number // _CONNECTIONS
        side, peer = turn % 2, 1 - turn % 2
        flags = SYN if turn == 0 else SYN | ACK if turn == 1 else ACK | PSH
        payload = b"" if turn < 3 else b"x" * 64
        sequence = sent[which][side] - (turn < 2)
        acknowledged = sent[which][peer] if turn else 0
        stamp = timestamp(number * _GAP_US // 1000, 1) if stamped else b""
        yield Segment(ends[which][side], ends[which][peer], flags, sequence, acknowledged, options=stamp, payload=payload)
        sent[which][side] += len(payload)


def _frame(packet: bytes, case: str) -> bytes:
    ethernet = bytes.fromhex("020000000002020000000001")
    frame = ethernet + b"\x08\0" + packet
    if case != "vxlan":
        return frame
    inside = bytes.fromhex("0800000000002a00") + frame
    datagram = b"\xc3\x50\x12\xb5" + (8 + len(inside)).to_bytes(2, "big") + b"\0\0" + inside
    head = b"\x45\0" + (20 + len(datagram)).to_bytes(2, "big") + bytes.fromhex("0001400040110000c0000201c0000202")
    return ethernet + b"\x08\0" + head + datagram


# The measurement


def run(command: Sequence[str]) -> Run:
    """One process to its end; its output is thrown away."""
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return Run(time.perf_counter() - begun, usage.ru_maxrss / 1024)


def commands(tsproxy: Path, path: Path) -> Dict[str, List[str]]:
    """What there is to be run."""
    found = {"audit": [sys.executable, str(tsproxy), "audit", str(path), "--json"]}
    if shutil.which("tshark"):
        found["tshark"] = ["tshark", "-n", "-r", str(path), *_FIELDS]
    return found


def measure(args: argparse.Namespace, case: str, path: Path) -> Dict[str, List[Run]]:
    """Interleaved."""
    taken: Dict[str, List[Run]] = {tool: [] for tool in commands(args.tsproxy, path)}
    for number in range(1, args.rounds + 1):
        for tool, command in commands(args.tsproxy, path).items():
            report.progress(f"audit: {case}, round {number} of {args.rounds}: {tool}", settled=False)
            taken[tool].append(run(command))
    report.clear_progress()
    return taken


def figures(case: str, taken: Dict[str, List[Run]], segments: int) -> Iterator[Dict[str, Any]]:
    """A JSON line for each figure of each tool."""
    for tool, runs in taken.items():
        seconds = [round(one.seconds, 4) for one in runs]
        rounds = {"seconds": seconds, "us_per_segment": [round(value * 1e6 / segments, 3) for value in seconds]}
        rounds["peak_mib"] = [round(one.peak_mib, 1) for one in runs]
        for figure, values in rounds.items():
            told = {"event": "figure", "case": case, "tool": tool, "figure": figure, "value": statistics.median(values)}
            ratio = _ratio(taken) if (tool, figure) == ("audit", "seconds") else None
            yield {**told, "rounds": values, "statistic": _STATISTIC, "ratio_to_tshark": ratio}


def _ratio(taken: Dict[str, List[Run]]) -> Optional[float]:
    """audit's time to tshark's, each round for itself."""
    pairs = zip(taken["audit"], taken.get("tshark", ()))
    ratios = [ours.seconds / theirs.seconds for ours, theirs in pairs]
    return round(statistics.median(ratios), 4) if ratios else None


def show(about: Dict[str, Any], lines: Sequence[Dict[str, Any]]) -> None:
    """For people."""
    print(f"audit: Python {about['python']}; Linux {about['kernel']}; {about['segments']:,} segments in a file")
    print(f"{_STATISTIC} ({about['rounds']}, interleaved); whole processes; ratio: to tshark in the same round")
    table = [["", "s", "us a segment", "peak MiB", "ratio"]]
    for case, tool in dict.fromkeys((line["case"], line["tool"]) for line in lines):
        found = {line["figure"]: line for line in lines if (line["case"], line["tool"]) == (case, tool)}
        ratio = found["seconds"]["ratio_to_tshark"]
        cells = [report.plain(found[name]["value"]) for name in ("seconds", "us_per_segment", "peak_mib")]
        table.append([f"{case}: {tool}", *cells, "" if ratio is None else f"{ratio:.2f}x"])
    report.show("reading a capture", table)


def work() -> int:
    """Measure and show."""
    args = parse()
    where = {"kernel": os.uname().release, "python": platform.python_version(), "warnings": layout.disquiet()}
    about = {"event": "setup", **where, "rounds": args.rounds, "segments": args.segments, "statistic": _STATISTIC}
    for warning in where["warnings"]:
        report.say(f"audit: warning: {warning}")
    lines: List[Dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        for case in CASES:
            if args.only in (None, case):
                path = Path(directory, f"{case}.pcap")
                write(path, case, args.segments)
                lines += figures(case, measure(args, case, path), args.segments)
                path.unlink()
    if args.json:
        for fields in (about, *lines):
            report.json_line("audit", fields)
    else:
        show(about, lines)
    return 0


if __name__ == "__main__":
    sys.exit(session.run("audit", work))
