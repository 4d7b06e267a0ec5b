"""Logs when the policy stops to hold for an address family, or holds again: once for each change and route.

Knows the last answers, and which routes were told. Knows nothing of sessions: the gates of the workers read the same answers,
and refuse by themselves; what it has done besides is that sessions which would leak from now on are ended.
"""

from __future__ import annotations

import time
from typing import Callable, Dict, List, Sequence

from _tsproxy.policy.evidence import FAMILY_NAMES, Answer
from _tsproxy.policy.inspector import PolicyCheck
from _tsproxy.policy.levers import Lever
from _tsproxy.supervisor.monitor import EvidenceUpdate

Log = Callable[[str, str, str, str], None]  # route, event, level, message
_DRIFT = "timestamps_drift"
_REPEAT_S = 1.0  # while it fails: the answer before may have let one more session connect


class Drift:
    """Call on_update() with each update of the monitors, in one thread."""

    def __init__(self, concerned: Callable[[int], Sequence[str]], log: Log, on_failure: Callable[[], None]) -> None:
        """`on_failure` is called when the policy fails for some family, and every second while it does.

        `concerned` names the routes that connect over a family now, and need its policy: where none does nothing is refused.
        """
        self._concerned, self._log, self._on_failure = concerned, log, on_failure
        self._told: Dict[int, List[str]] = {family: [] for family in FAMILY_NAMES}  # of a drift that goes on
        self._answers: Dict[int, Answer] = {}
        self._called_at = 0.0
        self.evidence = ""  # of the last failure

    @property
    def failing(self) -> List[int]:
        """The address families over which new connections are refused."""
        failing = [family for family, answer in sorted(self._answers.items()) if answer is Answer.FAILS]
        return [family for family in failing if self._concerned(family)]

    @property
    def refused(self) -> str:
        """What is refused now, for people; "" if nothing is."""
        failing = self.failing
        if not failing:
            return ""
        others = Answer.HOLDS in self._answers.values()
        return f"new connections over {' and '.join(map(FAMILY_NAMES.__getitem__, failing))}" if others else "new connections"

    def on_update(self, update: EvidenceUpdate) -> None:
        """Log a change; have sessions that would leak ended."""
        before, self._answers[update.family] = self._answers.get(update.family, Answer.NEVER), update.answer
        if update.answer is not before:
            self._log_left(before, update)
            self._log_entered(update)
        if update.answer is Answer.FAILS:
            self._go_on_failing(update)

    def _go_on_failing(self, update: EvidenceUpdate) -> None:
        """Each time: a name may have got its first address of this family since."""
        evidence = _evidence(update.policy_check, update.lever)
        self._tell(update.family, _DRIFT, "error", f"{self.refused} are refused until it holds again: {evidence}")
        if time.monotonic() - self._called_at > _REPEAT_S:
            self._called_at = time.monotonic()
            self._on_failure()

    def _tell(self, family: int, event: str, level: str, message: str) -> None:
        """Each route that it concerns; of a drift those that were not told, and of its end also those that were."""
        told, routes = self._told[family], list(self._concerned(family))
        if event == _DRIFT and level == "error":
            routes = [route for route in routes if route not in told]
            told += routes
        elif event == _DRIFT:
            routes = list(dict.fromkeys([*routes, *told]))
        for route in routes:
            self._log(route, event, level, message)

    def _log_left(self, before: Answer, update: EvidenceUpdate) -> None:
        name = FAMILY_NAMES[update.family]
        if before is Answer.UNSEEN:
            self._tell(update.family, "warning", "info", f"{name} timestamps can be looked at again")
        elif before is Answer.ABSENT:
            self._tell(update.family, "warning", "info", f"{name} is in use again")
        elif before is Answer.FAILS and update.answer is Answer.HOLDS:
            where = f" over {name}" if self.refused else ""
            self._tell(update.family, _DRIFT, "info", f"the policy holds again{where}: {update.policy_check.evidence}")

    def _log_entered(self, update: EvidenceUpdate) -> None:
        name = FAMILY_NAMES[update.family]
        if update.answer is Answer.FAILS:
            self._called_at, self.evidence = 0.0, _evidence(update.policy_check, update.lever)
            self._told[update.family].clear()
        elif update.answer is Answer.UNSEEN:
            meanwhile = "the sysctl's value decides" if update.lever is Lever.SYSCTL else "new connections wait for it"
            why = update.policy_check.families[update.family].problem
            self._tell(
                update.family, "warning", "warning", f"{name} timestamps can't be looked at now: {why}; meanwhile {meanwhile}"
            )
        elif update.answer is Answer.ABSENT:
            self._tell(
                update.family, "warning", "warning", f"{name} is left out until it comes: no interface has an address of it"
            )


def _evidence(policy_check: PolicyCheck, lever: Lever) -> str:
    other = (
        f"held by {policy_check.lever.label} now, by {lever.label} at the start"
        if policy_check.lever not in (None, lever)
        else ""
    )
    return "; ".join(text for text in (policy_check.problem or other, policy_check.evidence) if text)
