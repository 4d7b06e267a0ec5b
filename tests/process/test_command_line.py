"""The command line of a process: its exit code, its one line on standard error, and streams that are closed or full."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import List

import pytest
from harness import ROOT

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


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], ["generate", "fields"], ["generate", "nftables", "-t", "[::1]:5"]]
)
def test_an_output_that_can_not_be_written_is_said_and_1(words: List[str]) -> None:
    command = [sys.executable, str(ROOT / "tsproxy.py"), *words]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (1, "tsproxy.py: standard output: No space left on device\n")
