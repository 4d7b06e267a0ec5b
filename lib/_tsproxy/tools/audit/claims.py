"""What a proxy claims of its connections, held against what the wire showed of them.

A claim and a flow belong together if their four addresses and ports are the same and they were there at the same time:
ports are reused. Of several the one that began nearest is meant. What the wire shows of the clients' legs, and what is
sent back, is of a claimed connection too.

Knows claims, flows and verdicts. Knows nothing of how either was read.
"""

from __future__ import annotations

from collections import Counter
from typing import Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Set, Tuple

from _tsproxy.tools.audit import verdict
from _tsproxy.tools.audit.flows import Direction
from _tsproxy.tools.audit.lines import CLEAN, EITHER, NOTHING, STAMPED, Claim, End, Lines
from _tsproxy.tools.audit.scope import Scope
from _tsproxy.tools.audit.verdict import Judgement

Ends = Tuple[End, End]
_CLOCKS_NS = 5_000_000_000  # by how much the clocks of the proxy's host and of the capture may differ
_MOST_EXAMPLES = 3
_WIRE = {verdict.CLEAN: "clean", verdict.CONSTANT: "clean", verdict.LEAK: "leaking", verdict.UNDECIDED: "undecided"}


class Agreement(NamedTuple):
    """How many connections of each kind, by (what a line claims, what was seen), and the flows that say otherwise.

    `outside`: claims of another time than the capture's; `beyond`: of connections that are not judged.
    """

    kinds: Mapping[Tuple[str, str], int]
    leaking: Sequence[Direction]  # though claimed clean
    not_claimed: Sequence[Direction]  # one of each connection
    outside: int
    beyond: int
    path: str
    skipped: Mapping[str, int]

    @property
    def counts(self) -> Dict[str, int]:
        """The fields of `--json`."""
        return {
            "claimed_clean_seen_clean": self.kinds.get((CLEAN, "clean"), 0),
            "claimed_clean_seen_leaking": self.kinds.get((CLEAN, "leaking"), 0),
            "claimed_not_seen": sum(self.kinds.get((claimed, "not"), 0) for claimed in (CLEAN, STAMPED, EITHER)),
            "seen_not_claimed": len(self.not_claimed),
        }


def agreement(lines: Lines, flows: Sequence[Direction], judgements: Mapping[Direction, Judgement], scope: Scope) -> Agreement:
    """Read the lines to their end. `judgements` are those of the flows that were judged. UsageError if they can't be read."""
    joined = _Joined(flows, judgements, scope)
    for claim in lines:
        joined.take(claim)
    return joined.result(lines)


class _Joined:
    """Takes claims as they come; keeps those alone that a flow could belong to, since a log is longer than a capture."""

    def __init__(self, flows: Sequence[Direction], judgements: Mapping[Direction, Judgement], scope: Scope) -> None:
        self._judgements, self._scope = judgements, scope
        self._sent: Dict[Ends, List[Direction]] = {}
        self._by_end: Dict[End, List[Direction]] = {}
        for flow in flows:
            self._sent.setdefault(_ends(flow), []).append(flow)
            for end in _ends(flow):
                self._by_end.setdefault(end, []).append(flow)
        self._window = _window(flows)
        self._claims: Dict[Ends, List[Claim]] = {}
        self._claimed: Set[Direction] = set()  # the flows of connections that a line tells of
        self._kinds: Counter[Tuple[str, str]] = Counter()
        self._outside = self._beyond = 0

    def take(self, claim: Claim) -> None:
        """One line."""
        theirs = self._by_end.get(claim.client, ()) if claim.client else ()
        self._claimed.update(flow for flow in theirs if _is_then(claim, flow))
        if not self._scope.holds(claim.local[0], *claim.upstream):
            self._beyond += 1
            return
        if any(_is_then(claim, flow) for flow in self._sent.get((claim.local, claim.upstream), ())):
            self._claims.setdefault((claim.local, claim.upstream), []).append(claim)
        else:
            self._not_seen(claim)

    def _not_seen(self, claim: Claim) -> None:
        self._kinds[claim.leg, "not"] += 1
        first, last = self._window
        self._outside += claim.leg != NOTHING and (claim.closed_ns < first or claim.begun_ns > last)

    def result(self, lines: Lines) -> Agreement:
        """Once all lines were taken."""
        leaking: List[Direction] = []
        for ends, claims in self._claims.items():
            for claim, flow in _pairs(claims, self._sent[ends]):
                if flow is None:
                    self._not_seen(claim)
                    continue
                claimed, seen = _settled(claim, self._judgements[flow])
                self._kinds[claimed, seen] += 1
                self._claimed.update([flow, *(back for back in self._sent.get(ends[::-1], ()) if _is_then(claim, back))])
                if (claimed, seen) == (CLEAN, "leaking"):
                    leaking.append(flow)
        skipped = dict(lines.skipped)
        return Agreement(dict(self._kinds), leaking, self._unclaimed(), self._outside, self._beyond, lines.path, skipped)

    def _unclaimed(self) -> List[Direction]:
        """One flow of each connection that was judged and that no line tells of."""
        found: Dict[Ends, List[Direction]] = {}
        for flow in self._judgements:
            if flow not in self._claimed:
                ends = _ends(flow)
                others = found.get(ends[::-1], ())
                if not any(_overlap(flow.first_ns, flow.last_ns, other) for other in others):
                    found.setdefault(ends, []).append(flow)
        return [flow for flows in found.values() for flow in flows]


