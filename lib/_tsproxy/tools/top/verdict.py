"""What may be said of the TCP timestamps of one process, or of one of its routes, and no more than its lines show.

Knows what the fields prove (see the policies in _tsproxy.policy.levers) and what they leave open. Knows nothing of
terminals.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple, Optional, Sequence, Tuple

from _tsproxy.tools.top import words
from _tsproxy.tools.top.model import Process, Route, Watched


class Grade(Enum):
    """How good it is, the worst first; the value is the word in front of the verdict."""

    BAD = "ALARM"
    OPEN = "?"
    NOTE = "NOTE"
    GOOD = "OK"


class Verdict(NamedTuple):
    """One sentence, and what it rests on."""

    grade: Grade
    text: str
    basis: str = ""


_AS_FAR = ", as far as these lines show"
NOTHING = Verdict(Grade.OPEN, "No line yet that tells of timestamps")


def judge(watched: Optional[Watched]) -> Verdict:
    """The verdict on what has been heard so far. Of a process with routes: on the worst of them."""
    if watched is None:
        return NOTHING
    mode = mode_of(watched)
    if watched.drifted_since:
        since = watched.drifted_since[11:19]
        return Verdict(Grade.BAD, f"The policy does not hold since {since}: new connections are refused", _basis(watched, mode))
    if isinstance(watched, Process) and watched.is_routed:
        return _of_routes(watched.routes)
    if mode == "preserve":
        return _preserved(watched)
    if mode == "rewrite":
        return _rewritten(watched)
    return _stripped(watched) if mode == "strip" else _unknown(watched)


def mode_of(watched: Watched) -> str:
    """strip, rewrite or preserve: from its first line or, where only one is possible, from the witness; else empty."""
    if watched.start:
        return watched.start.mode
    return {"sysctl": "strip", "none": "preserve"}.get(watched.witness, "")


def stamped(watched: Watched) -> int:
    """Upstream connections that negotiated timestamps."""
    return max(watched.stamped, watched.count_since("upstream_cx_timestamps_total"))


def refused(watched: Watched) -> int:
    """Connections that the policy refused."""
    return max(watched.refused, watched.count_since("upstream_cx_policy_refused_total"))


_NAMED = 3  # of several routes of one grade


def _of_routes(routes: Sequence[Route]) -> Verdict:
    """Of one route that is not well its own words, of several how many and which."""
    judged = [(judge(route), route) for route in routes]
    worst = next((grade for grade in Grade if any(verdict.grade is grade for verdict, _ in judged)), None)
    these = [(verdict, route) for verdict, route in judged if verdict.grade is worst]
    if worst is None:
        return NOTHING
    if worst is Grade.GOOD:
        return _all_good(judged[0][0].basis, routes)
    good = sum(verdict.grade is Grade.GOOD for verdict, _ in judged)
    return Verdict(worst, _not_well(these, len(routes)), f"{good} of {len(routes)} OK")


def _all_good(basis: str, routes: Sequence[Route]) -> Verdict:
    what = "One TSval is all that leaves" if mode_of(routes[0]) == "rewrite" else "No TCP timestamp has left"
    by = "the one route" if len(routes) == 1 else f"any of {len(routes)} routes"
    return Verdict(Grade.GOOD, f"{what} by {by}{_AS_FAR}", basis)


def _not_well(these: Sequence[Tuple[Verdict, Route]], of: int) -> str:
    (verdict, first), *others = these
    since = first.drifted_since[11:19]
    if not others:
        return f"{first.name} refuses new connections: not held since {since}" if since else f"{first.name}: {verdict.text}"
    names = ", ".join([route.name for _, route in these[:_NAMED]] + ["..."] * (len(these) > _NAMED))
    what = {Grade.BAD: "in alarm", Grade.OPEN: "not known", Grade.NOTE: "with a note"}[verdict.grade]
    if all(route.drifted_since for _, route in these):
        what = f"refuse new connections since {since}"
    return f"{len(these)} of {of} routes {what}: {names}"


def _basis(watched: Watched, mode: str) -> str:
    how = {"": "", "none": "", "trusted": "on trust"}.get(watched.witness, f"by {watched.witness}")
    return " ".join(part for part in (mode, how) if part)


def _stripped(watched: Watched) -> Verdict:
    basis, late = _basis(watched, "strip"), refused(watched) - watched.refused_early
    if stamped(watched):
        text = f"{words.counted(stamped(watched), 'handshake')} with a timestamp; reset before a byte was relayed"
        return Verdict(Grade.BAD, text, basis)
    if late > 0:
        text = f"No timestamp negotiated; the SYN of {words.counted(late, 'refused connection')} may have had one"
        return Verdict(Grade.NOTE, text, basis)
    if watched.drifts:
        since, until = (at[11:19] for at in watched.drifts[-1])
        return Verdict(Grade.NOTE, f"No timestamp negotiated; the policy did not hold {since} to {until}", basis)
    if watched.witness == "trusted":
        return Verdict(Grade.NOTE, "No timestamp negotiated; that none left is the user's word", basis)
    return Verdict(Grade.GOOD, f"No TCP timestamp has left{_AS_FAR}", basis)


def _rewritten(watched: Watched) -> Verdict:
    basis, tsval = _basis(watched, "rewrite"), watched.start.static_timestamp if watched.start else 0
    if watched.drifts or refused(watched) or watched.count("upstream_cx_policy_ended_total"):
        return Verdict(Grade.NOTE, f"TSval {tsval} is what leaves now; the policy did not hold at times", basis)
    if watched.witness == "trusted":
        return Verdict(Grade.NOTE, f"That TSval {tsval} is all that leaves is the user's word", basis)
    return Verdict(Grade.GOOD, f"TSval {tsval} is all that leaves{_AS_FAR}", basis)


def _preserved(watched: Watched) -> Verdict:
    if stamped(watched):
        return Verdict(
            Grade.NOTE, f"Timestamps leave: {words.counted(stamped(watched), 'upstream connection')} with them", "preserve"
        )
    return Verdict(Grade.NOTE, "Timestamps may leave; no connection has negotiated them yet", "preserve")


def _unknown(watched: Watched) -> Verdict:
    if not watched.witness and watched.metrics is None:
        return NOTHING
    line = "route" if isinstance(watched, Route) else "start"
    seen = words.counted(stamped(watched), "upstream connection")
    text = f"Mode not known, for its {line} line is not here; {seen} with timestamps"
    return Verdict(Grade.OPEN, text, _basis(watched, ""))
