#!/usr/bin/env python3
"""Connections: how many a second tsproxy and its peers set up, and how much memory an idle one holds.

  rate    --clients processes, each one connection after the other: connect, one byte there and back, end of file,
          close. The far end closes first, so that TIME_WAIT takes no local port from the next connection.
  memory  opens --idle connections, proves each by a byte there and back, and looks at how much the relay's resident
          set (with its children) has grown. What the kernel holds for two sockets comes on top, alike for all. socat
          starts a process for each connection, and the pages that these share are counted in each.

How to read it: "0.80x" beside a figure is its ratio to direct (no relay); "tsproxy : best peer" is the ratio to the best
of haproxy, nginx and socat: above 1.00x is good for rates, below it for memory. tsproxy-spin is tsproxy
--busy-poll=1000. tsproxy logs one line for each closed connection meanwhile (to a file), as it does by default.
"""

from __future__ import annotations

import argparse
import resource
import sys
from functools import partial
from typing import Dict, List

from common import charts, far_end, figures, layout, load, options, relays, report, session, usage
from common.figures import Figure
from common.session import Case

RATE = [Figure("connections_per_s", "connections/s", True)]
MEMORY = [Figure("kib_per_connection", "KiB per idle connection", False), Figure("rss_mib", "MiB before", False)]
_SPARE = 100  # descriptors for all else


def parse() -> argparse.Namespace:
    """The command line."""
    parser = options.with_relays(options.parser(__doc__, [*relays.NAMES, "rate", "memory"], rounds=5, seconds=1.0))
    parser.add_argument(
        "--idle", type=options.whole(1, 4000), default=1000, help="connections held, for memory (default: %(default)s)"
    )
    parser.add_argument("--clients", type=options.whole(1, 64), default=4, help="side by side, for rate (default: %(default)s)")
    return parser.parse_args()


def cases_of(stage: session.Stage) -> List[Case]:
    """Rate and memory, unless only one of them was asked for."""
    only = stage.args.only
    kinds = [kind for kind in ("rate", "memory") if kind in only] or ["rate", "memory"]
    chosen = stage.bed.all([name for name in only if name in relays.NAMES])
    held = [relay for relay in chosen if relay.name not in (relays.SPIN, figures.DIRECT)]
    idle = affordable(stage.args.idle)
    clients = f"connections per second of {stage.args.clients} clients"
    cases = [
        Case("rate", clients, RATE, partial(far_end.running, far_end.echo_once), partial(rate, stage), chosen),
        Case(
            "memory",
            f"memory of {idle} idle connections",
            MEMORY,
            partial(far_end.running, far_end.echo),
            partial(resident, idle),
            held,
        ),
    ]
    return [case for case in cases if case.name in kinds and case.relays]


def affordable(idle: int) -> int:
    """How many connections this host's descriptor limit allows a relay, which needs two for each."""
    most = max(1, (resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _SPARE) // 2)
    if most < idle:
        report.say(f"connections: --idle={idle} needs more descriptors than ulimit -Hn allows: {most} connections instead")
    return min(idle, most)


def rate(stage: session.Stage, relay: relays.Running) -> load.Sample:
    """Connections per second of all clients together."""
    client = partial(load.connects, relay.port, stage.args.seconds)
    return {"connections_per_s": sum(sample["connections_per_s"] for sample in stage.load(*[client] * stage.args.clients))}


def resident(idle: int, relay: relays.Running) -> load.Sample:
    """Memory before and with the connections."""
    assert relay.pid
    before, after = load.beside_idle(relay.port, idle, partial(usage.resident_kib, relay.pid))
    return {"kib_per_connection": max(0, after - before) / idle, "rss_mib": before / 1024}


def pictures(cases: List[Case], rows: List[figures.Row]) -> List[charts.Bars]:
    """Bars for each figure."""
    found = []
    for case in cases:
        for figure in case.figures:
            values: Dict[str, float] = {row.relay: row.value for row in rows if (row.case, row.figure) == (case.name, figure)}
            labels = {relay: report.plain(value) for relay, value in values.items()}
            better = "more is better" if figure.higher_is_better else "less is better"
            found.append(charts.Bars(f"{case.title}: {figure.label} ({better})", values, labels))
    return found


def work() -> int:
    """Measure and show."""
    args = parse()
    with session.staged("connections", args, layout.pair(args.cpus)) as stage:
        stage.bed.tsproxy.append(f"--max-connections={args.idle + 10}")
        cases = cases_of(stage)
        rows = stage.rows(stage.compare(cases), cases)
        if args.svg:
            args.svg.write_text(charts.document("tsproxy: connections", str(stage.place), pictures(cases, rows)))
        return stage.show(rows, report.tables_of_cases(rows, {case.name: case.title for case in cases}))


if __name__ == "__main__":
    sys.exit(session.run("connections", work))
