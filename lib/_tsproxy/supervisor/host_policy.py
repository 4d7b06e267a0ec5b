"""What makes the policies of all routes hold on this host: one inspector and one lever for those that the host decides.

Knows the inspector, and the monitors that keep its evidence fresh. Knows nothing of routes, or of what follows from a check.
"""

from __future__ import annotations

from functools import partial
from typing import Callable, List, Mapping, Optional, Sequence

from _tsproxy.linux.wakeup import Wakeup
from _tsproxy.policy import levers
from _tsproxy.policy.evidence import Answer, Evidence
from _tsproxy.policy.inspector import FamilyCheck, Inspector, PolicyCheck
from _tsproxy.policy.levers import Lever, Policy
from _tsproxy.supervisor.monitor import EvidenceUpdate, PolicyMonitor


class HostPolicy:
    """See the module. `lever` is what the checked policies hold by: NONE while there is none of these."""

    def __init__(self) -> None:
        self._inspector: Optional[Inspector] = None
        self._is_monitored = False
        self.lever = Lever.NONE

    @property
    def inspector(self) -> Inspector:
        """The one by which all was checked. Not before the first check."""
        if self._inspector is None:
            raise RuntimeError("nothing was checked")
        return self._inspector

    @property
    def for_rules(self) -> bool:
        """Whether upstream sockets set the mark that packet filter rules replace."""
        return bool(self._inspector and self._inspector.rules_clear_mark)

    def check(self, policies: Sequence[Policy]) -> List[PolicyCheck]:
        """One for each policy. Blocks for a second at most. While monitors run, only by the lever that they check.

        OSError without a descriptor or memory for it, as Inspector.check().
        """
        common = levers.common(policies)
        if not self._is_monitored:
            if self._inspector:
                self._inspector.close()
            self._inspector = Inspector(common)
        found = check_twice(self.inspector, common.families)
        checks = [found.of_policy(policy) for policy in policies]
        if self._is_monitored:
            return [self._by_lever(policy_check) for policy_check in checks]
        held = (policy_check.lever for policy_check in checks if policy_check.lever in levers.MONITORED)
        self.lever = next(held, None) or Lever.NONE
        return checks

    def _by_lever(self, policy_check: PolicyCheck) -> PolicyCheck:
        if policy_check.lever not in levers.MONITORED or policy_check.lever is self.lever:
            return policy_check
        changed = (
            f"it is held by {policy_check.lever.label} now, by {self.lever.label} at the start, and is refused until restarted"
        )
        families = {family: FamilyCheck(Answer.FAILS, found.syn, changed) for family, found in policy_check.families.items()}
        return policy_check._replace(lever=None, families=families, problem=changed)

    def monitor(
        self,
        evidence: Evidence,
        asked: Mapping[int, Wakeup],
        *,
        on_update: Callable[[EvidenceUpdate], None],
        log_ratelimited: Callable[[str], None],
    ) -> None:
        """Start a monitor for each address family, if there is something to monitor: neither waits for the other. Once."""
        if self._is_monitored or self.lever not in levers.MONITORED:
            return
        self._is_monitored = True
        made = partial(PolicyMonitor, on_update=on_update, log_ratelimited=log_ratelimited)
        for family, wakeup in asked.items():
            made(family, self.inspector, self.lever, evidence, wakeup).start()


def check_twice(inspector: Inspector, families: Sequence[int] = ()) -> PolicyCheck:
    """Inspect; once more where the inspection itself failed, as it may on a busy host."""
    policy_check = inspector.check(families)
    return inspector.check(families) if policy_check.lever is None and policy_check.of(Answer.UNSEEN) else policy_check
