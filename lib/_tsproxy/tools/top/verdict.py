"""What may be said of the TCP timestamps of one process, and no more than its lines show.

Knows what the fields prove (see the policies in _tsproxy.policy.levers) and what they leave open. Knows nothing of
terminals.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple, Optional

from _tsproxy.tools.top import words
from _tsproxy.tools.top.model import Process


class Grade(Enum):
    """How good it is; the value is the word in front of the verdict."""

    GOOD = "OK"
    NOTE = "NOTE"
    BAD = "ALARM"
    OPEN = "?"


class Verdict(NamedTuple):
    """One sentence, and what it rests on."""

    grade: Grade
    text: str
    basis: str = ""


_AS_FAR = ", as far as these lines show"
NOTHING = Verdict(Grade.OPEN, "No line yet that tells of timestamps")


def judge(process: Optional[Process]) -> Verdict:
    """The verdict on what has been heard so far."""
    if process is None:
        return NOTHING
    mode = mode_of(process)
    if process.drifted_since:
        since = process.drifted_since[11:19]
        return Verdict(Grade.BAD, f"The policy does not hold since {since}: new connections are refused", _basis(process, mode))
    if mode == "preserve":
        return _preserved(process)
    if mode == "rewrite":
        return _rewritten(process)
    return _stripped(process) if mode == "strip" else _unknown(process)


def mode_of(process: Process) -> str:
    """strip, rewrite or preserve: from the `start` line or, where only one is possible, from the witness; else empty."""
    if process.start:
        return process.start.mode
    return {"sysctl": "strip", "none": "preserve"}.get(process.witness, "")


def stamped(process: Process) -> int:
    """Upstream connections that negotiated timestamps."""
    return max(process.stamped, process.count("upstream_cx_timestamps_total") or 0)


def refused(process: Process) -> int:
    """Connections that the policy refused."""
    return max(process.refused, process.count("upstream_cx_policy_refused_total") or 0)


def _basis(process: Process, mode: str) -> str:
    how = {"": "", "none": "", "trusted": "on trust"}.get(process.witness, f"by {process.witness}")
    return " ".join(part for part in (mode, how) if part)


def _stripped(process: Process) -> Verdict:
    basis, late = _basis(process, "strip"), refused(process) - process.refused_early
    if stamped(process):
        text = f"{_were(stamped(process), 'handshake')} with a timestamp; reset before a byte was relayed"
        return Verdict(Grade.BAD, text, basis)
    if late > 0:
        text = f"No timestamp negotiated; the SYN of {_were(late, 'refused connection')} may have had one"
        return Verdict(Grade.NOTE, text, basis)
    if process.drifts:
        since, until = (at[11:19] for at in process.drifts[-1])
        return Verdict(Grade.NOTE, f"No timestamp negotiated; the policy did not hold {since} to {until}", basis)
    if process.witness == "trusted":
        return Verdict(Grade.NOTE, "No timestamp negotiated; that none left is the user's word", basis)
    return Verdict(Grade.GOOD, f"No TCP timestamp has left{_AS_FAR}", basis)


def _rewritten(process: Process) -> Verdict:
    basis, tsval = _basis(process, "rewrite"), process.start.static_timestamp if process.start else 0
    if process.drifts or refused(process) or process.count("upstream_cx_policy_ended_total"):
        return Verdict(Grade.NOTE, f"TSval {tsval} is what leaves now; the policy did not hold at times", basis)
    if process.witness == "trusted":
        return Verdict(Grade.NOTE, f"That TSval {tsval} is all that leaves is the user's word", basis)
    return Verdict(Grade.GOOD, f"TSval {tsval} is all that leaves{_AS_FAR}", basis)


def _preserved(process: Process) -> Verdict:
    if stamped(process):
        return Verdict(Grade.NOTE, f"Timestamps leave: {_were(stamped(process), 'upstream connection')} with them", "preserve")
    return Verdict(Grade.NOTE, "Timestamps may leave; no connection has negotiated them yet", "preserve")


def _unknown(process: Process) -> Verdict:
    if not process.witness and process.metrics is None:
        return NOTHING
    text = f"Mode not known, for its start line is not here; {_were(stamped(process), 'upstream connection')} with timestamps"
    return Verdict(Grade.OPEN, text, _basis(process, ""))


def _were(count: int, noun: str) -> str:
    return f"{words.count(count)} {noun}{'' if count == 1 else 's'}"
