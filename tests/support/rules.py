"""The nftables rules that `generate` writes, the constant that tests rewrite timestamps to, and a look at what rules do."""

from __future__ import annotations

import subprocess
import sys
from typing import Optional

from _tsproxy.policy.evidence import Answer
from _tsproxy.policy.inspector import Inspector, PolicyCheck
from harness import ROOT, wait_until

TSVAL = 0x11223344
REWRITE = ("--timestamps=rewrite", f"--static-timestamp={TSVAL}")


def generated(*options: str) -> str:
    """The nftables rules that `generate` writes."""
    command = [sys.executable, str(ROOT / "tsproxy.py"), "generate", "nftables", "-t", "192.0.2.1:1", *options]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def looked_at(inspector: Inspector) -> PolicyCheck:
    """A check that has seen each family: it has 0.5 s, in which loopback may not answer on a busy machine."""

    def look() -> Optional[PolicyCheck]:
        found = inspector.check()
        return None if found.of(Answer.UNSEEN) else found

    seen: PolicyCheck = wait_until(look, "each family is seen")
    return seen
