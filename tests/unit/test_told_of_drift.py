"""Whom a drift is told: the routes that connect over the family, once, and of its end those that were told."""

from __future__ import annotations

from socket import AF_INET, AF_INET6
from typing import Dict, List, Tuple

from _tsproxy.policy.evidence import Answer
from _tsproxy.policy.inspector import FamilyCheck, PolicyCheck
from _tsproxy.policy.levers import Lever
from _tsproxy.supervisor.drift import Drift
from _tsproxy.supervisor.monitor import EvidenceUpdate


class Watched:
    """A drift and its lines; `routes` says which ones connect over which family."""

    def __init__(self, **routes: List[int]) -> None:
        self.routes = routes
        self._lines: List[Tuple[str, str, str]] = []
        self.drift = Drift(self._concerned, self._log, lambda: None)

    def _concerned(self, family: int) -> List[str]:
        return [route for route, families in self.routes.items() if family in families]

    def _log(self, route: str, event: str, level: str, message: str) -> None:
        assert event == "timestamps_drift"
        self._lines.append((route, level, message))

    def told(self, family: int, answer: Answer) -> Dict[str, str]:
        """After one more check of the family: who was told, and as what. Each route at most once."""
        self._lines.clear()
        found = FamilyCheck(answer, None, f"{family} fails" if answer is Answer.FAILS else "")
        check = PolicyCheck(None, 1, {family: found}, found.problem)
        self.drift.on_update(EvidenceUpdate(family, Lever.NFTABLES, check, answer, False))
        assert all(str(family) in message for _, level, message in self._lines if level == "error")
        levels = {route: level for route, level, _ in self._lines}
        assert len(levels) == len(self._lines)
        return levels


def test_a_drift_is_told_to_routes_that_use_the_family_once_each() -> None:
    watched = Watched(four=[AF_INET], six=[AF_INET6], both=[AF_INET, AF_INET6])
    assert watched.told(AF_INET, Answer.FAILS) == {"four": "error", "both": "error"}
    assert watched.told(AF_INET, Answer.FAILS) == {}
    assert watched.told(AF_INET6, Answer.FAILS) == {"six": "error", "both": "error"}
    assert watched.told(AF_INET, Answer.HOLDS) == {"four": "info", "both": "info"}
    assert watched.told(AF_INET, Answer.FAILS) == {"four": "error", "both": "error"}, "another one"


def test_a_drift_of_a_family_that_no_route_uses_refuses_nothing_and_nobody_is_told() -> None:
    watched = Watched(four=[AF_INET])
    assert watched.told(AF_INET, Answer.HOLDS) == {}
    assert watched.told(AF_INET6, Answer.FAILS) == {}
    assert watched.drift.refused == ""
    watched.routes["six"] = [AF_INET6]
    assert watched.drift.refused == "new connections over IPv6"


def test_a_route_whose_name_comes_to_the_family_during_a_drift_is_told_and_one_that_leaves_it_hears_of_the_end() -> None:
    watched = Watched(comes=[AF_INET], leaves=[AF_INET6])
    assert watched.told(AF_INET6, Answer.FAILS) == {"leaves": "error"}
    watched.routes.update(comes=[AF_INET6], leaves=[AF_INET])
    assert watched.told(AF_INET6, Answer.FAILS) == {"comes": "error"}
    assert watched.told(AF_INET6, Answer.HOLDS) == {"comes": "info", "leaves": "info"}
    assert watched.told(AF_INET6, Answer.HOLDS) == {}
