"""What is said, and done, when the policy stops to hold for an address family, or holds again: once for each change.

Knows what the last looks showed. The workers refuse by themselves, since their gates read the same answers; what is
ordered besides is to end what would leak from now on.
"""

from __future__ import annotations

import time
from typing import Callable, Dict

from _tsproxy.policy.evidence import NAMES, Answer
from _tsproxy.policy.inspector import PolicyCheck
from _tsproxy.policy.levers import Lever
from _tsproxy.supervisor.monitor import Look

Log = Callable[[str, str, str], None]  # event, level, message
_AGAIN_S = 1.0  # while it fails: a connection may have been made by an answer from just before


class Drift:
    """Give it each look."""

    def __init__(self, lever: Lever, log: Log, drifted: Callable[[], None]) -> None:
        """`drifted` is called when the policy fails for some family, and again while it does."""
        self._lever, self._log, self._drifted = lever, log, drifted
        self._answers: Dict[int, Answer] = {}
        self._ordered_at = 0.0
        self.evidence = ""  # of the last failure

    @property
    def refused(self) -> str:
        """What is refused now, in words; "" if nothing is."""
        failing = [family for family, answer in sorted(self._answers.items()) if answer is Answer.FAILS]
        if not failing:
            return ""
        others = Answer.HOLDS in self._answers.values()
        return f"new connections over {' and '.join(map(NAMES.__getitem__, failing))}" if others else "new connections"

    def on_look(self, look: Look) -> None:
        """Say what is not as it was, and end what would leak."""
        before, self._answers[look.family] = self._answers.get(look.family, Answer.NEVER), look.answer
        if look.answer is not before:
            _LEFT.get(before, _nothing)(self, look)
            _ENTERED.get(look.answer, _nothing)(self, look)
        if look.answer is Answer.FAILS and time.monotonic() - self._ordered_at > _AGAIN_S:
            self._ordered_at = time.monotonic()
            self._drifted()

    def _fails(self, look: Look) -> None:
        self._ordered_at, self.evidence = 0.0, _evidence(look.policy_check, self._lever)
        self._log("timestamps_drift", "error", f"{self.refused} are refused until it holds again: {self.evidence}")

    def _failed(self, look: Look) -> None:
        if look.answer is Answer.HOLDS:
            where = f" over {NAMES[look.family]}" if self.refused else ""
            self._log("timestamps_drift", "info", f"the policy holds again{where}: {look.policy_check.evidence}")

    def _unseen(self, look: Look) -> None:
        meanwhile = "the sysctl's value decides" if self._lever is Lever.SYSCTL else "new connections wait for it"
        why, name = look.policy_check.families[look.family].problem, NAMES[look.family]
        self._log("warning", "warning", f"{name} timestamps can't be looked at now: {why}; meanwhile {meanwhile}")

    def _was_unseen(self, look: Look) -> None:
        self._log("warning", "info", f"{NAMES[look.family]} timestamps can be looked at again")

    def _absent(self, look: Look) -> None:
        what = NAMES[look.family]
        self._log("warning", "warning", f"{what} is left out until it comes: no interface has an address of it")

    def _was_absent(self, look: Look) -> None:
        self._log("warning", "info", f"{NAMES[look.family]} is in use again")


def _nothing(drift: Drift, look: Look) -> None:
    """Most answers are as before."""


_ENTERED = {Answer.FAILS: Drift._fails, Answer.UNSEEN: Drift._unseen, Answer.ABSENT: Drift._absent}
_LEFT = {Answer.FAILS: Drift._failed, Answer.UNSEEN: Drift._was_unseen, Answer.ABSENT: Drift._was_absent}


def _evidence(policy_check: PolicyCheck, lever: Lever) -> str:
    other = (
        f"held by {policy_check.lever.word} now, by {lever.word} at the start"
        if policy_check.lever not in (None, lever)
        else ""
    )
    return "; ".join(text for text in (policy_check.problem or other, policy_check.evidence) if text)
