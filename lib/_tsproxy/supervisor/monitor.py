"""Keeps the evidence of one address family fresh: a thread that checks every two seconds, and at once when a worker asks.

Knows an Inspector and where to publish what it finds. Knows nothing of what follows from it. A check may block
until its deadline; the main thread, the workers and the other family's monitor go on meanwhile.
"""

from __future__ import annotations

import select
import threading
import time
import traceback
from typing import Callable, NamedTuple, Optional

from _tsproxy.linux import needs, uapi
from _tsproxy.linux.wakeup import Wakeup
from _tsproxy.policy.evidence import FAMILY_NAMES, Answer, Evidence
from _tsproxy.policy.inspector import FamilyCheck, Inspector, PolicyCheck
from _tsproxy.policy.levers import Lever

INTERVAL_S = 2.0
_IN_USE_S = 1.0  # how long a family counts as in use after a SYN that needed its answer
_IN_USE_INTERVAL_S = 0.05  # half of how old an answer may be
_UNSEEN_S = 1.0
_PAUSE_S = 0.02  # after each check: the next must not follow at once on one that took its whole deadline


class EvidenceUpdate(NamedTuple):
    """The result of a check of a family for a lever, and the answer published. `was_asked`: a worker waits for it."""

    family: int
    lever: Lever
    policy_check: PolicyCheck
    answer: Answer
    was_asked: bool


class PolicyMonitor:
    """See the module. Start it after the fork server was forked: it is a thread."""

    def __init__(
        self,
        family: int,
        inspector: Inspector,
        lever: Lever,
        evidence: Evidence,
        asked: Wakeup,
        *,
        on_update: Callable[[EvidenceUpdate], None],
        log_ratelimited: Callable[[str], None],
    ) -> None:
        """`on_update` is called, in the monitor's thread, after each check that changes the answer, or that the policy fails.

        `log_ratelimited` gets the traceback of a bug, which does not end the thread.
        """
        self._family, self._inspector, self._lever = family, inspector, lever
        self._evidence, self._asked = evidence, asked
        self._on_update, self._log_ratelimited = on_update, log_ratelimited
        self._last_answer = Answer.NEVER  # that on_update was called with
        self._unseen_since: Optional[float] = None

    def start(self) -> None:
        """Check from now on, until the process exits. Refused if there can be no thread."""
        name = f"evidence-{FAMILY_NAMES[self._family]}"
        needs.start_thread(threading.Thread(target=self._run, name=name, daemon=True), "to look at timestamps again")

    def _run(self) -> None:
        poller = select.poll()
        poller.register(self._asked.reader, select.POLLIN)
        if self._family not in self._inspector.policy.families:
            poller.poll()  # no worker has asked for it so far
        while True:
            began = time.monotonic_ns()
            was_asked = bool(self._asked.collect())
            try:
                self._check_and_publish(began, was_asked)
            except Exception:
                self._log_ratelimited(traceback.format_exc())  # the answer gets too old, and the gates wait
            time.sleep(_PAUSE_S)
            poller.poll(self._timeout_ms(began))

    def _timeout_ms(self, began: int) -> float:
        """How long until the next check if no worker asks."""
        in_use = self._evidence.needed_since(self._family, time.monotonic_ns() - round(_IN_USE_S * 1e9))
        due = began + round((_IN_USE_INTERVAL_S if in_use or 0 < self._unseen_s <= _UNSEEN_S else INTERVAL_S) * 1e9)
        return max(0.0, (due - time.monotonic_ns()) / 1e6)

    def _check_and_publish(self, began: int, was_asked: bool) -> None:
        policy_check = self._check()
        seen = policy_check.answer(self._family, self._lever)
        answer, steady = self._standing(seen), self._steady(seen)
        self._evidence.publish(self._family, answer, began)
        steady = answer if answer is Answer.FAILS else steady
        if steady is not self._last_answer or answer is Answer.FAILS or (was_asked and answer is not Answer.UNSEEN):
            self._last_answer = steady
            self._on_update(EvidenceUpdate(self._family, self._lever, policy_check, steady, was_asked))

    def _check(self) -> PolicyCheck:
        try:
            return self._inspector.check((self._family,))
        except OSError as error:
            if error.errno not in uapi.CAPACITY:
                raise
            unseen = FamilyCheck(Answer.UNSEEN, None, f"there is no descriptor or memory for it: {error.strerror}")
            return PolicyCheck(None, None, {self._family: unseen}, unseen.problem)

    def _standing(self, answer: Answer) -> Answer:
        """UNSEEN does not replace FAILS; nor HOLDS where the lever is the sysctl, which the kernel reads for each SYN."""
        before = self._evidence.of(self._family).answer
        stands = before is Answer.FAILS or (before is Answer.HOLDS and self._lever is Lever.SYSCTL)
        return before if stands and answer is Answer.UNSEEN else answer

    def _steady(self, answer: Answer) -> Answer:
        """UNSEEN counts once it has lasted for a second; until then the answer before it stands."""
        if answer is not Answer.UNSEEN:
            self._unseen_since = None
            return answer
        self._unseen_since = self._unseen_since or time.monotonic()
        return answer if self._unseen_s > _UNSEEN_S else self._last_answer

    @property
    def _unseen_s(self) -> float:
        """For how long checks have failed; 0: the last one did not."""
        return time.monotonic() - self._unseen_since if self._unseen_since else 0.0
