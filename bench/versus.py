#!/usr/bin/env python3
"""tsproxy beside its peers and the limit, with load and far end in C: what a core of each relay does.

Needs a C compiler; the other benchmarks do without, and their load costs more than some relays do.
  pp1     one connection, a message of 64 bytes there and back, again and again
  pp32    32 of them
  bulk    one stream up, until the far end has it all
  conn    connect, one byte there and back, close, one after the other
  burst   the same with 32 of them under way at any time: the true price of a connection, since the relay never waits
  mem     what the relay's processes hold for each of 1000 idle connections (PSS: shared pages count once)

How to read it: shown is each relay's best round, for tails and memory the median: what disturbs a run here (a neighbour, a
sleeping virtual CPU) only ever makes it worse. "naked" is one C loop of epoll_wait, recv and send: the limit. "naked-spin"
polls without sleeping: the limit for tsproxy-spin, which is --busy-poll=1000. "1.10x" beside a figure is its ratio to
direct (no relay); "tsproxy : best peer" is the ratio to the best of haproxy, nginx and socat, for rates above 1.00x is
better. With --workers each relay has so many threads, workers or processes, and load, far end and relay share all CPUs:
then a figure tells what a message costs, not how fast one core is.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Callable, Dict, Iterator, List, NamedTuple, Sequence, Tuple

from common import charts, figures, layout, load, options, peers, relays, report, session, usage
from common.compiled import Compiled
from common.figures import DIRECT, NAKED, Figure
from common.session import Case
from common.trouble import Failed, Refusal

NAKED_SPIN = f"{NAKED}-spin"
NAMES = [*relays.NAMES[:1], NAKED, NAKED_SPIN, *relays.NAMES[1:]]
IDLE = 1000

P50, P999 = Figure("p50_us", "p50 us", False, takes_best=True), Figure("p99_9_us", "p99.9 us", False)
ROUND_TRIPS = Figure("round_trips_per_s", "round trips/s", True, takes_best=True)
CONNECTIONS = Figure("connections_per_s", "connections/s", True, takes_best=True)
GBIT = Figure("gbit_per_s", "Gbit/s", True, takes_best=True)
MEMORY = [Figure("kib_per_connection", "KiB per idle connection", False), Figure("pss_mib", "MiB before", False)]


class Kind(NamedTuple):
    """One kind of load: what is shown of it, against which far end, and how it is measured."""

    title: str
    figures: Sequence[Figure]
    far_end: str
    measure: Callable[[session.Stage, Compiled, relays.Running], load.Sample]


def ping_pong(connections: int, stage: session.Stage, tools: Compiled, relay: relays.Running) -> load.Sample:
    """Round trips, one after the other on each connection."""
    told = tools.load("pp", relay.port, connections, 64, stage.args.seconds)
    return {"round_trips_per_s": told["rate"], "p50_us": told["p50"], "p99_9_us": told["p999"]}


def bulk(stage: session.Stage, tools: Compiled, relay: relays.Running) -> load.Sample:
    """One stream."""
    return {"gbit_per_s": tools.load("bulk", relay.port, stage.args.megabytes)["gbps"]}


def connects(stage: session.Stage, tools: Compiled, relay: relays.Running) -> load.Sample:
    """One after the other."""
    return {"connections_per_s": tools.load("conn", relay.port, stage.args.seconds)["rate"]}


def burst(stage: session.Stage, tools: Compiled, relay: relays.Running) -> load.Sample:
    """Many at once."""
    told = tools.load("burst", relay.port, 32, stage.args.seconds)
    if told["failed"]:
        raise Failed(f"{told['failed']:.0f} connections got no answer")
    return {"connections_per_s": told["rate"]}


def memory(stage: session.Stage, tools: Compiled, relay: relays.Running) -> load.Sample:
    """Before and with the connections."""
    assert relay.pid
    before, after = load.beside_idle(relay.port, IDLE, partial(usage.proportional_kib, relay.pid))
    return {"kib_per_connection": max(0, after - before) / IDLE, "pss_mib": before / 1024}


KINDS: Dict[str, Kind] = {
    "pp1": Kind("1 connection, 64 bytes", [P50, P999], "echo", partial(ping_pong, 1)),
    "pp32": Kind("32 connections, 64 bytes", [ROUND_TRIPS, P999], "echo", partial(ping_pong, 32)),
    "bulk": Kind("one stream", [GBIT], "sink", bulk),
    "conn": Kind("connections, one after the other", [CONNECTIONS], "echo", connects),
    "burst": Kind("connections, 32 under way at once", [CONNECTIONS], "echo", burst),
    "mem": Kind(f"memory of {IDLE} idle connections", MEMORY, "echo", memory),
}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = options.with_relays(options.parser(__doc__, [*NAMES, *KINDS], rounds=5, seconds=1.0))
    parser.add_argument("--workers", type=options.whole(1, 256), default=1, help="of each relay (default: %(default)s)")
    parser.add_argument("--megabytes", type=options.whole(1, 10**6), default=3000, help="of bulk (default: %(default)s)")
    parser.add_argument(
        "--proxy", action="append", default=[], metavar="NAME=COMMAND", help="another relay; {port} and {target} are filled in"
    )
    parser.set_defaults(load_generator="in C", statistic="best of the rounds, for tails and memory the median")
    return parser.parse_args()


def place_of(args: argparse.Namespace) -> layout.Layout:
    """A CPU for the load and one for the relay; with several workers all for both."""
    if args.workers == 1:
        return layout.pair(args.cpus)
    everything = frozenset(args.cpus or os.sched_getaffinity(0))
    return layout.Layout(everything, everything)


def relays_of(stage: session.Stage, tools: Compiled) -> List[relays.Relay]:
    """All that can be had here, or those that were named."""
    only, workers = [name for name in stage.args.only if name in NAMES], stage.args.workers
    known = [name for name in only if not name.startswith(NAKED)]
    found = stage.bed.all(known, workers) if known or not only else []
    if workers == 1:
        found += [stage.bed.other(name, partial(_naked, tools, more)) for name, more in ((NAKED, ()), (NAKED_SPIN, ("busy",)))]
    found += [stage.bed.other(*_given(text)) for text in stage.args.proxy]
    chosen = [relay for relay in found if not only or relay.name in only or relay.name not in NAMES]
    return sorted(chosen, key=lambda relay: NAMES.index(relay.name) if relay.name in NAMES else len(NAMES))


def _naked(tools: Compiled, more: Sequence[str], directory: Path, port: int, target: int, workers: int) -> List[str]:
    return tools.naked(str(port), str(target), *more)


def _given(text: str) -> Tuple[str, peers.Command]:
    """A name and its command. Refusal if it is not NAME=COMMAND."""
    name, equals, command = text.partition("=")
    if not equals or not name or "{port}" not in command:
        raise Refusal(f"--proxy: given {text!r}; allowed: NAME=COMMAND with {{port}} and {{target}} in it")

    def make(directory: Path, port: int, target: int, workers: int) -> List[str]:
        return [word.format(port=port, target=f"127.0.0.1:{target}") for word in shlex.split(command)]

    return name, make


def cases_of(stage: session.Stage, tools: Compiled) -> List[Case]:
    """One for each kind of load."""
    chosen, kinds = relays_of(stage, tools), [name for name in KINDS if name in stage.args.only] or list(KINDS)
    processes = [relay for relay in chosen if relay.name != DIRECT and not relay.name.endswith("-spin")]
    return [
        Case(
            name,
            KINDS[name].title,
            KINDS[name].figures,
            partial(tools.far_end, KINDS[name].far_end),
            partial(KINDS[name].measure, stage, tools),
            processes if name == "mem" else chosen,
        )
        for name in kinds
    ]


def pictures(cases: Sequence[Case], rows: Sequence[figures.Row]) -> Iterator[charts.Bars]:
    """Bars for each figure."""
    for case in cases:
        for figure in case.figures:
            values = {row.relay: row.value for row in rows if (row.case, row.figure) == (case.name, figure)}
            better = "more is better" if figure.higher_is_better else "less is better"
            labels = {relay: report.plain(value) for relay, value in values.items()}
            yield charts.Bars(f"{case.title}: {figure.label} ({better})", values, labels)


def work() -> int:
    """Measure and show."""
    args = parse()
    with session.staged("versus", args, place_of(args)) as stage:
        stage.bed.tsproxy.extend(["--max-connections=4000", "--metrics-interval=1"])
        tools = Compiled.build(stage.bed.directory, stage.place.load)
        cases = cases_of(stage, tools)
        rows = stage.rows(stage.compare(cases), cases)
        if args.svg:
            args.svg.write_text(charts.document("tsproxy: versus", str(stage.place), list(pictures(cases, rows))))
        return stage.show(rows, report.tables_of_cases(rows, {case.name: case.title for case in cases}))


if __name__ == "__main__":
    sys.exit(session.run("versus", work))
