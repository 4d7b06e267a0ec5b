"""Keeps the evidence of one address family fresh: a thread that looks every two seconds, and at once when a worker asks.

Knows an Inspector, where to publish what it finds, and whom to tell. Nobody waits for it: a look may block for as long
as its deadline, while clients are served, signals are taken, and the other family is looked at.
"""

from __future__ import annotations

import select
import threading
import time
import traceback
from typing import Callable, NamedTuple, Optional

from _tsproxy.linux import needs, uapi
from _tsproxy.linux.wakeup import Wakeup
from _tsproxy.policy.evidence import NAMES, Answer, Evidence
from _tsproxy.policy.inspector import FamilyCheck, Inspector, PolicyCheck
from _tsproxy.policy.levers import Lever

INTERVAL_S = 2.0
_IN_USE_S = 1.0  # how long a family stays in use after a SYN that needed it
_PACE_S = 0.05  # between looks at what is in use: half of how old an answer may be
_UNSEEN_S = 1.0
_REST_S = 0.02  # after any look: one that takes its whole deadline must not be followed by the next at once


class Look(NamedTuple):
    """What a look at a family found, and what is known of it since then. `was_asked`: a worker waits for an answer."""

    family: int
    policy_check: PolicyCheck
    answer: Answer
    was_asked: bool


class PolicyMonitor:
    """See the module. Start it after the fork server was made: it is a thread."""

    def __init__(
        self,
        family: int,
        inspector: Inspector,
        lever: Lever,
        evidence: Evidence,
        asked: Wakeup,
        *,
        tell: Callable[[Look], None],
        log_ratelimited: Callable[[str], None],
    ) -> None:
        """`tell` is called, in the monitor's thread, with each look that shows something new, or that the policy fails.

        `complain` is told a bug; looking goes on.
        """
        self._family, self._inspector, self._lever = family, inspector, lever
        self._evidence, self._asked = evidence, asked
        self._tell, self._log_ratelimited = tell, log_ratelimited
        self._told = Answer.NEVER
        self._unseen_since: Optional[float] = None

    def start(self) -> None:
        """Look from now on, until the process ends. Refused if there can be no thread."""
        name = f"evidence-{NAMES[self._family]}"
        needs.start_thread(threading.Thread(target=self._run, name=name, daemon=True), "to look at timestamps again")

    def _run(self) -> None:
        poller = select.poll()
        poller.register(self._asked.reader, select.POLLIN)
        if self._family not in self._inspector.policy.families:
            poller.poll()  # nobody has needed it so far
        while True:
            began = time.monotonic_ns()
            was_asked = bool(self._asked.collect())
            try:
                self._look(began, was_asked)
            except Exception:
                self._log_ratelimited(traceback.format_exc())  # the answers grow old now, and the gates wait
            time.sleep(_REST_S)
            poller.poll(self._patience_ms(began))

    def _patience_ms(self, began: int) -> float:
        """How long until the next look if nobody asks."""
        in_use = self._evidence.needed_since(self._family, time.monotonic_ns() - round(_IN_USE_S * 1e9))
        due = began + round((_PACE_S if in_use or self._unseen_since else INTERVAL_S) * 1e9)
        return max(0.0, (due - time.monotonic_ns()) / 1e6)

    def _look(self, began: int, was_asked: bool) -> None:
        policy_check = self._find()
        seen = policy_check.answer(self._family, self._lever)
        answer, steady = self._standing(seen), self._steady(seen)
        self._evidence.publish(self._family, answer, began)
        steady = answer if answer is Answer.FAILS else steady
        if steady is not self._told or answer is Answer.FAILS or (was_asked and answer is not Answer.UNSEEN):
            self._told = steady
            self._tell(Look(self._family, policy_check, steady, was_asked))

    def _find(self) -> PolicyCheck:
        try:
            return self._inspector.look((self._family,))
        except OSError as error:
            if error.errno not in uapi.CAPACITY:
                raise
            unseen = FamilyCheck(Answer.UNSEEN, None, f"there is no descriptor or memory for it: {error.strerror}")
            return PolicyCheck(None, None, {self._family: unseen}, unseen.problem)

    def _standing(self, answer: Answer) -> Answer:
        """A look that failed itself takes nothing back of what failed; nor, under the sysctl, which is read for each SYN."""
        before = self._evidence.of(self._family).answer
        stands = before is Answer.FAILS or (before is Answer.HOLDS and self._lever is Lever.SYSCTL)
        return before if stands and answer is Answer.UNSEEN else answer

    def _steady(self, answer: Answer) -> Answer:
        """An answer that did not come is news only when it has not for a second; until then the one before stands."""
        if answer is not Answer.UNSEEN:
            self._unseen_since = None
            return answer
        self._unseen_since = self._unseen_since or time.monotonic()
        return answer if time.monotonic() - self._unseen_since > _UNSEEN_S else self._told
