"""Python code in a child process that may lose its rights, and what it printed."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import List

from harness import ROOT


def child(words: List[str], **popen: object) -> str:
    """What a new Python with this library prints; AssertionError if it ends badly."""
    command = [sys.executable, "-c", *words]
    done = subprocess.run(  # type: ignore[call-overload]
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT / "lib")},
        **popen,
    )
    assert done.returncode == 0, done.stderr
    return str(done.stdout)
