"""What is said, and done, when the policy stops to hold, or holds again: once for each change, by address family.

Knows what the last look showed. The workers refuse by themselves, since their gates read the same answers; what is
ordered besides is to end what would leak from now on.
"""

from __future__ import annotations

from typing import Callable, Dict, FrozenSet, Iterable

from _tsproxy.server.keeper import Look
from _tsproxy.timestamps.evidence import NAMES, Answer
from _tsproxy.timestamps.inspector import Finding
from _tsproxy.timestamps.policy import Lever

Say = Callable[[str, str, str], None]  # event, level, message
_NONE: FrozenSet[int] = frozenset()


class Drift:
    """Give it each look."""

    def __init__(self, lever: Lever, say: Say, drifted: Callable[[], None]) -> None:
        """`drifted` is called when the policy does not hold any more for some family."""
        self._lever, self._say, self._drifted = lever, say, drifted
        self.failing = self._unseen = self._absent = _NONE
        self.refused = self.evidence = ""  # what is refused while anything fails, and why

    def on_look(self, look: Look) -> None:
        """Say what is not as it was."""
        families = {answer: frozenset(family for family, given in look.answers.items() if given is answer) for answer in Answer}
        self._on_failing(look, families)
        self._on_unseen(look, families[Answer.UNSEEN])
        self._on_absent(families[Answer.ABSENT])

    def _on_failing(self, look: Look, families: Dict[Answer, FrozenSet[int]]) -> None:
        """What failed, and can't be looked at now, fails on."""
        before = self.failing
        self.failing = failing = families[Answer.FAILS] | (before & families[Answer.UNSEEN])
        if failing - before:
            self._drifted()
            self.refused = f"new connections over {names(failing)}" if families[Answer.HOLDS] else "new connections"
            self.evidence = _evidence(look.finding, self._lever)
            self._say("timestamps_drift", "error", f"{self.refused} are refused until it holds again: {self.evidence}")
        elif before & families[Answer.HOLDS]:
            where = f" over {names(before - failing)}" if failing else ""
            self._say("timestamps_drift", "info", f"the policy holds again{where}: {look.finding.evidence}")

    def _on_unseen(self, look: Look, unseen: FrozenSet[int]) -> None:
        before, self._unseen = self._unseen, unseen
        for family in sorted(unseen - before):
            meanwhile = "the sysctl's value decides" if self._lever is Lever.SYSCTL else "new connections wait for it"
            why = look.finding.families[family].problem if family in look.finding.families else "it was not looked at"
            self._say("warning", "warning", f"{NAMES[family]} timestamps can't be looked at now: {why}; meanwhile {meanwhile}")
        if before - unseen:
            self._say("warning", "info", f"{names(before - unseen)} timestamps can be looked at again")

    def _on_absent(self, absent: FrozenSet[int]) -> None:
        before, self._absent = self._absent, absent
        if absent - before:
            what = names(absent - before)
            self._say("warning", "warning", f"{what} is left out until it comes: no interface has an address of it")
        if before - absent:
            self._say("warning", "info", f"{names(before - absent)} is in use again")


def names(families: Iterable[int]) -> str:
    """E.g. "IPv4 and IPv6"."""
    return " and ".join(NAMES[family] for family in sorted(families))


def _evidence(finding: Finding, lever: Lever) -> str:
    other = f"held by {finding.lever.word} now, by {lever.word} at the start" if finding.lever not in (None, lever) else ""
    return "; ".join(text for text in (finding.problem or other, finding.evidence) if text)
