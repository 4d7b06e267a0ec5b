"""What was found, ready to be shown: the judged flows with their judgements, and what is true of the whole capture.

Knows flows and verdicts. Knows nothing of how they are shown.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Dict, List, Mapping, Optional

from _tsproxy.tools.audit import observer, verdict
from _tsproxy.tools.audit.claims import Agreement
from _tsproxy.tools.audit.flows import Direction, Flows
from _tsproxy.tools.audit.observer import Learned
from _tsproxy.tools.audit.scope import Scope
from _tsproxy.tools.audit.verdict import Judge, Judgement


@dataclass
class Report:
    """`judgements` and `clocks` are by flow; `problems` are what is wrong with which capture, for people."""

    scope: Scope
    files: int
    frames: int
    drops: int
    unparsed: Mapping[str, int]
    problems: List[str]
    judged: List[Direction]
    judgements: Dict[Direction, Judgement]
    verdict: str  # the worst of all flows
    clocks: Mapping[Direction, Learned] = field(default_factory=dict)
    agreement: Optional[Agreement] = None  # with the lines of a proxy, where those were given

    @property
    def senders(self) -> List[str]:
        """The addresses that sent what was judged, in the order of their first segment."""
        return list(dict.fromkeys(flow.source for flow in self.judged))


def report(flows: Flows, scope: Scope, files: int, drops: int, problems: List[str]) -> Report:
    """Judge each flow in the scope. `problems`: each stands for frames that are missing."""
    judge = Judge(flows.directions, not drops and not problems, flows.blurred)
    judged = [flow for flow in flows.directions if flow.is_judged]
    judgements = {flow: judge.judge(flow) for flow in judged}
    worst = verdict.overall(found.verdict for found in judgements.values())
    capture = (files, flows.frames, drops, dict(flows.unparsed), problems)
    return Report(scope, *capture, judged, judgements, worst, observer.learn(judged))