def _settled(claim: Claim, judgement: Judgement) -> Tuple[str, str]:
    """What is claimed and what was seen. A constant is what a timestamp was negotiated for, where nothing else is known."""
    leg = claim.leg
    if leg == EITHER:
        leg = CLEAN if judgement.verdict == verdict.CONSTANT else STAMPED
    return leg, _WIRE[judgement.verdict]


def _ends(flow: Direction) -> Ends:
    return (flow.source, flow.source_port), (flow.destination, flow.destination_port)


def _window(flows: Iterable[Direction]) -> Tuple[int, int]:
    """From the first segment of all to the last one."""
    times = [(flow.first_ns, flow.last_ns) for flow in flows]
    return min((first for first, _ in times), default=0), max((last for _, last in times), default=0)


def _overlap(begun_ns: int, ended_ns: int, flow: Direction) -> bool:
    return begun_ns <= flow.last_ns and ended_ns >= flow.first_ns


def _is_then(claim: Claim, flow: Direction) -> bool:
    return _overlap(claim.begun_ns - _CLOCKS_NS, claim.closed_ns + _CLOCKS_NS, flow)


def _pairs(claims: Sequence[Claim], flows: Sequence[Direction]) -> List[Tuple[Claim, Optional[Direction]]]:
    """Each claim with the flow that began nearest to it and is no other claim's; None where no flow is left."""
    near = sorted(
        (abs(flow.first_ns - claim.begun_ns), which, place)
        for which, claim in enumerate(claims)
        for place, flow in enumerate(flows)
        if _is_then(claim, flow)
    )
    taken: Dict[int, int] = {}
    for _, which, place in near:
        if which not in taken and place not in taken.values():
            taken[which] = place
    return [(claim, flows[taken[which]] if which in taken else None) for which, claim in enumerate(claims)]


# For people


def words(found: Agreement) -> List[str]:
    """At most 80 columns wide but for long addresses."""
    counts = found.counts
    outside = f", {found.outside:,} of them before or after the capture" if found.outside else ""
    return [
        f"Beside the lines of {verdict.named(found.path)}",
        _row("claimed clean and seen clean", counts["claimed_clean_seen_clean"]),
        _row("claimed clean and seen leaking", counts["claimed_clean_seen_leaking"]),
        *_examples(found.leaking),
        _row("claimed and not seen", counts["claimed_not_seen"]) + outside,
        _row("seen and not claimed", counts["seen_not_claimed"]),
        *_examples(found.not_claimed),
        *(_row(text, count) for text, count in _others(found) if count),
    ]


def _row(text: str, count: int) -> str:
    return f"  {text:<32}{count:>7,}"


def _examples(flows: Sequence[Direction]) -> Iterator[str]:
    for flow in flows[:_MOST_EXAMPLES]:
        leak = "" if flow.first_leak_frame is None else f", first in frame {flow.first_leak_frame}"
        yield f"    {flow.source}:{flow.source_port} to {flow.destination}:{flow.destination_port}{leak}"
    if len(flows) > _MOST_EXAMPLES:
        yield f"    and {len(flows) - _MOST_EXAMPLES:,} more"


def _others(found: Agreement) -> List[Tuple[str, int]]:
    """What is neither agreement nor the opposite, and what was left out."""
    stamped = sum(count for (claimed, seen), count in found.kinds.items() if claimed == STAMPED and seen != "not")
    silent = sum(count for (claimed, _), count in found.kinds.items() if claimed == NOTHING)
    other = found.skipped.get("other", 0)
    return [
        ("claimed clean, seen, undecided", found.kinds.get((CLEAN, "undecided"), 0)),
        ("claimed with timestamps, seen", stamped),
        ("lines that claim nothing", silent),
        ("lines beyond --from and --target", found.beyond),
        ("lines of other events", other),
        ("lines without both ends", found.skipped.get("without both ends", 0)),
        ("lines that can't be read", found.skipped.get("unreadable", 0)),
    ]
