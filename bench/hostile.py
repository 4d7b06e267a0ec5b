#!/usr/bin/env python3
"""A hostile exchange: chance answers tsproxy's connections for --seconds, and no timestamp may leave, whatever it sends.

tsproxy stands in a network namespace where the policy holds by one lever: the sysctl, or the rules that `generate
nftables` writes, to strip or to rewrite. Clients come and go there. The far end is raw: it sees each packet that leaves
the namespace and answers with good and bad segments, options and ICMP errors; ports that are closed get some, too. In the
end the exchange becomes a good one, and must be served.

How to read it: one line of JSON. "violations" is 0 and the exit code too, or each violation is told with the segments
before it, and the exit code is 1. "capture_drops" must be 0, else something may not have been seen. --flood adds a local
user without rights who connects to whatever listens on loopback, and the policy must not seem to drift from that. The
same --seed draws the same numbers, but time has a hand in what they are used for. Needs root, ip(8) and nft(8).
"""

from __future__ import annotations

import argparse
import contextlib
import random
import re
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

from common import layout, lines, networks, options, processes, relays, report, sandbox, session
from common.crowd import Clients, flood
from common.fuzzing import FarEnd
from common.networks import ADDRESSES, WIRE, Network
from common.tap import Tap
from common.trouble import Failed, Refusal

TSVAL = 0x11223344
LEVERS = {
    "sysctl": ("0", []),
    "strip": ("1", []),
    "rewrite": ("1", ["--timestamps=rewrite", f"--static-timestamp={TSVAL}"]),
}
# All that a connection can wait for ends soon, so that many come to each end.
_TIMEOUTS = ["--connect-timeout=2", "--idle-timeout=3", "--half-close-timeout=2", "--user-timeout=3000", "--keepalive=1"]
_BEFORE_RELAYING = (
    "connect_refused",
    "connect_timeout",
    "connect_failed",
    "client_left",
    "no_descriptors",
    "no_ports",
    "policy",
)
# True, and no fault, where its own port is flooded.
_FULL = re.compile(r"(error line: no worker takes connections|warning line: \d+ connections, all that --max-connections)")
_END_S, _CLOSED_S, _SERVED_S = 20.0, 1.0, 10.0
_TELL_S = 60.0
_TOLD = 20


def parse() -> argparse.Namespace:
    """The command line."""
    made = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    made.add_argument("--seconds", type=options.number(0.01, 1e6), default=60.0, help="how long (default: %(default)s)")
    made.add_argument("--seed", type=options.whole(0, 1 << 63), help="what chance begins with (default: chance, and told)")
    made.add_argument("--lever", choices=tuple(LEVERS), default="sysctl", help="of the policy (default: %(default)s)")
    made.add_argument("--family", choices=("4", "6", "both"), default="both", help="of the upstream (default: %(default)s)")
    made.add_argument("--rate", type=options.number(1, 1e6), default=500.0, help="of noise, segments/s (default: %(default)s)")
    made.add_argument("--clients", type=options.whole(1, 500), default=20, help="at once, a family (default: %(default)s)")
    made.add_argument("--flood", action="store_true", help="a local user connects to all that listens on loopback")
    made.add_argument("--cpus", type=options.cpus, help="half for load and far end, half for tsproxy, e.g. 2,3")
    return options.with_relays(made).parse_args()


class Target:
    """One family: a port of the exchange, for which the kernel does not answer while the rule stands, and its tsproxy."""

    def __init__(self, family: int, directory: Path) -> None:
        self.host = ADDRESSES[family][1]
        self.listener = socket.create_server((self.host, 0), family=socket.AF_INET6 if family == 6 else socket.AF_INET)
        self.port = self.listener.getsockname()[1]
        self.words = f"[{self.host}]:{self.port}" if family == 6 else f"{self.host}:{self.port}"
        self.output = directory / f"lines{family}"
        self.log = lines.Lines(self.output)
        self.child: Any = None

    @property
    def has_started(self) -> bool:
        """Whether it relays."""
        return "start" in self.log.last

    def close(self) -> None:
        """Give the port and the lines back."""
        self.listener.close()
        self.log.close()


