"""Keeps the evidence fresh: a thread of its own that looks every two seconds, and at once when a worker asks.

Knows an Inspector, where to publish what it finds, and whom to tell. Nobody waits for it: a look may block for as long
as its deadline, while clients are served and signals are taken.
"""

from __future__ import annotations

import select
import threading
import time
import traceback
from typing import Callable, Dict, NamedTuple

from _tsproxy.host import linux, needs
from _tsproxy.host.wakeup import Wakeup
from _tsproxy.timestamps.evidence import Answer, Evidence
from _tsproxy.timestamps.inspector import Finding, Inspector
from _tsproxy.timestamps.policy import Lever

INTERVAL_S = 2.0
_IN_USE_S = 1.0  # how long a family stays in use after a SYN that needed it
_PACE_S = 0.05  # between looks at what is in use: half of how old an answer may be
_UNSEEN_S = 1.0
_REST_S = 0.02  # after any look: one that takes its whole deadline must not be followed by the next at once


class Look(NamedTuple):
    """What a look found, and what is known of each family since then. `was_asked`: a worker waits for it."""

    finding: Finding
    answers: Dict[int, Answer]
    was_asked: bool


class Keeper:
    """See the module. Start it after the fork server was made: it is a thread."""

    def __init__(
        self,
        inspector: Inspector,
        lever: Lever,
        evidence: Evidence,
        asked: Wakeup,
        *,
        tell: Callable[[Look], None],
        complain: Callable[[str], None],
    ) -> None:
        """`tell` is called, in the keeper's thread, with each look that was asked for or shows something new.

        `complain` is told a bug; looking goes on.
        """
        self._complain = complain
        self._inspector, self._lever, self._evidence, self._asked, self._tell = inspector, lever, evidence, asked, tell
        self._told: Dict[int, Answer] = {}
        self._unseen_since: Dict[int, float] = {}

    def start(self) -> None:
        """Look from now on, until the process ends. Refused if there can be no thread."""
        needs.start_thread(threading.Thread(target=self._run, name="evidence", daemon=True), "to look at timestamps again")

    def _run(self) -> None:
        poller = select.poll()
        poller.register(self._asked.reader, select.POLLIN)
        while True:
            began = time.monotonic_ns()
            was_asked = bool(self._asked.collect())
            try:
                self._look(began, was_asked)
            except Exception as error:
                # The answers grow old now, and the gates wait: so it is for want of descriptors, and so for a bug.
                if not isinstance(error, OSError) or error.errno not in linux.CAPACITY:
                    self._complain(traceback.format_exc())
            time.sleep(_REST_S)
            poller.poll(self._patience_ms(began))

    def _patience_ms(self, began: int) -> float:
        """How long until the next look if nobody asks."""
        in_use = self._evidence.needed_since(time.monotonic_ns() - round(_IN_USE_S * 1e9))
        due = began + round((_PACE_S if in_use or self._unseen_since else INTERVAL_S) * 1e9)
        return max(0.0, (due - time.monotonic_ns()) / 1e6)

    def _look(self, began: int, was_asked: bool) -> None:
        """Look at the families of the start, and at each that was ever needed."""
        families = list(dict.fromkeys([*self._inspector.wanted.families, *self._evidence.needed_since(0)]))
        finding = self._inspector.look(families)
        answers = {family: finding.answer(family, self._lever) for family in families}
        for family, answer in answers.items():
            self._publish(family, answer, began)
        steady = {family: self._steady(family, answer) for family, answer in answers.items()}
        if was_asked or steady != self._told:
            self._told = steady
            self._tell(Look(finding, steady, was_asked))

    def _publish(self, family: int, answer: Answer, began: int) -> None:
        """Under the sysctl, which is read for each SYN, a look that failed itself takes nothing back."""
        stands = self._lever is Lever.SYSCTL and self._evidence.of(family).answer is Answer.HOLDS
        if not (stands and answer is Answer.UNSEEN):
            self._evidence.publish(family, answer, began)

    def _steady(self, family: int, answer: Answer) -> Answer:
        """An answer that did not come is news only when it has not for a second; until then the one before stands."""
        if answer is not Answer.UNSEEN:
            self._unseen_since.pop(family, None)
            return answer
        since = self._unseen_since.setdefault(family, time.monotonic())
        return answer if time.monotonic() - since > _UNSEEN_S else self._told.get(family, Answer.NEVER)
