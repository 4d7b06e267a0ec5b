#!/usr/bin/env python3
"""What the relay's hot path costs beside the system calls it can't do without, in nanoseconds. No relay is started.

  forward   one message of --size bytes from one socket to another: naked (recv_into, send) and as the relay does it
            (Direction.readable: the same two calls, and counting, the clock, the latency histogram). Over socketpairs, where
            the kernel does little, and over TCP on loopback, where it does what it does for a relay.
  waiting   asking for ready descriptors, per event, with 1 and with 32 of them ready.
  pieces    what a forward or a connection is made of. Their ratio is to a naked forward over TCP: 0.02x is 2 % of it.

How to read it: the figure is the best of the rounds (what disturbs a run only ever makes it longer), less what an empty
loop and reading the clock cost. The ratio is to the first line of the table, or to what its title names. It measures the
code of this checkout, on this Python: run it with another to compare.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import sys
import time
import timeit
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Sequence, Tuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "lib"))

from common import charts, layout, options, report, session

try:
    from common import rig
except ImportError as missing:
    report.say(f"hotpath: needs lib/_tsproxy beside bench/, a whole checkout: {missing}")
    sys.exit(2)

_LEAST = 50  # how often a piece is run at least
_TRIAL = 200
_STATISTIC = "best of the rounds"
GROUPS = ("forward", "waiting", "pieces")

Run = Callable[[int], float]  # how many times -> nanoseconds each


class Item(NamedTuple):
    """Something to time. `share`: how many events one run of it handles."""

    table: str
    name: str
    run: Run
    share: int = 1


class Result(NamedTuple):
    """What it took."""

    item: Item
    rounds: List[float]
    value: float
    baseline: str
    ratio: float

    def fields(self) -> Dict[str, Any]:
        """Its JSON line."""
        case, name = self.item.table, self.item.name
        told = {"event": "figure", "case": case, "figure": name, "unit": "ns", "value": self.value, "rounds": self.rounds}
        return {**told, "statistic": _STATISTIC, "baseline": self.baseline, "ratio_to_baseline": round(self.ratio, 4)}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = options.parser(__doc__, GROUPS, rounds=5, seconds=0.1)
    parser.add_argument("--size", type=options.whole(1, 65536), default=64, help="bytes in a message (default: %(default)s)")
    return parser.parse_args()


def statement(words: str, names: Dict[str, Any]) -> Run:
    """Time a piece of code, less the loop around it."""
    timer, empty = timeit.Timer(words, globals=names), timeit.Timer("pass")
    return lambda count: max(0.0, timer.timeit(count) - min(empty.repeat(3, count))) * 1e9 / count


def forwards(size: int, stack: contextlib.ExitStack) -> Iterator[Item]:
    """The naked forward first, for each kind of socket."""
    for kind, pair in (("socketpair", rig.local_pair), ("TCP loopback", rig.tcp_pair)):
        route = rig.Route(stack.enter_context(pair()), stack.enter_context(pair()), size)
        stack.callback(route.close)
        yield Item(f"forward over {kind}", "naked: recv_into, send", route.timed(route.naked))
        yield Item(f"forward over {kind}", "tsproxy: Direction.readable", route.timed(route.direction.readable))


def waits(stack: contextlib.ExitStack) -> Iterator[Item]:
    """Raw epoll first, for each number of ready descriptors."""
    for ready in (1, 32):
        waiters = stack.enter_context(rig.waiters(ready))
        table = f"waiting, {ready} ready, per event"
        yield Item(table, "naked: epoll.poll", statement("epoll.poll(0, 256)", waiters), ready)
        yield Item(table, "tsproxy: Poller.wait", statement("poller.wait(0, 256)", waiters), ready)
        yield Item(table, "Poller.select", statement("poller.select(0)", waiters), ready)
        yield Item(table, "selectors.EpollSelector.select", statement("selector.select(0)", waiters), ready)


def pieces(size: int, stack: contextlib.ExitStack) -> Iterator[Item]:
    """Everything by itself; the naked forward over TCP again, to compare with."""
    route = rig.Route(stack.enter_context(rig.tcp_pair()), stack.enter_context(rig.tcp_pair()), size)
    stack.callback(route.close)
    table = "pieces, beside a naked forward over TCP"
    yield Item(table, "naked forward", route.timed(route.naked))
    names = stack.enter_context(rig.pieces(route))
    for name, words in rig.PIECES.items():
        yield Item(table, name, statement(words, names))


def items_of(args: argparse.Namespace, stack: contextlib.ExitStack) -> List[Item]:
    """All, or those of the groups that were asked for."""
    makers: Dict[str, Callable[[], Iterator[Item]]] = {
        "forward": lambda: forwards(args.size, stack),
        "waiting": lambda: waits(stack),
        "pieces": lambda: pieces(args.size, stack),
    }
    return [item for group in GROUPS if group in args.only or not args.only for item in makers[group]()]


def _trial_s(item: Item) -> float:
    """What one run of it takes, by the clock: less the loop around it, it may be nothing where the machine stood still."""
    started = time.perf_counter()
    item.run(_TRIAL)
    return (time.perf_counter() - started) / _TRIAL


def measure(items: Sequence[Item], rounds: int, seconds: float) -> List[Result]:
    """Interleaved: all of them once, then again."""
    counts = [max(_LEAST, round(seconds / _trial_s(item))) for item in items]
    taken: List[List[float]] = [[] for _ in items]
    for number in range(1, rounds + 1):
        report.progress(f"hotpath: round {number} of {rounds}", settled=True)
        for item, count, times in zip(items, counts, taken):
            times.append(round(item.run(count) / item.share, 2))
    report.clear_progress()
    first: Dict[str, Tuple[str, float]] = {}
    results = []
    for item, times in zip(items, taken):
        baseline, base = first.setdefault(item.table, (item.name, min(times)))
        results.append(Result(item, times, min(times), baseline, min(times) / (base or 1)))
    return results


def facts(args: argparse.Namespace, place: layout.Layout) -> Dict[str, Any]:
    """The setup line."""
    where = {"kernel": os.uname().release, "python": platform.python_version(), "layout": f"on CPU {min(place.relay)}"}
    how = {"rounds": args.rounds, "seconds": args.seconds, "size": args.size, "statistic": _STATISTIC}
    return {"event": "setup", **where, **how, "warnings": layout.disquiet()}


def show(args: argparse.Namespace, about: Dict[str, Any], results: Sequence[Result]) -> None:
    """JSON lines or tables."""
    if args.json:
        for fields in (about, *(result.fields() for result in results)):
            report.json_line("hotpath", fields)
        return
    print(f"hotpath: Python {about['python']}; Linux {about['kernel']}; {about['layout']}; {args.size} bytes")
    how = f"{_STATISTIC} ({args.rounds} of {args.seconds:g} s each, interleaved)"
    print(f"nanoseconds, {how}; ratio: to the first line of the table")
    for table in dict.fromkeys(result.item.table for result in results):
        lines = [["", "ns", "ratio"]]
        chosen = [result for result in results if result.item.table == table]
        lines += [[result.item.name, report.plain(result.value), f"{result.ratio:.2f}x"] for result in chosen]
        report.show(table, lines)


def pictures(results: Sequence[Result]) -> Iterator[charts.Bars]:
    """Bars for each table."""
    for table in dict.fromkeys(result.item.table for result in results):
        chosen = [result for result in results if result.item.table == table]
        labels = {result.item.name: f"{report.plain(result.value)} ns" for result in chosen}
        yield charts.Bars(f"{table} (less is better)", {result.item.name: result.value for result in chosen}, labels)


def work() -> int:
    """Measure and show."""
    args = parse()
    place = layout.pair(args.cpus)
    about = facts(args, place)
    for warning in about["warnings"]:
        report.say(f"hotpath: warning: {warning}")
    with contextlib.ExitStack() as stack:
        stack.enter_context(layout.pinned(place.relay))
        results = measure(items_of(args, stack), args.rounds, args.seconds)
    if args.svg:
        args.svg.write_text(charts.document("tsproxy: hot path", f"Python {about['python']}", list(pictures(results))))
    show(args, about, results)
    return 0


if __name__ == "__main__":
    sys.exit(session.run("hotpath", work))
