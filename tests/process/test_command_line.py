"""The command line of a process: its exit code, its one line on standard error, and streams that are closed or full."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import List

import pytest
from harness import CHECKOUT, ROOT

T = "--target=a:1"
SAMPLE = [
    [],
    ["--max=5", T],
    [T, "--time", "strip"],
    [T, "--reuse-port=1"],
    [T, "--port"],
    [T, "-p1", "-p1"],
    [T, "--", "--maxconnections=5"],
    ["bundel"],
    ["bundle"],
    ["bundle", "out", "--port=1"],
    ["-p"],
    ["\udcff\n"],
]


@pytest.mark.parametrize("words", SAMPLE, ids=lambda words: ascii(" ".join(words)))
def test_the_command_itself_ends_with_2_and_one_line(words: List[str]) -> None:
    command = [sys.executable, str(ROOT / "tsproxy.py"), *words]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False, env={**os.environ, "LC_ALL": "C"})
    assert (done.returncode, done.stdout) == (2, b"")
    line = done.stderr.decode()
    assert line.startswith("tsproxy.py: ")
    assert line[:-1].isprintable()
    assert line[-1] == "\n"


def test_where_standard_error_is_closed_the_line_does_not_go_to_standard_output() -> None:
    shell = ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, str(ROOT / "tsproxy.py"), "--max=5"]
    done = subprocess.run(shell, stdout=subprocess.PIPE, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, b"")


PRESERVE = ["-t127.0.0.1:9", "--timestamps=preserve"]
EMPTY_CAPTURE = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1)  # the header of a pcap file, and no packet


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with a file of routes, a capture, and one that ends within a record."""
    (tmp_path / "routes").write_text("[a]\nport = 9001\ntarget = 127.0.0.1:9\ntimestamps = preserve\n")
    (tmp_path / "capture").write_bytes(EMPTY_CAPTURE)
    (tmp_path / "cut").write_bytes(EMPTY_CAPTURE + bytes(8))
    return tmp_path


def redirected(place: Path, redirections: str, *words: str) -> subprocess.CompletedProcess[str]:
    """How it ends with these redirections, whatever of the three streams is left."""
    shell = ["sh", "-c", f'exec "$@" {redirections}', "sh", *CHECKOUT, *words]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(
        shell, cwd=place, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("redirections", ["1>&-", "0<&- 2>&-"])
@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["check", *PRESERVE], 0),
        (["check", *PRESERVE, "--json"], 0),
        (["check", "--routes=routes"], 0),
        (["generate", "fields"], 0),
        (["bundle", "-"], 0),
        (["top"], 0),
        (["audit", "capture"], 65),
        (["audit", "cut", "--json"], 65),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else str(words),
)
def test_standard_descriptors_that_are_closed_change_no_exit_code(
    place: Path, words: List[str], code: int, redirections: str
) -> None:
    done = redirected(place, redirections, *words)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr


def test_demo_needs_none_of_the_standard_descriptors(place: Path) -> None:
    assert redirected(place, "0<&- 1>&- 2>&-", "demo").returncode == 0


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["-t", "a"], 2),
        (["--routes=/nonexistent"], 2),
        ([*PRESERVE, "--source=192.0.2.1", "-p0"], 75),
        (["audit", "/dev/null"], 65),
        (["audit", "cut", "--json"], 65),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else str(words),
)
def test_a_standard_error_that_is_full_changes_no_exit_code(place: Path, words: List[str], code: int) -> None:
    assert redirected(place, "2>/dev/full", *words).returncode == code


def test_a_port_that_is_taken_is_69_where_standard_error_is_full_too(place: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert redirected(place, "2>/dev/full", *PRESERVE, f"-p{port}").returncode == 69


def test_a_missing_module_is_2_where_standard_error_is_full_too() -> None:
    with open("/dev/full", "wb") as full:
        words = [sys.executable, "-I", "-S", str(ROOT / "tsproxy.py"), "--version"]
        assert subprocess.run(words, stderr=full, timeout=60, check=False).returncode == 2


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--version"],
        ["generate", "fields"],
        ["generate", "nftables", "-t", "[::1]:5"],
        ["check", *PRESERVE],
        ["bundle", "-"],
    ],
)
def test_an_output_that_can_not_be_written_is_said_and_1(words: List[str]) -> None:
    command = [sys.executable, str(ROOT / "tsproxy.py"), *words]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (1, "tsproxy.py: standard output: No space left on device\n")


def test_an_output_that_was_opened_for_reading_is_said_and_1(place: Path) -> None:
    done = redirected(place, "1</dev/null", "--version")
    assert (done.returncode, done.stderr) == (1, "tsproxy.py: standard output: Bad file descriptor\n")


def test_an_output_that_can_not_be_written_after_another_failure_changes_no_exit_code(place: Path) -> None:
    """The table is in Python's buffer when the picture fails; the interpreter's end would make 120 of it."""
    done = redirected(place, "1>/dev/full", "audit", "capture", "--svg=/dev/full")
    assert (done.returncode, done.stderr) == (1, "tsproxy.py: can't write '/dev/full': No space left on device\n")


IMPORTS = """
import sys
import tsproxy
from docopt import docopt
from _tsproxy.linux import inherited
from _tsproxy.tools import main

def note():
    before.update(sys.modules)

before, inherited.unblock_signals = set(), note
main.run(tsproxy.__doc__, sys.argv[1:], docopt)
assert before
late = set(sys.modules) - before
print(*(name for name in late if "orjson" in name or name.startswith("_tsproxy.tools")), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "words", [["audit", "capture", "--json"], ["check", *PRESERVE, "--json"], ["generate", "fields"], ["top"]]
)
def test_a_command_is_imported_before_ctrl_c_can_interrupt_that(place: Path, words: List[str]) -> None:
    """orjson ends with SIGSEGV when a KeyboardInterrupt comes while it is imported."""
    command = [sys.executable, "-c", IMPORTS, *words]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'lib'}"}
    done = subprocess.run(
        command, cwd=place, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr.strip()) == (0, "")