class Run:
    """One run, from the namespaces to the verdict."""

    def __init__(self, stage: session.Stage, args: argparse.Namespace, network: Network, stack: contextlib.ExitStack) -> None:
        self.stage, self.args, self.network, self._stack = stage, args, network, stack
        self.mode = LEVERS[args.lever][1]
        families = [4, 6] if args.family == "both" else [int(args.family)]
        self.targets = [stack.enter_context(contextlib.closing(Target(family, stage.bed.directory))) for family in families]
        tap = stack.enter_context(contextlib.closing(Tap(WIRE, network.mac())))
        self.tap = tap
        constant = TSVAL if args.lever == "rewrite" else None
        self.far_end = FarEnd(tap, [target.port for target in self.targets], constant, args.seed, args.rate)
        self.violations: List[str] = []
        self._told = 0

    def start(self) -> None:
        """The rules on both sides, and tsproxy."""
        drops = "; ".join(f"tcp dport {target.port} drop" for target in self.targets)
        networks.command(
            "nft", "-f", "-", given=f"table inet deaf {{ chain in {{ type filter hook input priority 0; {drops}; }} ; }}"
        )
        program = relays.command(self.args.python, self.args.tsproxy, [])
        if self.args.lever != "sysctl":
            generated = [*program, "generate", "nftables", "-t", self.targets[0].words, *self.mode]
            self.network.run("nft", "-f", "-", given=networks.command(*generated))
        for target in self.targets:
            words = ["--target", target.words, "--port=0", "--metrics-interval=0", *_TIMEOUTS, *self.mode, *self.args.options]
            command = [*self.network.enter, *program, *words]
            target.child = self._stack.enter_context(processes.program(command, self.stage.place.relay, target.output))
        self._turn_until(lambda: all(t.has_started or t.child.poll() is not None for t in self.targets), _END_S)
        for target in self.targets:
            if not target.has_started:
                raise Failed(target.output.with_suffix(".err").read_text(errors="replace").strip() or "tsproxy did not start")

    def rage(self) -> None:
        """Clients and hostility for so long; then all that has begun may end, under noise."""
        end = time.monotonic() + self.args.seconds
        works: List[Callable[[], Any]] = []
        for number, target in enumerate(self.targets):
            port, seed = target.log.last["start"]["listen_port"], f"{self.args.seed}/{number}"
            works.append(Clients(self.network, port, seed, self.args.clients, end).run)
        if self.args.flood:
            works.append(lambda: flood(self.network, self.args.seed, end))
        with processes.tasks(works, self.stage.place.load) as running:
            told = time.monotonic()
            while time.monotonic() < end:
                self._turn()
                if time.monotonic() - told > _TELL_S:
                    told = time.monotonic()
                    report.progress(f"hostile: {max(0.0, end - told):,.0f} s left; {dict(self.far_end.counts)}", settled=True)
            self._turn_until(lambda: all(task.is_ready for task in running), _END_S)
            for task in running:
                self.far_end.counts.update(task.result(1))
        if not self._turn_until(self._is_idle, _END_S):
            self.violations.append(f"after {_END_S:g} s connections were still open")
        self._turn_until(lambda: False, _CLOSED_S)

    def _turn(self) -> None:
        """A moment's work."""
        self.far_end.turn()
        for target in self.targets:
            target.log.take(0.001)
        for text in self.far_end.violations[self._told : _TOLD]:
            report.say(f"hostile: violation: {text}")
            self._told += 1
        if len(self.far_end.violations) > _TOLD:
            del self.far_end.violations[_TOLD:]

    def _turn_until(self, ready: Callable[[], bool], patience_s: float) -> bool:
        end = time.monotonic() + patience_s
        while not ready():
            if time.monotonic() > end:
                return False
            self._turn()
        return True

    def _is_idle(self) -> bool:
        """By its own word, which is asked for twice a second."""
        for target in self.targets:
            before = target.log.seen["metrics"]
            if target.child.poll() is not None:
                return True
            target.child.send_signal(signal.SIGUSR1)
            self._turn_until(lambda before=before, target=target: target.log.seen["metrics"] > before, 5)  # type: ignore[misc]
            if target.log.last.get("metrics", {}).get("downstream_cx_active") != 0:
                self._turn_until(lambda: False, 0.5)
                return False
        return True

    def serve(self) -> None:
        """The exchange is a good one now: one client of each is served. Its segments are judged like all others."""
        networks.command("nft", "delete", "table", "inet", "deaf")
        for target in self.targets:
            ask = Clients(self.network, target.log.last["start"]["listen_port"], "", 1, 0).ask
            with processes.tasks([ask, lambda target=target: echo(target.listener)], self.stage.place.load) as running:  # type: ignore[misc]
                self._look_on(lambda running=running: running[0].is_ready, _SERVED_S)  # type: ignore[misc]
                try:
                    served = running[0].result(0.1)
                except Failed as problem:
                    served = str(problem)
            if served is not True:
                self.violations.append(f"a good exchange was not served at {target.words}: {served}")

    def _look_on(self, ready: Callable[[], bool], patience_s: float) -> None:
        self.far_end.rest()
        self._turn_until(ready, patience_s)

    def stop(self) -> None:
        """Let tsproxy end; its figures must add up."""
        for target in self.targets:
            if target.child.poll() is not None:
                self.violations.append(f"tsproxy ended by itself with {target.child.poll()}")
                continue
            target.child.send_signal(signal.SIGTERM)
            target.log.wait(lambda target=target: "stop" in target.log.last, "stop line")  # type: ignore[misc]
            self.violations += [text for text in _disorder(target) if not (self.args.flood and _FULL.match(text))]
            code = target.child.wait(_END_S)
            self.violations += [f"exit code {code}"] if code else []

    def result(self, seconds: float) -> Dict[str, Any]:
        """The figures; tells what has not been told yet."""
        drops, counts = self.tap.drops(), self.far_end.counts
        found = self.violations + ([f"the capture missed {drops} packets"] if drops else [])
        for text in found:
            report.say(f"hostile: violation: {text}")
        reasons: Dict[str, int] = {}
        for target in self.targets:
            for reason, count in target.log.reasons.items():
                reasons[reason] = reasons.get(reason, 0) + count
        return {
            "event": "result",
            **{name: getattr(self.args, name) for name in ("lever", "family", "seed", "flood")},
            "seconds": round(seconds, 1),
            "segments_sent": counts["sent"],
            "segments_seen": counts["seen"],
            "hostile_per_s": round(counts["sent"] / seconds),
            "connections": counts["connections"],
            "clients": counts["clients"],
            "floods": counts["floods"],
            "relayed": sum(count for reason, count in reasons.items() if reason not in _BEFORE_RELAYING),
            "refused_by_policy": reasons.get("policy", 0),
            "reasons": reasons,
            "violations": counts["violations"] + len(found),
            "capture_drops": drops,
        }


