"""`audit`: what captures, or an interface, show of TCP timestamps: a verdict for each flow, and one for all.

It needs nothing of tsproxy and knows nothing of it, so that it is a second witness, also for hosts without tsproxy.
"""

from __future__ import annotations

import os
import sys
from typing import Any, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from _tsproxy.capture import files
from _tsproxy.capture.records import NoCapture, Notes
from _tsproxy.cli import config, exits
from _tsproxy.cli.config import UsageError
from _tsproxy.cli.exits import Exit
from _tsproxy.tools import streams
from _tsproxy.tools.audit import claims, objects, picture, table, verdict
from _tsproxy.tools.audit.flows import Flows
from _tsproxy.tools.audit.lines import Lines
from _tsproxy.tools.audit.live import Watch
from _tsproxy.tools.audit.report import Report, report
from _tsproxy.tools.audit.scope import Scope, scope
from _tsproxy.tools.audit.table import counted


class Order(NamedTuple):
    """What was asked for, checked."""

    files: Tuple[str, ...]
    interface: Optional[str]
    seconds: Optional[float]
    scope: Scope
    lines: Optional[str]
    json: bool
    svg: Optional[str]


def run(options: Mapping[str, Any]) -> int:
    """Read, judge, show. 0 CLEAN or CONSTANT, 78 LEAK, 65 UNDECIDED, or where a file is no capture."""
    order = _order(options)
    found = _read(order)
    _show(found, order)
    return verdict.EXIT_CODES[found.verdict]


def _order(options: Mapping[str, Any]) -> Order:
    sources = [config.network("--from", given) for given in options["--from"]]
    targets = [config.target("--target", given) for given in options["--target"]]
    seconds = options["--seconds"]
    return Order(
        files=tuple(options["FILE"]),
        interface=options["--interface"],
        seconds=None if seconds is None else config.duration(0.001, 30 * 86400.0)("--seconds", seconds),
        scope=scope(sources, targets, options["--from"], options["--target"]),
        lines=options["--lines"],
        json=options["--json"],
        svg=options["--svg"],
    )


def _read(order: Order) -> Report:
    """All files, one after the other, or the interface until the watch ends."""
    _refuse_places(order)
    flows = Flows(lambda flow: order.scope.holds(flow.source, flow.destination, flow.destination_port))
    notes = [_watch(order, order.interface, flows)] if order.interface is not None else _read_files(order.files, flows)
    names = [verdict.named(path) for path in order.files] or [order.interface or ""]
    problems = [f"{name}: {note.problem}" for name, note in zip(names, notes) if note.problem]
    found = report(flows, order.scope, len(order.files), sum(note.drops for note in notes), problems)
    if order.lines is not None:
        found.agreement = claims.agreement(Lines(order.lines), flows.directions, found.judgements, order.scope)
    return found


def _refuse_places(order: Order) -> None:
    """What can't be read or written is told before the first capture is read, which may take long."""
    if order.lines is not None:
        if order.lines == "-" and "-" in order.files:
            raise UsageError("--lines: given '-', and so is FILE; allowed: one of them from standard input")
        Lines(order.lines).refuse()
    if order.svg is not None:
        picture.refuse(order.svg)


def _watch(order: Order, interface: str, flows: Flows) -> Notes:
    notes = Notes()
    progress = lambda: f"{counted(flows.frames, 'frame')}, {counted(len(flows.directions), 'flow')}"  # noqa: E731
    flows.read(Watch(interface, order.seconds, progress).frames(notes), interface)
    return notes


def _read_files(paths: Sequence[str], flows: Flows) -> List[Notes]:
    for path in paths:
        _refuse(path)
    return [_read_file(path, flows) for path in paths]


def _read_file(path: str, flows: Flows) -> Notes:
    """What can't be read ends the command: a verdict on the rest would be one on something else than what was given."""
    notes = Notes()
    try:
        flows.read(files.frames(path, notes), path)
    except NoCapture as problem:
        raise Exit(exits.NO_VERDICT, f"{verdict.named(path)}: no capture: {problem}") from None
    except OSError as problem:
        raise UsageError(_unreadable(path, problem.strerror or str(problem))) from None
    if notes.problem:
        flows.unparsed["record"] += 1
    return notes


def _refuse(path: str) -> None:
    """What can't be read is told before the first file is read, which may take long."""
    if path != "-" and os.path.isdir(path):
        raise UsageError(_unreadable(path, "it is a directory"))
    if path != "-" and not os.access(path, os.R_OK):
        raise UsageError(_unreadable(path, "it can't be read" if os.path.exists(path) else "no such file"))


def _unreadable(path: str, why: str) -> str:
    return f"FILE: given {path!r}: {why}; allowed: captures (pcap or pcapng, gzip too), or - for standard input"


def _show(found: Report, order: Order) -> None:
    if order.json:
        for problem in found.problems:
            streams.say(problem)
        lines: List[bytes] = [
            objects.line(objects.of_flow(flow, found.judgements[flow].verdict, found.clocks.get(flow))) for flow in found.judged
        ]
        lines.append(objects.line(objects.of_end(found)))
        sys.stdout.buffer.write(b"".join(lines))
    else:
        print(table.table(found, sys.stdout))
    if order.svg is not None:
        picture.write(order.svg, found)
