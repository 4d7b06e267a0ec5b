#!/usr/bin/env python3
"""A soak: mixed traffic through tsproxy for --seconds, every byte verified, and nothing may leak, be lost or not add up.

Clients and far end talk in streams whose every byte follows from a seed and its position: small orders back and forth,
bulk in each direction and in both, short connections in numbers, half-closes, slow readers, readers that pause for
longer than the user timeout, visitors who say nothing, and resets by either side at a random moment. First comes a
warm-up, after which all must be quiet: that is the starting level. Then the traffic runs; each second tsproxy's memory,
descriptors and threads are looked at. In the end its own JSON lines must add up (received = acknowledged + discarded,
accepted = ended + active, a line for each connection, and not a byte more at one end than was sent at the other), and
everything must be back at the starting level.

With --routes the traffic goes to all routes of a file. Each second every third of them changes, one comes and one goes;
reload_us is the time from the signal to the `reload` line, and probe_us what a client of the routes that stay sees, from
connect(2) to the end of a short answer.

How to read it: "violations" is 0 and the exit code too, or each violation is told and the exit code is 1. The memory may
end up to --memory-room above the starting level; sockets and threads may not differ at all, pipes may by the few that each
worker keeps for later, and other descriptors by one for each route and worker. The same --seed makes the same conversations,
though not in the same order.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import socket
import sys
import time
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

from common import layout, lines, options, processes, reloads, report, session, traffic, vitals
from common.trouble import Failed
from common.vitals import Vitals

_FAR_ENDS = 2
_PIPES = 8  # descriptors that a worker may keep for later
_LAST_S = 60.0  # what has begun when the traffic ends may take so long
_QUIET_S = 10.0  # after that, so long until tsproxy has closed its side
_FORGOTTEN_S = 2.5
_LOOK_S = 1.0
_TELL_S = 60.0
_TOLD = 20  # violations that are shown


def parse() -> argparse.Namespace:
    """The command line."""
    made = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    made.add_argument("--seconds", type=options.number(0.01, 1e6), default=60.0, help="how long (default: %(default)s)")
    made.add_argument("--seed", type=options.whole(0, 1 << 63), help="what chance begins with (default: chance, and told)")
    made.add_argument("--clients", type=options.whole(1, 1000), default=24, help="at the same time (default: %(default)s)")
    made.add_argument("--workers", type=options.whole(1, 256), default=2, help="of tsproxy (default: %(default)s)")
    made.add_argument("--runtime", choices=("auto", "threads", "interpreters", "processes"), default="auto", help="of tsproxy")
    made.add_argument(
        "--memory-room", type=options.number(0, 1e6), default=16.0, help="MiB that it may grow by (default: %(default)s)"
    )
    made.add_argument("--routes", type=options.whole(0, 1000), default=0, help="a file of so many, reloaded each second")
    made.add_argument("--json", action="store_true", help="JSON lines instead of a table")
    made.add_argument("--cpus", type=options.cpus, help="half for load and far end, half for tsproxy, e.g. 2,3")
    return options.with_relays(made).parse_args()


class Soak:
    """One run, from the starting level to the verdict."""

    def __init__(self, stage: session.Stage, args: argparse.Namespace, log: lines.Lines, tally: traffic.Tally) -> None:
        self.stage, self.args, self.log, self.tally = stage, args, log, tally
        self.complaints, self._log_ratelimited = os.pipe2(os.O_NONBLOCK)
        self.reloads: Optional[reloads.Reloads] = None
        self.probed: Dict[str, float] = {}
        self.violations: List[str] = []
        self.samples: List[Vitals] = []

    def far_ends(self, listener: socket.socket) -> List[Any]:
        """What the far end's processes do."""
        return [traffic.FarEnd(listener, self.tally, row, self._log_ratelimited).run for row in range(_FAR_ENDS)]

    def loads(self, ports: Sequence[int], seed: str) -> List[Any]:
        """What the client processes do; the last one is the probe, if there is one."""
        count = min(2, self.args.clients)
        shares = [self.args.clients // count + (number < self.args.clients % count) for number in range(count)]
        made = [
            traffic.Load(ports, seed, share, self.tally, _FAR_ENDS + number, self._log_ratelimited)
            for number, share in enumerate(shares)
        ]
        if not self.reloads:
            return [load.run for load in made]
        watched = made[0]._replace(ports=self.reloads.ports(self.reloads.unchanged), row=_FAR_ENDS + 2)
        return [*(load.run for load in made), traffic.Probe(watched).run]

    def rage(self, ports: Sequence[int], seed: str, seconds: float, pid: int) -> None:
        """Traffic for so long, then wait until all of it has ended."""
        self.tally.again()
        end = time.monotonic() + seconds
        with processes.tasks(self.loads(ports, seed), self.stage.place.load) as running:
            told = time.monotonic()
            while time.monotonic() < end:
                self.log.take(min(_LOOK_S, max(0.01, end - time.monotonic())))
                self._look(pid)
                if self.reloads:
                    self.reloads.again(pid)
                settled = time.monotonic() - told > _TELL_S
                told = time.monotonic() if settled else told
                report.progress(self._where(end), settled)
            self.tally.end()
            for task in running:
                self._finish(task)

    def _finish(self, task: processes.Task) -> None:
        """Its lines must be read meanwhile, or tsproxy drops them."""
        end = time.monotonic() + _LAST_S
        while not task.is_ready and time.monotonic() < end:
            self.log.take(0.05)
        self.probed = task.result(0.1) or self.probed

    def _look(self, pid: int) -> None:
        self.samples.append(vitals.of(pid))
        self._hear()

    def _hear(self) -> None:
        """Complaints are told as they come: a long run need not be waited for."""
        for text in traffic.told(self.complaints):
            self.violations.append(text)
            report.say(f"soak: violation: {text}")

    def _where(self, end: float) -> str:
        made, rss = self.tally.totals()["connected"], self.samples[-1].rss_kib / 1024
        left = max(0.0, end - time.monotonic())
        return f"soak: {left:,.0f} s left; {made:,} connections; {rss:.1f} MiB; {len(self.violations)} violations"

    def quiet(self, pid: int) -> Vitals:
        """The level when nothing is connected any more."""

        def is_idle() -> bool:
            os.kill(pid, signal.SIGUSR1)
            before = self.log.seen["metrics"]
            self.log.wait(lambda: self.log.seen["metrics"] > before, "metrics line")
            return int(self.log.last["metrics"]["downstream_cx_active"]) == 0

        if self.reloads:
            self.reloads.restore(pid)
        self.log.wait(is_idle, "end of all connections", _QUIET_S)
        if self.reloads:
            self.log.wait(lambda: self._is_steady(pid), "end of what routes that went have held", _QUIET_S)
        return vitals.of(pid)

    def _is_steady(self, pid: int) -> bool:
        """A route that went is forgotten two seconds after its last session has ended."""
        before = vitals.of(pid).other_fds
        self.log.take(_FORGOTTEN_S)
        return vitals.of(pid).other_fds == before

    def judge(self, start: Vitals, end: Vitals) -> List[str]:
        """All violations."""
        self._hear()
        found = list(self.log.violations)
        if "metrics" in self.log.last:
            found += lines.balance(self.log, self.tally.totals())
        found += self.growth(start, end)
        for text in found[:_TOLD]:
            report.say(f"soak: violation: {text}")
        return self.violations + found

    def growth(self, start: Vitals, end: Vitals) -> Iterator[str]:
        """What is not back at the starting level."""
        room = {"rss_kib": round(self.args.memory_room * 1024), "pipes": self.args.workers * _PIPES}
        if self.args.routes:  # a worker maps the counters of a route with its first client there
            room["other_fds"] = self.args.routes * self.args.workers
        for name, before in start.fields().items():
            now = end.fields()[name]
            if now > before + room.get(name, 0) or (name not in room and now < before):
                yield f"{name} at the end: {now}, at the start: {before}"


def steady(soak: Soak, pid: int, start: Vitals) -> Vitals:
    """The level in the end, as soon as it is the one of the start; what closes late is no leak."""
    deadline = time.monotonic() + 5
    while True:
        now = soak.quiet(pid)
        if not list(soak.growth(start, now)) or time.monotonic() > deadline:
            return now


def run(soak: Soak) -> Dict[str, Any]:
    """Start, warm up, rage, stop; the figures."""
    args, place, output = soak.args, soak.stage.place, soak.stage.bed.directory / "lines"
    listener = traffic.listen()
    target, words = listener.getsockname()[1], [f"--workers={args.workers}"]
    if args.routes:
        soak.reloads = reloads.Reloads(soak.stage.bed.directory / "routes.ini", args.routes, target, soak.log)
        words.append(f"--routes={soak.reloads.file}")
    else:
        words += [f"--target=127.0.0.1:{target}", "--port=0"]
    words.append(f"--user-timeout={traffic.USER_TIMEOUT_MS}")
    command = [*soak.stage.bed.tsproxy, *words, f"--runtime={args.runtime}"]
    with processes.tasks(soak.far_ends(listener), place.load), processes.program(command, place.relay, output) as child:
        listener.close()  # it is the far ends': it must go with them
        soak.log.wait(lambda: "start" in soak.log.last or child.poll() is not None, "start line")
        if "start" not in soak.log.last:
            raise Failed(output.with_suffix(".err").read_text(errors="replace").strip() or "tsproxy did not start")
        soak.log.wait(lambda: len(soak.log.routes) == args.routes, "line of each route")
        start, end, took = levels(soak, child.pid)
        child.send_signal(signal.SIGTERM)
        soak.log.wait(lambda: "stop" in soak.log.last, "stop line")
        code = child.wait(_LAST_S)
    found = [*soak.judge(start, end), *([f"exit code {code}"] if code else [])]
    return figures(soak, start, end, took, found)


def levels(soak: Soak, pid: int) -> Tuple[Vitals, Vitals, float]:
    """What tsproxy held before and after the traffic, and how many seconds that took."""
    args = soak.args
    ports = soak.reloads.all_ports if soak.reloads else [soak.log.last["start"]["listen_port"]]
    soak.rage(ports, f"{args.seed}/warm-up", min(5.0, 1 + args.seconds / 10), pid)
    start = soak.quiet(pid)
    soak.samples.clear()
    began = time.monotonic()
    soak.rage(ports, str(args.seed), args.seconds, pid)
    return start, steady(soak, pid, start), time.monotonic() - began


def figures(soak: Soak, start: Vitals, end: Vitals, took: float, found: Sequence[str]) -> Dict[str, Any]:
    """What the run gave."""
    totals, last = soak.tally.totals(), soak.log.last.get("metrics", {})
    return {
        "seconds": round(took, 1),
        "violations": len(found),
        "violation_texts": list(found[:_TOLD]),
        **{f"{kind} connections": totals[kind] for kind in traffic.KINDS},
        "connections": totals["connected"],
        "verified_bytes": totals["client_received"] + totals["far_received"],
        "discarded_bytes": soak.log.sums["discarded_bytes"],
        "lines": sum(soak.log.seen.values()),
        "lines_dropped": last.get("log_lines_dropped_total"),
        "reasons": dict(soak.log.reasons),
        "relay_us_p50": last.get("relay_us_p50"),
        "relay_us_p999": last.get("relay_us_p999"),
        **(soak.reloads.figures() if soak.reloads else {}),
        **soak.probed,
        **{f"{name}_at_start": value for name, value in start.fields().items()},
        **{f"{name}_at_end": value for name, value in end.fields().items()},
        **{f"{name}_most": max(sample.fields()[name] for sample in soak.samples) for name in Vitals._fields},
    }


def show(result: Dict[str, Any]) -> None:
    """The table for people."""
    kinds = [["connections", "number"], *([kind, f"{result[f'{kind} connections']:,}"] for kind in traffic.KINDS)]
    report.show("what came", [*kinds, ["all, with the warm-up", f"{result['connections']:,}"]])
    levels = [[name, *(f"{result[f'{name}_{when}']:,}" for when in ("at_start", "most", "at_end"))] for name in Vitals._fields]
    report.show("what tsproxy holds", [["", "at the start", "most", "at the end"], *levels])
    names = ("seconds", "verified_bytes", "discarded_bytes", "lines", "lines_dropped", "relay_us_p50", "relay_us_p999")
    names += tuple(name for name in result if name.startswith(("reload", "probe")))
    told = [[name, f"{result[name]:,}"] for name in names]
    reasons = [[f"ended: {reason}", f"{count:,}"] for reason, count in sorted(result["reasons"].items())]
    report.show("what it did", [["", "value"], *told, *reasons, ["violations", str(result["violations"])]])


def work() -> int:
    """Run and show."""
    args = parse()
    args.seed = random.SystemRandom().getrandbits(31) if args.seed is None else args.seed
    with session.staged("soak", args, layout.halves(args.cpus)) as stage, contextlib.ExitStack() as stack:
        log = stack.enter_context(contextlib.closing(lines.Lines(stage.bed.directory / "lines")))
        report.say(f"soak: --seed={args.seed}")
        try:
            result = run(Soak(stage, args, log, traffic.Tally.create(_FAR_ENDS + 3)))
        except Failed as problem:
            report.say(f"soak: {problem}")
            return session.FAILED
        if args.json:
            report.json_line("soak", {"event": "setup", **stage.facts()})
            report.json_line("soak", {"event": "result", **result})
        else:
            show(result)
    return session.FAILED if result["violations"] else 0


if __name__ == "__main__":
    sys.exit(session.run("soak", work))
