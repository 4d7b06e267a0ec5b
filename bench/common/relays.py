"""The relays that are compared, and how each is started: fresh for every measurement, on the relay's CPU, on a free port."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any, Callable, ContextManager, Dict, FrozenSet, Iterator, List, NamedTuple, Optional, Sequence

from common import peers
from common.figures import DIRECT, OURS
from common.processes import program
from common.trouble import Failed, Refusal

SPIN = f"{OURS}-spin"
SPIN_OPTION = "--busy-poll=1000"
NAMES = (DIRECT, OURS, SPIN, "haproxy", "nginx", "socat")
_PATIENCE_S = 15.0
_LOOK_S = 0.001


class Running(NamedTuple):
    """A relay that accepts connections. Direct has no process: its port is the far end's."""

    port: int
    pid: Optional[int] = None
    start_line: Dict[str, Any] = {}  # noqa: RUF012 (never changed)
    start_ms: float = 0.0  # from fork(2) until it accepted, give or take _LOOK_S


class Relay(NamedTuple):
    """A name, and how to start it before a far end's port."""

    name: str
    start: Callable[[int], ContextManager[Running]]


class Bed(NamedTuple):
    """What starting a relay takes: its CPUs, a directory for its files, and how tsproxy is called."""

    cpus: FrozenSet[int]
    directory: Path
    tsproxy: List[str]

    def all(self, only: Sequence[str] = (), workers: int = 1) -> List[Relay]:
        """Those of NAMES that can be had here, or those of them that are named."""
        found = [Relay(DIRECT, direct), self.ours(OURS, f"--workers={workers}")]
        found.append(self.ours(SPIN, f"--workers={workers}", SPIN_OPTION))
        found += [self.other(name, make, workers) for name, make in peers.installed().items()]
        chosen = [relay for relay in found if relay.name in only or not only]
        missing = set(only) - {relay.name for relay in chosen}
        if missing:
            raise Refusal(f"not installed here: {', '.join(sorted(missing))}")
        return chosen

    def other(self, name: str, make: peers.Command, workers: int = 1) -> Relay:
        """A relay that `make` gives the command of. It is there when its port accepts."""
        return Relay(name, partial(_peer, self, make, workers))

    def ours(self, name: str, *options: str) -> Relay:
        """tsproxy with these options."""
        return Relay(name, partial(_tsproxy, self, options))

    def routed(self, name: str, routes: int, *options: str) -> Relay:
        """tsproxy with a file of so many routes, all to the one target, and with these options."""
        return Relay(name, partial(_routed, self, routes, options))


@contextlib.contextmanager
def direct(target: int) -> Iterator[Running]:
    """No relay at all: what the load generator and the far end cost by themselves."""
    yield Running(target)


def command(python: str, program: Path, extra: Sequence[str]) -> List[str]:
    """tsproxy's command, once it has shown that it runs; Refusal with what it says if it does not."""
    words = [python, str(program)]
    try:
        told = subprocess.run([*words, "--version"], capture_output=True, text=True, timeout=_PATIENCE_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as problem:
        raise Refusal(f"can't run {python}: {problem}") from None
    if told.returncode == 0:
        return [*words, *extra]
    said = told.stderr.strip().rsplit("\n", 1)[-1]
    if "docopt" in said:
        raise Refusal(
            f"{python} has no docopt-ng, which the checkout needs. A bundle needs nothing: make one where docopt-ng is "
            f"installed ({program.name} bundle OUT), and test that: --tsproxy OUT"
        )
    raise Refusal(f"{' '.join(words)} does not run: {said or f'exit code {told.returncode}'}")


@contextlib.contextmanager
def _tsproxy(bed: Bed, options: Sequence[str], target: int) -> Iterator[Running]:
    with _started(bed, [f"--target=127.0.0.1:{target}", "--port=0", *options]) as running:
        yield running


@contextlib.contextmanager
def _routed(bed: Bed, routes: int, options: Sequence[str], target: int) -> Iterator[Running]:
    file = bed.directory / "routes.ini"
    keys = f"target = 127.0.0.1:{target}\nport = 0\nmax-connections = 20\n"
    file.write_text("".join(f"[route-{number}]\n{keys}" for number in range(routes)))
    with _started(bed, [f"--routes={file}", *options]) as running:
        yield running


@contextlib.contextmanager
def _started(bed: Bed, options: Sequence[str]) -> Iterator[Running]:
    output, words = bed.directory / "tsproxy.out", [*bed.tsproxy, *options]
    began = time.monotonic()
    with program(words, bed.cpus, output) as child:
        line = _wait(child, lambda: _start_line(output), output)
        yield Running(line["listen_port"], child.pid, line, (time.monotonic() - began) * 1000)


def _start_line(output: Path) -> Optional[Dict[str, Any]]:
    for text in output.read_bytes().splitlines(keepends=True):
        if text.endswith(b"\n"):
            line: Dict[str, Any] = json.loads(text)
            if line["event"] == "start":
                return line
    return None


@contextlib.contextmanager
def _peer(bed: Bed, make: peers.Command, workers: int, target: int) -> Iterator[Running]:
    port = _free_port()
    output = bed.directory / "peer.out"
    words = make(bed.directory, port, target, workers)
    began = time.monotonic()
    with program(words, bed.cpus, output) as child:
        _wait(child, lambda: _accepts(port), output)
        yield Running(port, child.pid, start_ms=(time.monotonic() - began) * 1000)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def _wait(child: subprocess.Popen[bytes], ready: Callable[[], Any], output: Path) -> Any:
    """The first true answer; Failed with what the program said if it ends before."""
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        ended = child.poll() is not None
        answer = ready()
        if answer:
            return answer
        if ended:
            said = output.with_suffix(".err").read_text(errors="replace").strip()
            raise Failed(said or f"it ended with {child.returncode}")
        time.sleep(_LOOK_S)
    raise Failed(f"did not begin within {_PATIENCE_S:g} s")
