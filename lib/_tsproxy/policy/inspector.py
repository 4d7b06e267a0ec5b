"""One check of this host: the sysctl, a witness SYN for each family and, with rules, a rehearsal of a far end that misbehaves.

Knows how to check, and what a result means for a policy. Knows nothing of when to check, or of what follows.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Dict, Iterable, List, NamedTuple, Optional, Set

from _tsproxy.linux import sockets, uapi
from _tsproxy.policy import rehearsal, witness
from _tsproxy.policy.evidence import FAMILY_NAMES, Answer
from _tsproxy.policy.levers import Lever, Policy
from _tsproxy.policy.syn import Syn
from _tsproxy.policy.sysctl import PATH, Sysctl
from _tsproxy.policy.witness import FamilyAbsent, NoWitness

CHECK_TIMEOUT_S = 0.5  # for one check of one family
_REHEARSAL_VALID_S = 2.0  # how long the result of a rehearsal counts


class FamilyCheck(NamedTuple):
    """The result for one address family; `problem` says why it is not HOLDS."""

    answer: Answer
    syn: Optional[Syn] = None
    problem: str = ""
    fix: str = ""  # the command that helps if the check itself failed


class PolicyCheck(NamedTuple):
    """The result of one check. `lever` is None if the policy does not hold, or if that is not known; `problem` says why."""

    lever: Optional[Lever]
    sysctl: Optional[int]
    families: Dict[int, FamilyCheck]
    problem: str = ""

    @property
    def syns(self) -> Dict[int, Syn]:
        """The witness SYNs, by family."""
        return {family: found.syn for family, found in self.families.items() if found.syn}

    @property
    def evidence(self) -> str:
        """What was seen, for people."""
        seen = [f"{FAMILY_NAMES[family]} SYN with {syn}" for family, syn in self.syns.items()]
        return "; ".join([f"net.ipv4.tcp_timestamps={self.sysctl}", *seen])

    def of(self, answer: Answer) -> Dict[int, FamilyCheck]:
        """The families with this answer."""
        return {family: found for family, found in self.families.items() if found.answer is answer}

    def of_policy(self, policy: Policy) -> PolicyCheck:
        """The same check as it is for one of several policies: with the families of its own targets."""
        if policy.mode == "preserve":
            return PolicyCheck(Lever.NONE, self.sysctl, {})
        early = None if self.sysctl is None else _without_witness(policy, self.sysctl)
        if early or self.sysctl is None:
            return early or self
        families = {family: self.families[family] for family in policy.families if family in self.families}
        return _combined(self.sysctl, families)

    def answer(self, family: int, lever: Lever) -> Answer:
        """The answer for a gate of `lever`. StripBySysctl reads the sysctl for each SYN, so rules can't replace it there."""
        found = self.families.get(family)
        if found is None or (lever is Lever.SYSCTL and self.sysctl != 0 and found.answer is Answer.HOLDS):
            return Answer.FAILS
        return found.answer


