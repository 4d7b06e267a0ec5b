#!/usr/bin/env python3
"""Start-up: how long tsproxy and its peers take until they accept, and the memory that they have then.

Each is started afresh for every round, with each number of --workers (threads of haproxy, processes of nginx):

  start ms    from fork(2) until tsproxy's `start` line is there, or until the peer accepts
  CPU ms      processor time of all its processes until then, which a busy machine changes less
  PSS MiB     all its processes after --seconds: a page that several share counts once. So does one that is shared with a
              program that happens to run as well, say of the same Python: compare figures of one run

How to read it: "1.23x" is the ratio to the best peer with as many workers; below 1.00x is better. From left to right a row
of PSS shows what a worker costs. The second start of a checkout is the faster one, since Python keeps its bytecode
(unless PYTHONDONTWRITEBYTECODE is set); a bundle is compiled at each start. --before PATH adds another tsproxy.py.
--routes=30,200 adds tsproxy with files of so many routes, 2 workers each, and how often it wakes up while nobody connects.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from typing import Dict, Iterator, List, Sequence, Tuple

from common import charts, far_end, layout, load, options, relays, report, session, usage
from common.figures import OURS, Figure, Row
from common.session import Case

FIGURES = [Figure("start_ms", "start ms", False), Figure("cpu_ms", "CPU ms", False), Figure("pss_mib", "PSS MiB", False)]
IDLE = Figure("wakeups_per_s", "wake-ups/s", False)
BEFORE = f"{OURS}-before"
RELAYS = (OURS, "haproxy", "nginx")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = options.with_relays(options.parser(__doc__, [*RELAYS, BEFORE], rounds=5, seconds=0.5))
    parser.add_argument("--workers", type=options.wholes(1, 256), default=[1, 2, 8, 64], help="(default: 1,2,8,64)")
    parser.add_argument("--routes", type=options.wholes(1, 1000), default=[], help="(default: none)")
    parser.add_argument("--before", type=options.program, metavar="PATH", help="another tsproxy.py, to compare with")
    return parser.parse_args()


def relays_of(stage: session.Stage, workers: int) -> List[relays.Relay]:
    """Those that can be had here."""
    found = [relay for relay in stage.bed.all(workers=workers) if relay.name in RELAYS]
    if stage.args.before:
        python, _, *more = stage.bed.tsproxy
        bed = stage.bed._replace(tsproxy=[python, str(stage.args.before), *more])
        found.insert(1, bed.ours(BEFORE, f"--workers={workers}"))
    return [relay for relay in found if relay.name in stage.args.only or not stage.args.only]


def measure(seconds: float, relay: relays.Running) -> load.Sample:
    """The time that it took, and what it holds when nothing is begun any more."""
    assert relay.pid
    cpu_ms = usage.running_ms(relay.pid)
    time.sleep(seconds)
    return {"start_ms": relay.start_ms, "cpu_ms": cpu_ms, "pss_mib": usage.proportional_kib(relay.pid) / 1024}


def measure_idle(seconds: float, relay: relays.Running) -> load.Sample:
    """The same, and its wake-ups in as much time after that."""
    assert relay.pid
    sample, before = measure(seconds, relay), usage.switches(relay.pid)
    time.sleep(seconds)
    return {**sample, "wakeups_per_s": (usage.switches(relay.pid) - before) / seconds}


def case_of(stage: session.Stage, workers: int) -> Case:
    """One number of workers."""
    title = f"{workers} worker{'s' if workers > 1 else ''}"
    echo, how = partial(far_end.running, far_end.echo), partial(measure, stage.args.seconds)
    return Case(f"workers-{workers}", title, FIGURES, echo, how, relays_of(stage, workers))


def routed_case_of(stage: session.Stage, routes: int) -> Case:
    """One number of routes."""
    echo, how = partial(far_end.running, far_end.echo), partial(measure_idle, stage.args.seconds)
    relay = stage.bed.routed(OURS, routes, "--workers=2")
    return Case(f"routes-{routes}", f"{routes} routes", [*FIGURES, IDLE], echo, how, [relay])


def tables(cases: Sequence[Case], rows: Sequence[Row]) -> Iterator[Tuple[str, report.Table]]:
    """One for each figure: a line for each relay, a column for each number of workers, and of routes."""
    titles = {case.name: case.title for case in cases}
    for figure in [*FIGURES, IDLE]:
        cells = {(row.relay, row.case): row for row in rows if row.figure == figure}
        names = dict.fromkeys(relay for relay, _ in cells)
        if not names:
            continue
        lines = [[name, *(report.beside_peer(cells.get((name, case))) for case in titles)] for name in names]
        yield figure.label, [["", *titles.values()], *lines]


def picture(figure: Figure, cases: Sequence[Case], rows: Sequence[Row]) -> charts.Lines:
    """A line for each relay, over the number of workers."""
    places = {case.name: float(place) for place, case in enumerate(cases)}
    series: Dict[str, List[charts.Point]] = {}
    for row in rows:
        if row.figure == figure and row.case in places:
            series.setdefault(row.relay, []).append((places[row.case], row.value))
    ticks = [(places[case.name], case.name.split("-")[1]) for case in cases]
    return charts.Lines(f"{figure.label} (less is better)", "workers", figure.label, ticks, series)


def work() -> int:
    """Measure and show."""
    args = parse()
    with session.staged("startup", args, layout.halves(args.cpus)) as stage:
        of_workers = [case_of(stage, workers) for workers in sorted(args.workers)]
        cases = [*of_workers, *(routed_case_of(stage, routes) for routes in sorted(args.routes))]
        rows = stage.rows(stage.compare(cases), cases)
        if args.svg:
            drawn = [picture(figure, of_workers, rows) for figure in FIGURES]
            args.svg.write_text(charts.document("tsproxy: start-up", str(stage.place), drawn))
        return stage.show(rows, tables(cases, rows), "the best peer")


if __name__ == "__main__":
    sys.exit(session.run("startup", work))