def _disorder(target: Target) -> Iterator[str]:
    """What its lines say that must not be."""
    log, stderr = target.log, target.output.with_suffix(".err").read_text(errors="replace")
    yield from log.violations
    if "Traceback" in stderr:
        yield f"a traceback: {stderr[-2000:]}"
    last = log.last["metrics"]
    if last["downstream_cx_total"] != log.seen["connection"] + last["log_lines_dropped_total"]:
        yield f"{last['downstream_cx_total']} clients were accepted, {log.seen['connection']} have a line"
    for name in ("internal_errors_total", "worker_restarts_total", "downstream_cx_active", "upstream_cx_active"):
        if last[name]:
            yield f"{name} is {last[name]}"


def echo(listener: socket.socket) -> None:
    """Serve whoever comes, until killed."""
    while True:
        client, _ = listener.accept()
        with client:
            while data := client.recv(4096):
                client.sendall(data)


def run(stage: session.Stage, args: argparse.Namespace) -> Dict[str, Any]:
    """Build, rage, judge."""
    if not stage.is_private:
        raise Refusal("no network namespace can be made here")
    sandbox.TIMESTAMPS.write_text("1")  # the exchange's own, for the end, when it is a good one
    # Else the answers to what is out of the window come twice a second only, and ports run out.
    sysctls = {"tcp_timestamps": LEVERS[args.lever][0], "tcp_invalid_ratelimit": "0", "ip_local_port_range": "10000 65000"}
    with contextlib.ExitStack() as stack:
        network = stack.enter_context(contextlib.closing(Network(sysctls)))
        made = Run(stage, args, network, stack)
        made.start()
        began = time.monotonic()
        made.rage()
        seconds = time.monotonic() - began
        made.serve()
        made.stop()
        return made.result(seconds)


def work() -> int:
    """Run and show."""
    args = parse()
    networks.require()
    args.seed = random.SystemRandom().getrandbits(31) if args.seed is None else args.seed
    with session.staged("hostile", args, layout.halves(args.cpus)) as stage:
        report.say(f"hostile: --seed={args.seed}")
        try:
            result = run(stage, args)
        except Failed as problem:
            report.say(f"hostile: {problem}")
            return session.FAILED
    report.json_line("hostile", result)
    return session.FAILED if result["violations"] else 0


if __name__ == "__main__":
    sys.exit(session.run("hostile", work))
