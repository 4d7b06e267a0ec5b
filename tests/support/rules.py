"""The nftables rules that `generate` writes, and the constant that tests rewrite timestamps to."""

from __future__ import annotations

import subprocess
import sys

from harness import ROOT

TSVAL = 0x11223344
REWRITE = ("--timestamps=rewrite", f"--static-timestamp={TSVAL}")


def generated(*options: str) -> str:
    """The nftables rules that `generate` writes."""
    command = [sys.executable, str(ROOT / "tsproxy.py"), "generate", "nftables", "-t", "192.0.2.1:1", *options]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
