#!/usr/bin/env python3
"""Latency through tsproxy, its peers and no relay: p50, p90, p99, p99.9 and the worst, in microseconds.

Two kinds of load, on loopback:
  closed  ping-pong: each connection sends its next message when the last one has come back. Tells the
          cost of one trip. It hides stalls: while one lasts, nothing else is sent that could suffer.
  open    a fixed rate, whatever comes back. Latency counts from the moment a message was DUE, so a stall
          is paid by every message that was due during it (no coordinated omission). "late p99" is
          how late the generator itself was; if "behind" is said, trust closed, or ask for less: --rate.

How to read it: "2.10x" beside a figure is its ratio to direct (the load generator and the far end without
a relay). "tsproxy : best peer" below 1.00x means faster than the best of haproxy, nginx and socat.
tsproxy-spin is tsproxy --busy-poll=1000. The picture (--svg) is read from the left, the usual case, to the
right, the rarest: flat is good.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import Iterator, List

from common import charts, far_end, figures, layout, load, open_loop, options, relays, report, session
from common.figures import Figure
from common.session import Case

PERCENTILES = [
    Figure("p50_us", "p50 us", False),
    Figure("p90_us", "p90 us", False),
    Figure("p99_us", "p99 us", False),
    Figure("p99_9_us", "p99.9 us", False),
    Figure("max_us", "max us", False),
]
CLOSED = [*PERCENTILES, Figure("round_trips_per_s", "round trips/s", True)]
OPEN = [
    *PERCENTILES,
    Figure("achieved_per_s", "achieved/s", True),
    Figure("late_p99_us", "late p99 us", False, is_compared=False),
    Figure("unanswered", "unanswered", False, is_compared=False),
]
PERCENTILE_TICKS = [(0.30103, "50 %"), (1, "90 %"), (2, "99 %"), (3, "99.9 %"), (4, "99.99 %")]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = options.with_relays(options.parser(__doc__, [*relays.NAMES, "closed", "open"], rounds=5, seconds=1.0))
    parser.add_argument("--size", type=options.whole(1, 65536), default=64, help="bytes in a message (default: %(default)s)")
    parser.add_argument(
        "--connections", type=options.wholes(1, 500), default=[1], help="comma-separated; each is measured (default: 1)"
    )
    parser.add_argument("--rate", type=options.whole(1, 10**6), default=10000, help="messages/s, open (default: %(default)s)")
    return parser.parse_args()


def cases_of(stage: session.Stage) -> List[Case]:
    """Closed and open loop for each number of connections, unless only one of them was asked for."""
    args = stage.args
    kinds = [kind for kind in ("closed", "open") if kind in args.only] or ["closed", "open"]
    chosen = stage.bed.all([name for name in args.only if name in relays.NAMES])
    found, echo = [], partial(far_end.running, far_end.echo)
    for count in args.connections:
        plural = f"{count} connection{'s' if count > 1 else ''}, {args.size} bytes"
        if "closed" in kinds:
            measure = partial(closed, stage, count)
            found.append(Case(f"closed-{count}", f"closed loop, {plural}", CLOSED, echo, measure, chosen))
        if "open" in kinds:
            measure = partial(opened, stage, count)
            title = f"open loop, {args.rate:,} messages/s, {plural}"
            found.append(Case(f"open-{count}", title, OPEN, echo, measure, chosen))
    return found


def closed(stage: session.Stage, connections: int, relay: relays.Running) -> load.Sample:
    """The next when the last has come back."""
    args = stage.args
    span = load.Span.lasting(args.seconds)
    return stage.load(partial(load.ping_pong, relay.port, args.size, connections, span))[0]


def opened(stage: session.Stage, connections: int, relay: relays.Running) -> load.Sample:
    """Each when it is due."""
    args = stage.args
    return stage.load(partial(open_loop.fixed_rate, relay.port, args.size, connections, args.rate, args.seconds))[0]


def pictures(cases: List[Case], results: figures.Results) -> Iterator[charts.Lines]:
    """A percentile curve for each case."""
    for case in cases:
        series = {relay: figures.curve(samples) for relay, samples in results[case.name].items() if samples}
        yield charts.Lines(case.title, "share of round trips that are faster", "microseconds", PERCENTILE_TICKS, series)


def warn_if_behind(cases: List[Case], results: figures.Results) -> None:
    """An open loop that could not keep its schedule measured itself."""
    for case in cases:
        for relay, samples in results[case.name].items():
            behind = sum(sample.get("behind", False) for sample in samples)
            if behind:
                why = "full sockets pushed it back" if any(sample["pushed_back"] for sample in samples) else "too slow itself"
                where = f"latency: {relay}, {case.name}: the generator fell behind in {behind} of {len(samples)} rounds"
                report.say(f"{where} ({why}): lower --rate")


def work() -> int:
    """Measure and show."""
    args = parse()
    with session.staged("latency", args, layout.pair(args.cpus)) as stage:
        cases = cases_of(stage)
        results = stage.compare(cases)
        warn_if_behind(cases, results)
        rows = stage.rows(results, cases)
        if args.svg:
            args.svg.write_text(charts.document("tsproxy: latency", str(stage.place), list(pictures(cases, results))))
        return stage.show(rows, report.tables_of_cases(rows, {case.name: case.title for case in cases}))


if __name__ == "__main__":
    sys.exit(session.run("latency", work))