class Inspector:
    """Checks whether the policy holds, once for each call; keeps the sysctl's descriptor open.

    After the first check any thread may check: two that check the same family do so one after the other.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._sysctl: Optional[Sysctl] = None
        # Whether the rules replace sockets.TAG_DSCP, so that upstream sockets may set it: by the first check that held.
        self.rules_clear_mark: Optional[bool] = None
        self._rehearsed: Dict[int, float] = {}  # family -> when the rules last held in a rehearsal
        self._saw_segments: Set[int] = set()  # families of which a rehearsal has seen each segment
        self._locks = {family: threading.Lock() for family in FAMILY_NAMES}

    def check(self, families: Iterable[int] = ()) -> PolicyCheck:
        """Check these families, or those of the start. Blocks for at most CHECK_TIMEOUT_S for each.

        OSError without a descriptor or memory for it (EMFILE, ENFILE, ENOBUFS, ENOMEM), which says nothing of timestamps.
        """
        try:
            self._sysctl = self._sysctl or Sysctl()
            value = self._sysctl.value()
        except (OSError, ValueError) as error:
            if self.policy.mode == "preserve":  # the sysctl does not matter
                return PolicyCheck(Lever.NONE, None, {})
            if getattr(error, "errno", None) in uapi.CAPACITY:
                raise
            return PolicyCheck(None, None, {}, f"can't read {PATH}: {getattr(error, 'strerror', None) or error}")
        early = _without_witness(self.policy, value)
        if early:
            return early
        return _combined(value, {family: self._check_alone(family, value) for family in families or self.policy.families})

    def _check_alone(self, family: int, sysctl: int) -> FamilyCheck:
        with self._locks[family]:
            return self._check_family(family, sysctl)

    def _check_family(self, family: int, sysctl: int) -> FamilyCheck:
        deadline = time.monotonic() + CHECK_TIMEOUT_S
        try:
            seen = witness.capture_syn(family, deadline)
            problem = self._mismatch(family, seen) or (
                self._check_rules(family, seen, deadline) if sysctl or self.rules_clear_mark else ""
            )
        except FamilyAbsent as absent:
            return FamilyCheck(Answer.ABSENT, None, str(absent))
        except NoWitness as unseen:
            return FamilyCheck(Answer.UNSEEN, None, str(unseen), unseen.fix)
        return FamilyCheck(Answer.FAILS if problem else Answer.HOLDS, seen, problem)

    def _mismatch(self, family: int, seen: Syn) -> str:
        what = f"not TSval {self.policy.tsval}" if self.policy.mode == "rewrite" else "TSopt"
        return "" if self.policy.fits(seen) else f"the witness SYN ({FAMILY_NAMES[family]}) carries {what}"

    def _check_rules(self, family: int, seen: Syn, deadline: float) -> str:
        """Why rules that hold for our SYN are not enough; "" if they are. Rules that match sockets.TAG_DSCP replace it."""
        marked = seen.dscp == sockets.TAG_DSCP
        if marked and (self.policy.mode == "rewrite" or self.rules_clear_mark):
            return f"{rehearsal.MISBEHAVES}: {rehearsal.TIME_WAIT} (they do not know the mark of its answer, DSCP {seen.dscp})"
        leak = self._rehearse(family, deadline) and self._rehearse(family, deadline)  # twice: it may end sessions
        if leak:
            return f"{rehearsal.MISBEHAVES}: {leak}"
        if self.rules_clear_mark is None:
            self.rules_clear_mark = not marked
        return ""

    def _rehearse(self, family: int, deadline: float) -> str:
        now = time.monotonic()
        if now - self._rehearsed.get(family, -_REHEARSAL_VALID_S) < _REHEARSAL_VALID_S:
            return ""
        self._rehearsed.pop(family, None)
        leak, saw_segments = rehearsal.rehearse(family, self.policy, deadline, seen_before=family in self._saw_segments)
        if saw_segments and not leak:
            self._saw_segments.add(family)
        if not leak:
            self._rehearsed[family] = now
        return leak

    @property
    def rehearsed(self) -> List[str]:
        """What was rehearsed, for people; more with the right to see each segment (CAP_NET_ADMIN)."""
        return rehearsal.rehearsed(self.policy, bool(self._saw_segments))

    def close(self) -> None:
        """Close the descriptor."""
        if self._sysctl:
            with contextlib.closing(self._sysctl):
                self._sysctl = None


def _without_witness(policy: Policy, value: int) -> Optional[PolicyCheck]:
    """The results that need no witness SYN; None if one is needed."""
    if policy.mode == "preserve":
        return PolicyCheck(Lever.NONE, value, {})
    if policy.mode == "rewrite" and value == 0:
        problem = "net.ipv4.tcp_timestamps is 0 here, so there is no timestamp to rewrite"
        return PolicyCheck(None, value, {family: FamilyCheck(Answer.FAILS, None, problem) for family in FAMILY_NAMES}, problem)
    return PolicyCheck(Lever.TRUSTED, value, {}) if policy.trusted else None


def _combined(value: int, families: Dict[int, FamilyCheck]) -> PolicyCheck:
    """FAILS for one family fails the policy; UNSEEN and ABSENT do only if no family HOLDS."""
    lever = Lever.SYSCTL if value == 0 else Lever.NFTABLES
    policy_check = PolicyCheck(lever, value, families)
    failed = policy_check.of(Answer.FAILS) or (not policy_check.of(Answer.HOLDS) and families)
    return policy_check._replace(lever=None, problem=_problem(failed)) if failed else policy_check


def _problem(failed: Dict[int, FamilyCheck]) -> str:
    return "; ".join(dict.fromkeys(found.problem for found in failed.values()))
