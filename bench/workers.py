#!/usr/bin/env python3
"""Workers and runtimes: round trips a second through 1, 2, .. workers, for each --runtime that this tsproxy takes.

Half of the CPUs are for the load and the far end, half for the relay; with fewer than four CPUs all share all, and
what more workers bring can't be seen there. A load process for each CPU of the load, --connections each, in closed
loops. Which runtimes there are is asked by starting tsproxy with each; what it refuses, or takes for another, is shown
as "not in this version" (of tsproxy, or of the Python that runs it).

--pieces makes the relay's work outweigh the load's, so that workers can be seen to scale where all share two CPUs: each
message passes tsproxy in pieces of so many bytes, while load and far end send and receive it whole. Peers are left out.

How to read it: a row that grows from left to right scales. A row that shrinks has workers that wait for each other
(threads under one GIL do). "0.80x" beside a figure is its ratio to direct (no relay): where direct is not well
above the rest, the load generator is the limit. haproxy has as many threads, nginx as many processes as workers.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import Dict, Iterator, List, Sequence, Tuple

from common import charts, far_end, layout, load, options, relays, report, session
from common.figures import DIRECT, Figure, Row
from common.relays import Relay
from common.session import Case
from common.trouble import Failed

RUNTIMES = ("threads", "interpreters", "processes")
RATE = Figure("round_trips_per_s", "round trips/s", True)
ABSENT = "not in this version"


def parse() -> argparse.Namespace:
    """The command line."""
    names = [DIRECT, *RUNTIMES, "haproxy", "nginx"]
    parser = options.with_relays(options.parser(__doc__, names, rounds=3, seconds=1.0))
    parser.add_argument("--size", type=options.whole(1, 65536), default=64, help="bytes in a message (default: %(default)s)")
    parser.add_argument(
        "--connections", type=options.whole(1, 500), default=16, help="of each load process (default: %(default)s)"
    )
    parser.add_argument("--pieces", type=options.whole(1024, 65536), help="tsproxy's --buffer-size, without zero-copy")
    parser.add_argument("--workers", type=options.wholes(1, 256), help="comma-separated (default: 1, 2, 4 .. the relay's CPUs)")
    return parser.parse_args()


def counts_of(args: argparse.Namespace, cpus: int) -> List[int]:
    """How many workers to try."""
    if args.workers:
        return sorted(args.workers)
    return sorted({1, 2, cpus} | {1 << step for step in range(9) if 1 << step <= cpus})


def probe(stage: session.Stage, runtimes: Sequence[str]) -> Dict[str, str]:
    """Runtime -> why it can't be had; empty if it can."""
    with far_end.running(far_end.echo, stage.place.load) as target:
        return {runtime: refusal(stage, runtime, target) for runtime in runtimes}


def refusal(stage: session.Stage, runtime: str, target: int) -> str:
    """Why this tsproxy does not run this runtime; empty if it does."""
    try:
        with stage.bed.ours(runtime, f"--runtime={runtime}", "--workers=1").start(target) as running:
            taken = running.start_line.get("runtime")
    except Failed as problem:
        return str(problem)
    return "" if taken == runtime else f"it takes {taken} instead"


def relays_of(stage: session.Stage, runtimes: Sequence[str], workers: int) -> List[Relay]:
    """Direct, each runtime, and the peers that have workers."""
    pieces = stage.args.pieces
    rivals = () if pieces else ("haproxy", "nginx")
    peers = [relay for relay in stage.bed.all(workers=workers) if relay.name in rivals]
    more = [f"--buffer-size={pieces}", "--zero-copy=never"] if pieces else []
    ours = [stage.bed.ours(runtime, f"--runtime={runtime}", f"--workers={workers}", *more) for runtime in runtimes]
    return [relay for relay in (Relay(DIRECT, relays.direct), *ours, *peers) if relay.name in (stage.args.only or [relay.name])]


def measure(stage: session.Stage, relay: relays.Running) -> load.Sample:
    """Round trips of all load processes together, over the same span of time."""
    args = stage.args
    one = partial(load.ping_pong, relay.port, args.size, args.connections, load.Span.lasting(args.seconds))
    samples = stage.load(*[one] * len(stage.place.load))
    return {"round_trips_per_s": sum(sample["round_trips_per_s"] for sample in samples)}


def cases_of(stage: session.Stage, runtimes: Sequence[str]) -> List[Case]:
    """One for each number of workers."""
    cpus = len(stage.place.load)
    found = []
    for count in counts_of(stage.args, len(stage.place.relay)):
        chosen, title = relays_of(stage, runtimes, count), f"{count} worker{'s' if count > 1 else ''}"
        name, how = f"workers-{count}", partial(measure, stage)
        echo = partial(far_end.running, far_end.echo, processes=cpus, wake_at=stage.args.size)
        found.append(Case(name, title, [RATE], echo, how, chosen))
    return found


def picture(cases: Sequence[Case], rows: Sequence[Row]) -> charts.Lines:
    """A line for each relay, over the number of workers."""
    numbers = {case.name: float(case.name.split("-")[1]) for case in cases}
    series: Dict[str, List[charts.Point]] = {}
    for row in rows:
        series.setdefault(row.relay, []).append((numbers[row.case], row.value))
    ticks = [(numbers[case.name], f"{numbers[case.name]:.0f}") for case in cases]
    return charts.Lines("closed loops over many connections", "workers", "round trips per second", ticks, series)


def tables(cases: Sequence[Case], rows: Sequence[Row], refused: Dict[str, str]) -> Iterator[Tuple[str, report.Table]]:
    """One table: a column for each number of workers; and a line for each runtime that is not there."""
    titles = {case.name: case.title for case in cases}
    table = report.comparison(rows, lambda row: titles[row.case]) if rows else [["", ""]]
    table += [[runtime, ABSENT, *[""] * (len(table[0]) - 2)] for runtime in refused]
    yield "round trips per second", table


def work() -> int:
    """Measure and show."""
    args = parse()
    with session.staged("workers", args, layout.halves(args.cpus)) as stage:
        stage.bed.tsproxy.append(f"--max-connections={args.connections * len(stage.place.load) + 10}")
        wanted = [runtime for runtime in RUNTIMES if runtime in args.only or not args.only]
        answers = probe(stage, wanted)
        refused = {runtime: why for runtime, why in answers.items() if why}
        cases = cases_of(stage, [runtime for runtime in wanted if runtime not in refused])
        rows = stage.rows(stage.compare(cases), cases)
        for runtime, why in refused.items():
            report.say(f"workers: {runtime}: {ABSENT}: {why}")
        if args.svg:
            args.svg.write_text(charts.document("tsproxy: workers", str(stage.place), [picture(cases, rows)]))
        code = stage.show(rows, tables(cases, rows, refused))
        if args.json:
            for runtime, why in refused.items():
                report.json_line("workers", {"event": "absent", "relay": runtime, "reason": ABSENT, "detail": why})
        return code


if __name__ == "__main__":
    sys.exit(session.run("workers", work))
