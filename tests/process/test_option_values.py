"""A bad value of an option ends the process with 2 and one line."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from command_line import LONE, TARGET
from harness import ROOT

SAMPLE = [
    ("--port", "65536"),
    ("--port", "1\n2"),
    ("--port", "\u0663"),
    ("--bind", "::1%a\nb"),
    ("--bind", "localhost"),
    ("--timestamps", "rewritten"),
    ("--static-timestamp", "4294967296"),
    ("--buffer-size", "64\u212a"),
    ("--cpus", "9999"),
    ("--idle-timeout", "0.5ms"),
    ("--user", LONE),
    ("--user", "\x1b[31m"),
    ("--target", "999.1.1.1:1"),
    ("--target", "b\u00fccher:1"),
    ("--target", ""),
    ("--target", "--port=1"),
    ("--source", "eth0"),
    ("--allow", "10.0.0.1/8"),
    ("--allow", "x" * 5000),
]


@pytest.mark.parametrize(("option", "value"), SAMPLE, ids=[f"{option}={value!a:.40}" for option, value in SAMPLE])
def test_the_command_ends_with_2_and_that_one_line(option: str, value: str) -> None:
    command = [sys.executable, str(ROOT / "tsproxy.py"), "-t", TARGET, option, value]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False, env={**os.environ, "LC_ALL": "C.UTF-8"})
    assert (done.returncode, done.stdout) == (2, b"")
    line = done.stderr.decode()
    assert line.startswith(f"tsproxy.py: {option}: given {value!r}; allowed: ")
    assert line.count("\n") == 1
    assert line.endswith("\n")
