#!/usr/bin/env python3
"""Any bytes as a capture, led by coverage: atheris (pip install atheris) changes files, and `audit` must judge or refuse them.

    bench/fuzz.py [a directory to keep what it finds in] [tests/captures-of-tcpdump] [-max_total_time=300] [libFuzzer's options]

How to read it: it runs until it is stopped. A traceback, with the file that led to it, is a bug; so is a run out of memory.
The first directory is written to; the captures of the others are where it begins.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "lib"))

try:
    import atheris
except ImportError:
    print("fuzz: needs atheris, which coverage-guided fuzzing of Python takes: pip install atheris", file=sys.stderr)
    sys.exit(2)

with atheris.instrument_imports(include=["_tsproxy.capture", "_tsproxy.tools.audit"]):
    from _tsproxy.capture import files
    from _tsproxy.capture.records import NoCapture, Notes
    from _tsproxy.tools.audit import objects, table
    from _tsproxy.tools.audit.flows import Flows
    from _tsproxy.tools.audit.report import report
    from _tsproxy.tools.audit.scope import Scope


def audit(data: bytes) -> None:
    """From the bytes of a file to the table and the lines."""
    fd = os.memfd_create("capture")
    try:
        os.write(fd, data)
        flows, notes = Flows(lambda _: True), Notes()
        with contextlib.suppress(NoCapture):
            flows.read(files.frames(f"/proc/self/fd/{fd}", notes), "capture")
    finally:
        os.close(fd)
    found = report(flows, Scope(), 1, notes.drops, [notes.problem] if notes.problem else [])
    table.table(found, io.StringIO())
    for flow in found.judged:
        objects.line(objects.of_flow(flow, found.judgements[flow].verdict, found.clocks.get(flow)))
    objects.line(objects.of_end(found))


if __name__ == "__main__":
    atheris.Setup(sys.argv, audit)
    atheris.Fuzz()
