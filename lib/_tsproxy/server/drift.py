"""Whether the policy still holds, every few seconds: one line when it does not, one when it does again.

Knows an Inspector and whom to tell. The workers refuse by themselves, connection by connection, since each asks its
gate; what is done here besides is to end what a drift would make leak.
"""

from __future__ import annotations

import time
from typing import Callable, Optional

from _tsproxy.host import linux
from _tsproxy.timestamps.policy import Finding, Inspector, Lever

INTERVAL_S = 2.0


class DriftWatch:
    """Ask it for `due_s` and call look() then. A trusted host, or `preserve`, is never looked at."""

    def __init__(self, inspector: Inspector, lever: Lever, drifted: Callable[[str], None], held: Callable[[str], None]) -> None:
        """`drifted` and `held` are told the evidence, once for each change."""
        self._inspector, self._lever = inspector, lever
        self._drifted, self._held = drifted, held
        self._holds = True
        self._next = time.monotonic() + INTERVAL_S

    @property
    def due_s(self) -> Optional[float]:
        """Seconds until the next look; None if there is nothing to watch."""
        if self._lever in (Lever.NONE, Lever.TRUSTED):
            return None
        return max(0.0, self._next - time.monotonic())

    def look(self) -> None:
        """Look now, and tell a change. What can't be looked at for want of descriptors is no change: the gates still ask."""
        self._next = time.monotonic() + INTERVAL_S
        try:
            finding = self._inspector.look()
        except OSError as error:
            if error.errno not in linux.CAPACITY:
                raise
            return
        holds = finding.lever is self._lever
        if holds != self._holds:
            self._holds = holds
            (self._held if holds else self._drifted)(_evidence(finding, self._lever))


def _evidence(finding: Finding, lever: Lever) -> str:
    other = f"held by {finding.lever.word} now, by {lever.word} at the start" if finding.lever not in (None, lever) else ""
    return "; ".join(text for text in (finding.problem or other, finding.evidence) if text)
