#!/usr/bin/env python3
"""Fairness: what the orders of one client wait for while others keep the relay busy.

One client sends --size bytes and waits for them (with --rate: sends when each is due, and a late answer delays no later
message). Beside it, through the same relay:

  quiet   nobody
  flood   --flooders clients: connect, a byte there and back, close, as fast as they can
  bulk    --senders connections that send as fast as the far end takes it
  slow    --readers connections that are sent more than they read: every buffer on their way is full
  both    the flood and the senders

each with every number of --workers (threads or processes of the peers). The load is on one CPU, the relay on as many
others as it has workers; where there are too few it shares the load's. There the orders' client and far end are
sessions of their own, and all other load is one that yields the CPU to them and to the relay (SCHED_IDLE, and nice 5 for
its autogroup, sched(7)). So it is the relay that keeps an order waiting; and the flood is as fast as what is left of the CPU.

How to read it: "1.23x" is the ratio to the best peer with as many workers: below 1.00x is better for microseconds,
above it for what the others get (flood/s: connections, Gbit/s: of the senders). A relay that keeps orders fast because
it serves the others badly shows it there. direct is no relay at all: what load and far end cost by themselves.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from time import monotonic_ns
from typing import Callable, Dict, FrozenSet, Iterator, List, Sequence

from common import beside, charts, layout, load, open_loop, options, relays, report, session
from common.figures import DIRECT, OURS, Figure, Row
from common.session import Case
from common.trouble import Failed

KINDS = {
    "quiet": "nobody beside it",
    "flood": "beside a connect flood",
    "bulk": "beside bulk senders",
    "slow": "beside slow readers",
    "both": "beside flood and senders",
}
FIGURES = [
    Figure("p50_us", "p50 us", False),
    Figure("p99_us", "p99 us", False),
    Figure("p99_9_us", "p99.9 us", False),
    Figure("max_us", "max us", False),
    Figure("flood_per_s", "flood/s", True),
    Figure("bulk_gbit_per_s", "Gbit/s", True),
]
RELAYS = (DIRECT, OURS, "haproxy", "nginx")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = options.with_relays(options.parser(__doc__, [*RELAYS, *KINDS], rounds=3, seconds=0.5))
    parser.add_argument("--size", type=options.whole(1, 65536), default=64, help="bytes of an order (default: %(default)s)")
    parser.add_argument("--rate", type=options.whole(1, 100000), help="orders/s, open loop (default: closed loop)")
    parser.add_argument("--workers", type=options.wholes(1, 64), default=[1, 2], help="comma-separated (default: 1,2)")
    parser.add_argument(
        "--warm-up", type=options.number(0, 60), default=0.4, help="seconds for the others to be there (default: %(default)s)"
    )
    for name, most, default in (("flooders", 200, 16), ("senders", 400, 50), ("readers", 400, 20)):
        parser.add_argument(f"--{name}", type=options.whole(1, most), default=default, help="(default: %(default)s)")
    return parser.parse_args()


def others(args: argparse.Namespace, kind: str, port: int, span: load.Span) -> List[Callable[[], load.Sample]]:
    """The load beside the orders."""
    works: List[Callable[[], load.Sample]] = []
    if kind in ("flood", "both"):
        works += [partial(beside.flood, port, span)] * args.flooders
    if kind in ("bulk", "both"):
        works.append(partial(beside.bulk, port, args.senders, span))
    if kind == "slow":
        works.append(partial(beside.slow, port, args.readers, span))
    return works


def measure(stage: session.Stage, kind: str, relay: relays.Running) -> load.Sample:
    """The orders' round trips, and what the others got in the same time."""
    args = stage.args
    with load.dial(relay.port) as sock:
        sock.sendall(beside.ORDER)
        if sock.recv(1) != beside.ORDER:
            raise Failed("the relay closed the connection")
        begin = monotonic_ns() + round(args.warm_up * 1e9)
        span = load.Span(begin, begin + round(args.seconds * 1e9))
        works = others(args, kind, relay.port, span)
        if args.rate:
            orders = partial(open_loop.fixed_rate_on, sock, args.size, args.rate, span)
        else:
            orders = partial(load.ping_pong_on, sock, args.size, span)
        crowd = partial(beside.crowd, works, stage.place.load, args.seconds * 3 + 20)
        sample, got = stage.load(partial(beside.apart, orders), partial(beside.yielding, crowd))
    return {**sample, **got}


def cases_of(stage: session.Stage, spare: Dict[int, FrozenSet[int]]) -> List[Case]:
    """One for each kind of load beside it and each number of workers."""
    args = stage.args
    kinds = [kind for kind in KINDS if kind in args.only] or list(KINDS)
    names = [name for name in RELAYS if name in args.only] or list(RELAYS)
    found = []
    for kind in kinds:
        for workers in args.workers:
            bed = stage.bed._replace(cpus=spare[workers])
            chosen = [relay for relay in bed.all(workers=workers) if relay.name in names]
            shares = " on the load's CPU too" if spare[workers] & stage.place.load else ""
            title = f"{KINDS[kind]}, {workers} worker{'s' if workers > 1 else ''}{shares}"
            found.append(Case(f"{kind}-{workers}", title, FIGURES, beside.running, partial(measure, stage, kind), chosen))
    return found


def table(cases: Sequence[Case], rows: Sequence[Row]) -> report.Table:
    """A block for each case, a line for each relay, each figure with its ratio to the best peer."""
    lines = [["", *(figure.label for figure in FIGURES)]]
    for case in cases:
        cells = {(row.relay, row.figure.key): row for row in rows if row.case == case.name}
        lines.append([case.title, *[""] * len(FIGURES)])
        for relay in dict.fromkeys(relay for relay, _ in cells):
            lines.append([f"  {relay}", *(report.beside_peer(cells.get((relay, figure.key))) for figure in FIGURES)])
    return lines


def pictures(cases: Sequence[Case], rows: Sequence[Row]) -> Iterator[charts.Bars]:
    """Bars of the p99."""
    for case in cases:
        values: Dict[str, float] = {row.relay: row.value for row in rows if (row.case, row.figure.key) == (case.name, "p99_us")}
        yield charts.Bars(
            f"p99 us, {case.title} (less is better)", values, {name: report.plain(values[name]) for name in values}
        )


def work() -> int:
    """Measure and show."""
    args = parse()
    place = layout.pair(args.cpus)
    spare = {workers: layout.beside(place.load, args.cpus, workers) for workers in args.workers}
    with session.staged("fairness", args, place) as stage:
        cases = cases_of(stage, spare)
        rows = stage.rows(stage.compare(cases), cases)
        if args.svg:
            args.svg.write_text(charts.document("tsproxy: fairness", str(stage.place), list(pictures(cases, rows))))
        how = f"{args.rate:,} orders/s" if args.rate else "closed loop"
        tables = iter([(f"one client's orders, {args.size} bytes, {how}", table(cases, rows))])
        return stage.show(rows, tables, ratio="the best peer with as many workers")


if __name__ == "__main__":
    sys.exit(session.run("fairness", work))
