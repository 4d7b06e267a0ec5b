"""A benchmark run from its command line to its exit code: the stage is set, the rounds are run, the figures shown."""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Callable, ContextManager, Dict, FrozenSet, Iterator, List, NamedTuple, Sequence, Set, Tuple

from common import figures, layout, peers, processes, relays, report, sandbox
from common.figures import Figure, Results, Row
from common.load import Sample
from common.relays import Bed, Relay, Running
from common.trouble import Failed, Refusal

INTERRUPTED, TERMINATED, REFUSED, FAILED = 130, 143, 2, 1


class Case(NamedTuple):
    """One kind of load, and the figures it gives."""

    name: str
    title: str
    figures: Sequence[Figure]
    far_end: Callable[[FrozenSet[int]], ContextManager[int]]  # runs on these CPUs; its port
    measure: Callable[[Running], Sample]
    relays: Sequence[Relay]


def run(benchmark: str, work: Callable[[], int]) -> int:
    """Do the work; the exit code. Ctrl-C and SIGTERM end what was started, too."""
    signal.signal(signal.SIGTERM, _terminated)
    try:
        return work()
    except KeyboardInterrupt:
        report.say(f"\n{benchmark}: interrupted")
        return INTERRUPTED
    except Refusal as problem:
        report.say(f"{benchmark}: {problem}")
        return REFUSED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter's last flush fails, loudly
        return FAILED


def _terminated(number: int, frame: Any) -> None:
    sys.exit(TERMINATED)


class Stage:
    """Where a benchmark runs. Made by `staged`."""

    def __init__(self, benchmark: str, args: argparse.Namespace, place: layout.Layout, directory: Path) -> None:
        self.benchmark, self.args, self.place = benchmark, args, place
        self.warnings = layout.disquiet()
        self.is_private = sandbox.enter()
        self.mode = "strip" if sandbox.timestamps_are_off() else "preserve"
        tsproxy = relays.command(args.python, args.tsproxy, [f"--timestamps={self.mode}", *args.options])
        self.bed = Bed(place.relay, directory, tsproxy)
        self._failed: Set[Tuple[str, str]] = set()

    def facts(self) -> Dict[str, Any]:
        """The setup line."""
        args = {name: value for name, value in vars(self.args).items() if isinstance(value, (int, float, str, list))}
        told = subprocess.run([*self.bed.tsproxy[:2], "--version"], capture_output=True, text=True, check=False)
        kind = "a private network namespace" if self.is_private else "this host's network (no private namespace to be had)"
        return {
            "benchmark": self.benchmark,
            "event": "setup",
            "tested": told.stdout.strip(),
            "kernel": os.uname().release,
            "layout": str(self.place),
            "network": f"{kind}: --timestamps={self.mode}",
            "timestamps": self.mode,
            "statistic": figures.STATISTIC,
            "warnings": self.warnings,
            **args,
            "python": platform.python_version(),
            "tsproxy_python": self.args.python,
        }

    def compare(self, cases: Sequence[Case]) -> Results:
        """Round by round: each case in it with each relay, A B C A B C, so that a drift of the machine meets all alike."""
        results: Results = {case.name: {relay.name: [] for relay in case.relays} for case in cases}
        for warning in self.warnings:
            report.say(f"{self.benchmark}: warning: {warning}")
        for number in range(1, self.args.rounds + 1):
            where = f"{self.benchmark}: round {number} of {self.args.rounds}"
            report.progress(where, settled=True)
            for case in cases:
                for relay in case.relays:
                    report.progress(f"{where}: {case.name}, {relay.name}", settled=False)
                    results[case.name][relay.name] += self._measure(case, relay)
        report.clear_progress()
        return results

    def _measure(self, case: Case, relay: Relay) -> List[Sample]:
        """One sample, or none; why not is said once."""
        try:
            with case.far_end(self.place.load) as target, relay.start(target) as running:
                return [case.measure(running)]
        except (Failed, OSError) as problem:
            if (relay.name, str(problem)) not in self._failed:
                report.clear_progress()
                report.say(f"{self.benchmark}: {relay.name} failed in {case.name}: {problem}")
            self._failed.add((relay.name, str(problem)))
            return []

    def load(self, *works: Callable[[], Sample]) -> Sequence[Sample]:
        """Load generators, each in a process of its own on the load's CPU, side by side; what each has measured."""
        return processes.run(works, self.place.load, self.args.seconds * 3 + 20)

    def rows(self, results: Results, cases: Sequence[Case]) -> List[Row]:
        """The figures."""
        return list(figures.rows(results, {case.name: case.figures for case in cases}, set(peers.COMMANDS)))

    def show(self, rows: Sequence[Row], tables: Iterator[Any], ratio: str = "direct, no relay at all") -> int:
        """Print either the JSON lines or the tables, whose ratios are to that; the exit code."""
        if self.args.json:
            report.json_line(self.benchmark, self.facts())
            for row in rows:
                report.json_line(self.benchmark, row.fields())
        else:
            report.heading(self.facts(), ratio)
            for title, table in tables:
                report.show(title, table)
        return 0 if any(row.is_tsproxy for row in rows) else FAILED


@contextlib.contextmanager
def staged(benchmark: str, args: argparse.Namespace, place: layout.Layout) -> Iterator[Stage]:
    """Set up the namespace, the CPUs, the limits and a directory for files; the latter is removed in the end."""
    _raise_descriptor_limit()
    with tempfile.TemporaryDirectory(prefix=f"tsproxy-bench-{benchmark}-") as directory:
        stage = Stage(benchmark, args, place, Path(directory))
        os.sched_setaffinity(0, place.load)
        yield stage


def _raise_descriptor_limit() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
