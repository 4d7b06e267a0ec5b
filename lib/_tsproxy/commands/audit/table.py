"""The verdict for people: a table of flows that fits 80 columns, the verdict last.

Knows columns and colours. Knows nothing of how a verdict came about.
"""

from __future__ import annotations

from typing import Iterator, List, TextIO

from _tsproxy.commands import terminal
from _tsproxy.commands.audit import verdict
from _tsproxy.commands.audit.flows import Direction
from _tsproxy.commands.audit.report import Report
from _tsproxy.commands.terminal import GREEN, RED, YELLOW, Style

_COLOURS = {verdict.LEAK: RED, verdict.UNDECIDED: YELLOW, verdict.CONSTANT: GREEN, verdict.CLEAN: GREEN}


def table(report: Report, stream: TextIO) -> str:
    """All of it, with a newline at the end of each line but the last."""
    style = terminal.style_of(stream)
    return style.fit("\n".join(_lines(report, style)))


def _lines(report: Report, style: Style) -> Iterator[str]:
    for flow in report.judged:
        yield from _flow(report, flow, style)
    yield style.paint(report.verdict, _COLOURS[report.verdict])


def _flow(report: Report, flow: Direction, style: Style) -> List[str]:
    word = report.verdicts[flow]
    return [f"{style.paint(word, _COLOURS[word])} {flow.source}:{flow.source_port} {flow.destination}:{flow.destination_port}"]
