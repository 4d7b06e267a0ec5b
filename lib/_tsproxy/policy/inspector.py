"""One look at this host: the sysctl, a witness SYN for each family and, where rules are relied on, what a far end could do.

Knows how to look and what it means for a policy. Knows nothing of when to look, or of what follows.
"""

from __future__ import annotations

import contextlib
import time
from typing import Dict, Iterable, List, NamedTuple, Optional, Set

from _tsproxy.linux import sockets
from _tsproxy.policy import rehearsal, witness
from _tsproxy.policy.evidence import NAMES, Answer
from _tsproxy.policy.levers import Lever, Policy
from _tsproxy.policy.syn import Syn
from _tsproxy.policy.sysctl import PATH, Sysctl
from _tsproxy.policy.witness import FamilyAbsent, NoWitness

LOOK_S = 0.5  # the deadline of all that one look does
REHEARSED_S = 2.0  # how long it counts that the rules held against a far end that misbehaves


class FamilyCheck(NamedTuple):
    """What one look showed of one address family; `problem` says why it is anything but HOLDS."""

    answer: Answer
    syn: Optional[Syn] = None
    problem: str = ""
    fix: str = ""  # the command that would help a look that failed itself


class PolicyCheck(NamedTuple):
    """What one look showed. `lever` is None if the policy does not hold, or is not seen to; `problem` then says why."""

    lever: Optional[Lever]
    sysctl: Optional[int]
    families: Dict[int, FamilyCheck]
    problem: str = ""

    @property
    def syns(self) -> Dict[int, Syn]:
        """The witness SYNs that were seen, by family."""
        return {family: found.syn for family, found in self.families.items() if found.syn}

    @property
    def evidence(self) -> str:
        """What was seen, for people."""
        seen = [f"{NAMES[family]} SYN with {syn}" for family, syn in self.syns.items()]
        return "; ".join([f"net.ipv4.tcp_timestamps={self.sysctl}", *seen])

    def of(self, answer: Answer) -> Dict[int, FamilyCheck]:
        """The families of which the look gave this answer."""
        return {family: found for family, found in self.families.items() if found.answer is answer}

    def answer(self, family: int, lever: Lever) -> Answer:
        """What it means for who rests on `lever`: rules can't stand in for the sysctl, which is read for each SYN there."""
        found = self.families.get(family)
        if found is None or (lever is Lever.SYSCTL and self.sysctl != 0 and found.answer is Answer.HOLDS):
            return Answer.FAILS
        return found.answer


class Inspector:
    """Looks whether the policy holds, as often as it is asked; keeps the sysctl's descriptor open.

    After its first look two threads may look, at different families.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._sysctl: Optional[Sysctl] = None
        # Whether rules take sockets.TAG_DSCP off again, so that upstream sockets may carry it: as of the first that held.
        self.mark_is_known: Optional[bool] = None
        self._rehearsed: Dict[int, float] = {}  # family -> when the rules last held against misbehaviour
        self._saw_all: Set[int] = set()  # families of which each segment was seen then

    def look(self, families: Iterable[int] = ()) -> PolicyCheck:
        """One look at these families, or at those of the start; blocks for LOOK_S at most for each.

        OSError where there is no descriptor or memory for it (EMFILE and friends): that tells nothing of timestamps.
        """
        try:
            self._sysctl = self._sysctl or Sysctl()
            value = self._sysctl.value()
        except (OSError, ValueError) as error:
            if self.policy.mode == "preserve":  # nothing rests on it
                return PolicyCheck(Lever.NONE, None, {})
            return PolicyCheck(None, None, {}, f"can't read {PATH}: {getattr(error, 'strerror', None) or error}")
        early = _without_witness(self.policy, value)
        if early:
            return early
        return _judged(value, {family: self._of(family, value) for family in families or self.policy.families})

    def _of(self, family: int, sysctl: int) -> FamilyCheck:
        until = time.monotonic() + LOOK_S
        try:
            seen = witness.saved(family, until)
            problem = self._mismatch(family, seen) or (self._rules(family, seen, until) if sysctl or self.mark_is_known else "")
        except FamilyAbsent as absent:
            return FamilyCheck(Answer.ABSENT, None, str(absent))
        except NoWitness as unseen:
            return FamilyCheck(Answer.UNSEEN, None, str(unseen), unseen.fix)
        return FamilyCheck(Answer.FAILS if problem else Answer.HOLDS, seen, problem)

    def _mismatch(self, family: int, seen: Syn) -> str:
        what = f"not TSval {self.policy.tsval}" if self.policy.mode == "rewrite" else "TSopt"
        return "" if self.policy.fits(seen) else f"the witness SYN ({NAMES[family]}) carries {what}"

    def _rules(self, family: int, seen: Syn, until: float) -> str:
        """What is wrong with rules that hold for our SYN. Those that know our mark (sockets.TAG_DSCP) take it off again."""
        marked = seen.dscp == sockets.TAG_DSCP
        if marked and (self.policy.mode == "rewrite" or self.mark_is_known):
            return f"{rehearsal.MISBEHAVES}: {rehearsal.TIME_WAIT} (they do not know the mark of its answer, DSCP {seen.dscp})"
        leak = self._rehearse(family, until) and self._rehearse(family, until)  # twice: established ones may end for it
        if leak:
            return f"{rehearsal.MISBEHAVES}: {leak}"
        if self.mark_is_known is None:
            self.mark_is_known = not marked
        return ""

    def _rehearse(self, family: int, until: float) -> str:
        now = time.monotonic()
        if now - self._rehearsed.get(family, -REHEARSED_S) < REHEARSED_S:
            return ""
        self._rehearsed.pop(family, None)
        leak, saw_all = rehearsal.rehearse(family, self.policy, until, seen_before=family in self._saw_all)
        if saw_all and not leak:
            self._saw_all.add(family)
        if not leak:
            self._rehearsed[family] = now
        return leak

    @property
    def tried(self) -> List[str]:
        """What a far end could do that was rehearsed, in words; with the right to see each segment that is more."""
        return rehearsal.tried(self.policy, bool(self._saw_all))

    def close(self) -> None:
        """Close the descriptor."""
        if self._sysctl:
            with contextlib.closing(self._sysctl):
                self._sysctl = None


def _without_witness(policy: Policy, value: int) -> Optional[PolicyCheck]:
    """The cases that no SYN needs to be looked at for."""
    if policy.mode == "preserve":
        return PolicyCheck(Lever.NONE, value, {})
    if policy.mode == "rewrite" and value == 0:
        problem = "net.ipv4.tcp_timestamps is 0 here, so there is no timestamp to rewrite"
        return PolicyCheck(None, value, {family: FamilyCheck(Answer.FAILS, None, problem) for family in NAMES}, problem)
    return PolicyCheck(Lever.TRUSTED, value, {}) if policy.trusted else None


def _judged(value: int, families: Dict[int, FamilyCheck]) -> PolicyCheck:
    """What fails for one family fails the policy; what can't be looked at only if nothing else holds."""
    lever = Lever.SYSCTL if value == 0 else Lever.NFTABLES
    policy_check = PolicyCheck(lever, value, families)
    bad = policy_check.of(Answer.FAILS) or (not policy_check.of(Answer.HOLDS) and families)
    return policy_check._replace(lever=None, problem=_problem(bad)) if bad else policy_check


def _problem(bad: Dict[int, FamilyCheck]) -> str:
    return "; ".join(dict.fromkeys(found.problem for found in bad.values()))
