"""From what was seen of a flow to the word for it, and from all words to the one for the capture.

Knows what each verdict takes. Knows nothing of how the segments were read, or of what is shown.
"""

from __future__ import annotations

from typing import Iterable, NamedTuple, Set, Tuple

from _tsproxy.cli import exits
from _tsproxy.tools.audit.flows import Direction

LEAK, UNDECIDED, CONSTANT, CLEAN = "LEAK", "UNDECIDED", "CONSTANT", "CLEAN"
_WORST_FIRST = (LEAK, UNDECIDED, CONSTANT, CLEAN)
EXIT_CODES = {LEAK: exits.POLICY, UNDECIDED: exits.NO_VERDICT, CONSTANT: exits.DRAINED, CLEAN: exits.DRAINED}
_CONSTANT_NS = 1_000_000_000  # over which a clock of any rate that RFC 7323, section 5.4, allows has moved

End = Tuple[str, int]


class Judgement(NamedTuple):
    """The word for a flow, and for people why it is no better one, where the flow's own figures do not tell."""

    verdict: str
    why: str


class Judge:
    """Knows what is true of all flows of a capture: whether frames are missing, and who began which connection."""

    def __init__(self, directions: Iterable[Direction], is_whole: bool, blurred: Set[Tuple[str, str]]) -> None:
        """`is_whole`: no frame was lost. `blurred`: addresses between which a segment was seen, but not of which flow."""
        self._is_whole, self._blurred = is_whole, blurred
        self._begun: Set[Tuple[End, End]] = {
            ((one.source, one.source_port), (one.destination, one.destination_port)) for one in directions if one.syn_seen
        }

    def judge(self, flow: Direction) -> Judgement:
        """LEAK: a segment has TSopt. CONSTANT: each has, all with one TSval. CLEAN: none has.

        CONSTANT and CLEAN are only said of a flow that was seen from its first segment on, with the options of each.
        """
        has_constant = _has_constant(flow)
        if flow.segments_with_timestamps and not has_constant:
            return Judgement(LEAK, "")
        if flow.segments_cut:
            return Judgement(UNDECIDED, f"{flow.segments_cut:,} cut by the snap length before their options end")
        if not self._seen_from_its_beginning(flow):
            return Judgement(UNDECIDED, "what it sent first, its SYN or SYN-ACK, is not in the capture")
        if not self._is_whole or (flow.source, flow.destination) in self._blurred:
            return Judgement(UNDECIDED, "frames are missing, which may have been its own")
        return Judgement(CONSTANT if has_constant else CLEAN, "")

    def _seen_from_its_beginning(self, flow: Direction) -> bool:
        """By its own SYN or SYN-ACK in front of all else; where it did nothing but refuse a SYN, by that one."""
        if flow.opened_ns is not None:
            return flow.opened_ns <= flow.first_ns
        asked = (flow.destination, flow.destination_port), (flow.source, flow.source_port)
        return flow.bare_resets == flow.segments and asked in self._begun


def _has_constant(flow: Direction) -> bool:
    """TSopt in each segment, and one TSval for longer than any clock stands still.

    A reset may be without: one that answers for no socket has no options (tcp_v4_send_reset() in net/ipv4/tcp_ipv4.c).
    """
    stamped = flow.segments_with_timestamps
    each = stamped > 1 and stamped + flow.segments_cut + flow.bare_resets == flow.segments
    return each and flow.is_one_tsval and flow.span_ns >= _CONSTANT_NS


def named(path: str) -> str:
    """A capture, for people."""
    return "standard input" if path == "-" else path


def overall(verdicts: Iterable[str]) -> str:
    """The worst; UNDECIDED where there is none."""
    found = set(verdicts)
    return next((one for one in _WORST_FIRST if one in found), UNDECIDED)
