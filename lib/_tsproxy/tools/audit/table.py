"""The verdict for people: a table of flows that fits 80 columns, the worst flows and the verdict last.

Knows columns and colours. Knows nothing of how a verdict came about.
"""

from __future__ import annotations

from typing import Dict, Iterator, List, Sequence, TextIO

from _tsproxy.tools import terminal
from _tsproxy.tools.audit import claims, observer
from _tsproxy.tools.audit.flows import Direction
from _tsproxy.tools.audit.report import Report
from _tsproxy.tools.audit.verdict import CLEAN, CONSTANT, LEAK, UNDECIDED, named
from _tsproxy.tools.terminal import BOLD, DIM, GREEN, RED, WIDTH, YELLOW, Style

_COLOURS = {LEAK: RED, UNDECIDED: YELLOW, CONSTANT: GREEN, CLEAN: GREEN}
_WORST_LAST = (CLEAN, CONSTANT, UNDECIDED, LEAK)
_MOST_FLOWS = 20  # of each verdict; --json has all of them
_MOST_SENDERS = 8
_ENDS = 42
_SENTENCES = {
    CLEAN: "no segment that {senders} sent has a timestamp",
    CONSTANT: "the timestamps that {senders} sent do not move",
    LEAK: "timestamps left {senders}",
    UNDECIDED: "whether timestamps left {senders} can't be told from this capture",
}


def table(report: Report, stream: TextIO) -> str:
    """All of it; no newline behind the last line."""
    style = terminal.style_of(stream)
    beside = claims.words(report.agreement) if report.agreement else []
    learned = observer.words(report.clocks)
    sections = [_head(report, style), _flows(report, style), learned, beside, _rest(report), _verdict(report, style)]
    return style.fit("\n\n".join("\n".join(section) for section in sections if section))


def _head(report: Report, style: Style) -> List[str]:
    sources, targets = report.scope.judged_from, report.scope.judged_to
    what = f"what {', '.join(sources)} sends" if sources else "what each sender sends"
    where = f" to {' or '.join(targets)}" if targets else ""
    given = counted(report.files, "capture") if report.files else "an interface"
    title = f"tsproxy audit: {given}, {counted(report.frames, 'frame')}; judged: {what}{where}"
    return [style.paint(line, BOLD) for line in terminal.wrapped(title, WIDTH)]


def counted(number: int, noun: str) -> str:
    """1 flow, 2,000 flows."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _flows(report: Report, style: Style) -> List[str]:
    """Grouped by verdict. Of many flows with the same one only the first are shown."""
    groups: Dict[str, List[Direction]] = {word: [] for word in _WORST_LAST}
    for flow in report.judged:
        groups[report.judgements[flow].verdict].append(flow)
    lines = (
        [style.paint(f"{'from > to':<{_ENDS}} {'segments':>9} {'with TS':>9} SYN     verdict", DIM)] if report.judged else []
    )
    for word, flows in groups.items():
        for flow in flows[:_MOST_FLOWS]:
            lines += _flow(flow, word, style)
            lines += [style.paint(f"    {line}", DIM) for line in terminal.wrapped(_why(report, flow), WIDTH - 4) if line]
        if len(flows) > _MOST_FLOWS:
            lines.append(style.paint(f"  and {counted(len(flows) - _MOST_FLOWS, 'more flow')} {word}", _COLOURS[word]))
    return lines


def _flow(flow: Direction, word: str, style: Style) -> Iterator[str]:
    """One line where the addresses are short enough, else two or three."""
    ends = [f"{_end(flow.source, flow.source_port)} >", _end(flow.destination, flow.destination_port)]
    if len(" ".join(ends)) > _ENDS:
        yield from [" ".join(ends)] if len(" ".join(ends)) <= WIDTH else ends
        ends = []
    opened = "SYN" if flow.syn_seen else "SYN-ACK" if flow.syn_ack_seen else "-"
    figures = f"{' '.join(ends):<{_ENDS}} {flow.segments:>9} {flow.segments_with_timestamps:>9} {opened:<7} "
    yield figures + style.paint(word, _COLOURS[word])


def _why(report: Report, flow: Direction) -> str:
    if report.judgements[flow].verdict != LEAK:
        return report.judgements[flow].why
    where = f" of {named(flow.first_leak_file or '')}" if report.files > 1 else ""
    return f"first in frame {flow.first_leak_frame}{where}"


def _end(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _rest(report: Report) -> List[str]:
    """What the verdict does not rest on: frames that were lost, and those that could not be read."""
    lines = list(report.problems)
    if report.drops:
        lines.append(f"{counted(report.drops, 'frame')} dropped while capturing: that much the capture says of itself")
    unread = [f"{count:,} {kind.replace('_', ' ')}" for kind, count in sorted(report.unparsed.items())]
    if unread:
        lines.append(f"not read: {counted(sum(report.unparsed.values()), 'frame')} ({', '.join(unread)})")
    return [wrapped for line in lines for wrapped in terminal.wrapped(line, WIDTH)]


def _verdict(report: Report, style: Style) -> List[str]:
    """The end says which senders were judged; the last line, which of them it is about."""
    words = [report.judgements[flow].verdict for flow in report.judged]
    lines = []
    if words:
        found = ", ".join(f"{words.count(word):,} {word}" for word in reversed(_WORST_LAST) if word in words)
        tally = (
            f"{counted(len(words), 'flow')} of {counted(len(report.senders), 'sender')} ({_listed(report.senders)}): {found}"
        )
        lines = terminal.wrapped(tally, WIDTH)
    worst = [flow.source for flow in report.judged if report.judgements[flow].verdict == report.verdict]
    sentence = _SENTENCES[report.verdict].format(senders=_listed(worst)) if worst else "no such flow in this capture"
    final = terminal.wrapped(f"{report.verdict}: {sentence}", WIDTH)
    return [*lines, *(style.paint(line, _COLOURS[report.verdict]) for line in final)]


def _listed(senders: Sequence[str]) -> str:
    """A list that ends before it tires."""
    each = list(dict.fromkeys(senders))
    more = f" and {len(each) - _MOST_SENDERS:,} more" if len(each) > _MOST_SENDERS else ""
    return ", ".join(each[:_MOST_SENDERS]) + more
