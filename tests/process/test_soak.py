"""The soak: a minute of it as CI has it, a moment of it on each runtime, and that it sees what it is there to see."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest
from harness import ROOT, children, wait_until
from program import RUNTIMES, python_for, slow_but

SOAK = ROOT / "bench/soak.py"
SHORT = ["--seconds=1", "--clients=8", "--seed=1"]


def soak(*options: str, seconds: float = 100) -> Tuple[int, Dict[str, Any], str]:
    """Exit code, the result line, and what was said."""
    command = [sys.executable, str(SOAK), "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["event"] for line in lines] in ([], ["setup", "result"]), done.stderr
    return done.returncode, lines[-1] if lines else {}, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_minute_of_everything_leaves_nothing_behind() -> None:
    code, result, said = soak("--seconds=60", seconds=190)
    assert code == 0, said
    assert result["violations"] == 0
    assert result["connections"] > 100  # far below what it comes to: how much it is in a minute is for bench/
    kinds = ["orders", "upload", "download", "both ways", "short", "half-closed", "slow reader", "drip-fed reader"]
    for kind in [*kinds, "silent visit"]:
        assert result[f"{kind} connections"] > 0, kind
    assert {"closed", "client_reset", "server_reset"} <= set(result["reasons"])
    assert result["verified_bytes"] > 10_000_000


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNTIMES)
def test_each_runtime_gets_through_a_moment_of_it(kind: str, bundle: Path) -> None:
    python = python_for(kind)
    code, result, said = soak("--seconds=5", f"--runtime={kind}", f"--python={python}", f"--tsproxy={bundle}")
    assert code == 0, said
    assert result["connections"] > 10


@pytest.mark.slow
def test_a_moment_of_it_over_routes_that_are_reloaded_each_second() -> None:
    code, result, said = soak(*SHORT, "--routes=4", "--memory-room=64")
    assert code == 0, said
    assert result["violations"] == 0
    assert result["reloads"] > 0
    assert 0 < result["reload_us_p50"] <= result["reload_us_max"]
    assert 0 < result["probe_us_p50"] <= result["probe_us_p99"] <= result["probe_us_max"]


def faulty(directory: Path, patch: str) -> str:
    """tsproxy with a fault: a program to give to --tsproxy, which runs under --runtime=threads, in one interpreter."""
    program = directory / "faulty.py"
    program.write_text(f"import runpy, sys\nsys.path.insert(0, {str(ROOT / 'lib')!r})\n{patch}\n" + _RUN)
    return f"--tsproxy={program}"


_RUN = f"runpy.run_path({str(ROOT / 'tsproxy.py')!r}, run_name='__main__')\n"

# What is patched is the data path's one way to the kernel, so that the proxy itself believes that all went well.
# It happens to each larger piece, behind what may be a header: one piece alone could be the last of its connection,
# whose loss can only be waited for, or go to somebody who resets without reading it.
_SEND = """
import socket
class Sender(socket.socket):
    sent = 0
    def send(self, data, *flags):
        Sender.sent += 1
        if Sender.sent < 200 or len(data) < 400:
            return super().send(data)
        {send}
from _tsproxy.linux import sockets
real_from_fd, real_dial = sockets.from_fd, sockets.dial
def turned(sock):
    return Sender(sock.family, sock.type, sock.proto, fileno=sock.detach())
def from_fd(fd):
    sock = turned(real_from_fd(fd))
    sock.setblocking(False)
    return sock
def dial(*args, **words):
    sock = turned(real_dial(*args, **words))
    sock.setblocking(False)
    return sock
