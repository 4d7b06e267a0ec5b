#!/usr/bin/env python3
"""Throughput of one stream in one direction, in Gbit/s, by the size of the messages that the client sends.

The client sends for the time given, then shuts its side down; the clock stops when the far end has taken the last
byte. The far end drops what it gets without copying it.

How to read it: with small messages the client's own system calls are the limit, in direct too; the kernel then joins
many of them before a relay receives. With large ones the relay's copying is the limit. "0.80x" beside a figure is its
ratio to direct (no relay); "tsproxy : best peer" above 1.00x means faster than the best of haproxy, nginx and socat.
The second table is the processor time of the relay for each GiB: what is left for others on its core. There, below
1.00x is better. tsproxy-copy is tsproxy with --zero-copy=never: what splice(2) brings is the difference.
"""

from __future__ import annotations

import argparse
import math
import sys
from functools import partial
from typing import Dict, List

from common import charts, far_end, figures, layout, load, options, relays, report, session, usage
from common.figures import Figure
from common.session import Case

SIZES = [64 << (2 * step) for step in range(8)]  # 64 B to 1 MiB
GBIT = Figure("gbit_per_s", "Gbit/s", True)
CPU = Figure("cpu_s_per_gib", "CPU s/GiB", False)
COPY, COPY_OPTION = f"{figures.OURS}-copy", "--zero-copy=never"
RELAYS = [*(name for name in relays.NAMES if name != relays.SPIN), COPY]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = options.with_relays(options.parser(__doc__, RELAYS, rounds=3, seconds=0.5))
    parser.add_argument(
        "--sizes", type=options.wholes(1, 16 << 20), default=SIZES, help="comma-separated, bytes (default: 64 to 1048576)"
    )
    return parser.parse_args()


def readable(size: int) -> str:
    """64 B, 16 KiB, 1 MiB."""
    for unit, name in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit and size % unit == 0:
            return f"{size // unit} {name}"
    return f"{size} B"


def cases_of(stage: session.Stage) -> List[Case]:
    """One for each size."""
    only = stage.args.only
    chosen = [relay for relay in stage.bed.all([name for name in only if name != COPY]) if relay.name in RELAYS]
    if COPY in only or not only:
        chosen.append(stage.bed.ours(COPY, COPY_OPTION))
    sink = partial(far_end.running, far_end.sink)
    return [
        Case(f"size-{size}", readable(size), [GBIT, CPU], sink, partial(measure, stage, size), chosen)
        for size in stage.args.sizes
    ]


def measure(stage: session.Stage, size: int, relay: relays.Running) -> load.Sample:
    """One stream, and what the relay worked for it."""
    before = relay.pid and usage.cpu_seconds(relay.pid)
    sample = stage.load(partial(load.bulk, relay.port, size, stage.args.seconds))[0]
    if relay.pid and before is not None:
        sample["cpu_s_per_gib"] = (usage.cpu_seconds(relay.pid) - before) / (sample["sent_bytes"] / 2**30)
    return sample


def picture(cases: List[Case], rows: List[figures.Row]) -> charts.Lines:
    """A line for each relay, over the sizes."""
    sizes = {case.name: float(math.log2(int(case.name.split("-")[1]))) for case in cases}
    series: Dict[str, List[charts.Point]] = {}
    for row in rows:
        if row.figure is GBIT:
            series.setdefault(row.relay, []).append((sizes[row.case], row.value))
    ticks = sorted((sizes[case.name], case.title) for case in cases)
    return charts.Lines("one stream, one direction", "message size", "Gbit/s", ticks, series)


def work() -> int:
    """Measure and show."""
    args = parse()
    with session.staged("throughput", args, layout.pair(args.cpus)) as stage:
        cases = cases_of(stage)
        rows = stage.rows(stage.compare(cases), cases)
        titles = {case.name: case.title for case in cases}
        if args.svg:
            args.svg.write_text(charts.document("tsproxy: throughput", str(stage.place), [picture(cases, rows)]))
        heading = {GBIT: "Gbit/s by message size, one stream, one direction", CPU: "processor time of the relay, s/GiB"}
        tables = {title: [row for row in rows if row.figure is figure] for figure, title in heading.items()}
        return stage.show(
            rows, ((title, report.comparison(chosen, lambda row: titles[row.case])) for title, chosen in tables.items())
        )


if __name__ == "__main__":
    sys.exit(session.run("throughput", work))