sockets.from_fd, sockets.dial = from_fd, dial
"""

FAULTS = {
    "a byte is changed": (
        _SEND.format(send="return super().send(bytes(data[:200]) + bytes([data[200] ^ 1]) + bytes(data[201:]))"),
        "not those that were sent",
    ),
    "a piece is lost": (
        _SEND.format(send="n = super().send(bytes(data[:200]) + bytes(data[300:])); return n + 100 if n > 200 else n"),
        "not those that were sent",
    ),
    "a cut stream looks complete": (
        "from _tsproxy.linux import sockets\nsockets.reset_on_close = lambda sock: None",
        "looks complete",
    ),
    "descriptors leak": (
        "from _tsproxy.proxy import worker\n"
        "import os\n"
        "real = worker.Session\n"
        "def session(*args):\n"
        "    os.open(os.devnull, os.O_RDONLY)\n"
        "    return real(*args)\n"
        "worker.Session = session\n",
        "other_fds at the end",
    ),
    "threads leak": (
        "from _tsproxy.proxy import worker\n"
        "import threading\n"
        "real = worker.Session\n"
        "def session(*args):\n"
        "    threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        "    return real(*args)\n"
        "worker.Session = session\n",
        "threads at the end",
    ),
    "memory leaks": (
        "from _tsproxy.proxy import worker\n"
        "kept, real = [], worker.Session\n"
        "def session(*args):\n"
        "    kept.append(b'x' * 1_000_000)\n"
        "    return real(*args)\n"
        "worker.Session = session\n",
        "rss_kib at the end",
    ),
    "a connection is not counted": (
        "from _tsproxy.proxy.context import RouteContext\n"
        "from _tsproxy.stats.counters import Counter\n"
        "real = RouteContext.count\n"
        "skipped = []\n"
        "def count(self, counter, by=1):\n"
        "    if counter is Counter.ENDED and not skipped:\n"
        "        skipped.append(1)\n"
        "        return\n"
        "    real(self, counter, by)\n"
        "RouteContext.count = count\n",
        "end of all connections",
    ),
    "a line is not written": (
        "from _tsproxy.stats.reporter import Reporter\n"
        "real, skipped = Reporter._put_record, []\n"
        "def record(self, record):\n"
        "    real(self, record) if skipped else skipped.append(1)\n"
        "Reporter._put_record = record\n",
        "active or with a line",
    ),
}


@pytest.mark.parametrize("fault", slow_but(["a byte is changed"], FAULTS))
def test_a_fault_of_the_proxy_is_noticed_and_named(fault: str, tmp_path: Path) -> None:
    patch, word = FAULTS[fault]
    enough = "--seconds=3"  # for each kind of ending to happen, on a busy machine, too
    code, result, said = soak(*SHORT, enough, "--runtime=threads", "--options=--zero-copy=never", faulty(tmp_path, patch))
    assert code == 1
    assert result["violations"] > 0
    assert any(word in text for text in result["violation_texts"]), said
    assert "soak: violation: " in said


def test_a_signal_ends_it_with_everything_it_started() -> None:
    command = [sys.executable, str(SOAK), "--seconds=600", "--clients=4"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: len(children(running.pid)) == 5, "two far ends, tsproxy and two loads are there")
        started = family(running.pid)[1:]
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=30)
    finally:
        running.kill()
        running.communicate()
    assert (running.returncode, out) == (130, "")
    assert "Traceback" not in err
    wait_until(lambda: not [pid for pid in started if Path(f"/proc/{pid}").exists()], "nothing is left of it")


def test_when_it_is_killed_its_clients_and_far_ends_end_too(tmp_path: Path) -> None:
    command = [sys.executable, str(SOAK), "--seconds=600", "--clients=4"]
    running = subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "TMPDIR": str(tmp_path)})
    started: List[int] = []
    try:
        wait_until(lambda: len(children(running.pid)) == 5, "two far ends, tsproxy and two loads are there")
        started = family(running.pid)[1:]
        own = [pid for pid in started if b"soak.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert len(own) == 4
        running.kill()
        wait_until(lambda: not [pid for pid in own if Path(f"/proc/{pid}").exists()], "they have ended", 60)
    finally:
        running.kill()
        running.wait()
        for pid in started:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def family(pid: int) -> List[int]:
    found = [pid]
    for member in found:
        found += children(member)
    return found


def test_a_tsproxy_that_does_not_start_is_told_and_ends_with_1() -> None:
    code, result, said = soak(*SHORT, "--options=--no-such-option")
    assert (code, result) == (1, {})
    assert "--no-such-option" in said


@pytest.mark.parametrize("wrong", ["--seconds=soon", "--clients=0", "--runtime=fibres", "--seed=-1", "--fast", "more"])
def test_a_wrong_argument_costs_one_line_and_exit_2(wrong: str) -> None:
    done = subprocess.run([sys.executable, str(SOAK), wrong], capture_output=True, text=True, check=False, timeout=20)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("soak.py: error: ")
    assert done.stderr.count("\n") == 1


def test_people_get_a_table_and_help_tells_how_to_read_it() -> None:
    done = subprocess.run([sys.executable, str(SOAK), *SHORT], capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    for word in ("short", "what tsproxy holds", "rss_kib", "at the end", "ended: closed", "violations"):
        assert word in done.stdout
    told = subprocess.run([sys.executable, str(SOAK), "--help"], capture_output=True, text=True, check=False, timeout=20)
    assert "How to read it:" in told.stdout
