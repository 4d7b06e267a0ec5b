"""What `check` found, as a table for people and as one JSON object with the same facts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, TextIO

import _tsproxy
from _tsproxy.cli.config import Route
from _tsproxy.linux.printable import printable
from _tsproxy.policy.levers import Lever
from _tsproxy.stats import encoder
from _tsproxy.tools import terminal
from _tsproxy.tools.terminal import BOLD, DIM, GREEN, RED, WIDTH, YELLOW, Style

_NAME, _SHOWS = 27, 10
MARKS = {"ok": "✓", "leak": "✗", "off": "·", "unknown": "?"}
COLOURS = {"ok": GREEN, "leak": RED, "off": DIM, "unknown": YELLOW}


class Row(NamedTuple):
    """A lever (ok: it does what the policy needs; off: it does not) or a witness (ok, leak), or unknown; with the reason."""

    name: str
    value: Optional[str]
    shows: str
    note: str


class Connection(NamedTuple):
    """How one connection went: connected, failed, timed out or not tried. `relays`: whether the policy lets bytes pass."""

    address: str
    outcome: str
    note: str
    connect_us: Optional[int] = None
    timestamps: Optional[bool] = None
    relays: Optional[bool] = None


@dataclass(frozen=True)
class Report:
    """All that was found. `lever` is what the policy would rest on, None if it would not hold."""

    route: Route
    static_timestamp: int
    lever: Optional[Lever]
    host: Dict[str, str] = field(default_factory=dict)
    levers: List[Row] = field(default_factory=list)
    witnesses: List[Row] = field(default_factory=list)
    connections: List[Connection] = field(default_factory=list)
    unresolved: List[str] = field(default_factory=list)
    left_out: int = 0  # addresses of the targets that are not tried: too many, or no unicast ones
    missing: List[str] = field(default_factory=list)
    fixes: List[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether tsproxy would start, and relay, under the policy asked for."""
        return self.lever is not None


def as_json(report: Report) -> bytes:
    """One line. Not cut to a pipe's atomic write as the log lines are: who asked reads all of it."""
    return encoded(fields(report))


def fields(report: Report) -> Dict[str, Any]:
    """The JSON object of a report."""
    route = report.route
    return {
        "version": _tsproxy.__version__,
        "holds": report.holds,
        "timestamps": route.timestamps,
        "static_timestamp": report.static_timestamp,
        "trust_host": route.trust_host,
        "witness": report.lever.label if report.lever is not None else None,
        "targets": [str(target) for target in route.targets],
        "unresolved": report.unresolved,
        "left_out": report.left_out,
        "host": report.host,
        "levers": [row._asdict() for row in report.levers],
        "witnesses": [row._asdict() for row in report.witnesses],
        "connections": [connection._asdict() for connection in report.connections],
        "missing": report.missing,
        "fixes": report.fixes,
    }


def encoded(found: Dict[str, Any]) -> bytes:
    """The object as one line."""
    encode = encoder.with_orjson if encoder.ENCODER == "orjson" else encoder.with_json
    return encode(found) + b"\n"


def as_table(report: Report, stream: TextIO) -> str:
    """For people: 80 columns, but for commands and addresses, which stay whole."""
    style = terminal.style_of(stream)
    sections = [_head(report, style), host(report, style), rows("Levers", report.levers, style)]
    sections += [rows("Witnesses", report.witnesses, style), _targets(report, style), _verdict(report, style)]
    return style.fit("\n\n".join("\n".join(section) for section in sections))


def _head(report: Report, style: Style) -> List[str]:
    route = report.route
    levers = f"rewrite to TSval {report.static_timestamp}" if route.timestamps == "rewrite" else route.timestamps
    text = f"tsproxy check: {levers}, to {', '.join(map(str, route.targets))}"
    return [style.paint(line, BOLD) for line in terminal.wrapped(text, WIDTH)]


def host(report: Report, style: Style) -> List[str]:
    """What the host is."""
    lines = [style.paint("Host", BOLD)]
    for name, text in report.host.items():
        lines += columns(name.replace("_", " "), 20, text)
    return lines


def rows(title: str, found: Sequence[Row], style: Style) -> List[str]:
    """Levers or witnesses, under a title."""
    lines = [style.paint(title, BOLD)]
    for row in found:
        lines += _row(row, style)
    return lines


def _row(row: Row, style: Style) -> Iterator[str]:
    """Name, what it shows, why; what was read stands in a line of its own, whole, where it is long."""
    named = f"{row.name} = {row.value}"
    short = row.value is not None and len(named) <= _NAME
    mark = style.paint(f"{_mark(row.shows, style):<{_SHOWS}}", COLOURS[row.shows])
    yield from columns(named if short else row.name, _NAME, row.note, mark, _SHOWS)
    if row.value is not None and not short:
        yield from (style.paint(f"      {line}", DIM) for line in terminal.wrapped(row.value, WIDTH - 6))


def _mark(shows: str, style: Style) -> str:
    return f"{MARKS[shows]} {shows}" if style.wide else shows.upper() if shows == "leak" else shows


def columns(name: str, width: int, text: str, mark: str = "", mark_width: int = 0) -> Iterator[str]:
    """The name, the mark, and the text wrapped in what is left of the line. A name that is too long has its own line."""
    indent = " " * (2 + width + 1)
    name = printable(name)
    first, *rest = terminal.wrapped(text, WIDTH - len(indent) - mark_width)
    if len(name) > width:
        yield f"  {name}"
        name = ""
    yield f"  {name:<{width}} {mark}{first}"
    yield from (f"{indent}{' ' * mark_width}{line}" for line in rest)


def _targets(report: Report, style: Style) -> List[str]:
    lines = [style.paint("Targets", BOLD)]
    for one in report.connections:
        took = f" in {one.connect_us / 1000:.3f} ms" if one.connect_us is not None else ""
        lines += columns(one.address, _NAME, f"{one.outcome}{took}: {one.note}")
    if report.left_out:
        lines.append(f"  and {report.left_out} addresses more, which would not be tried")
    for text in report.unresolved:
        lines += [f"  {line}" for line in terminal.wrapped(f"can't be resolved: {text}", WIDTH - 2)]
    return lines


def _verdict(report: Report, style: Style) -> List[str]:
    if report.lever is not None:
        return [style.paint(line, GREEN) for line in terminal.wrapped(yes(report.lever), WIDTH)]
    lines = [style.paint("NO: the policy would not hold here", RED)]
    for problem in report.missing:
        lines += columns("missing", 8, problem)
    return [*lines, *commands(report.fixes)]


def commands(fixes: Sequence[str]) -> List[str]:
    """What helps, if there is something; each stays whole, to be copied."""
    heading = ["", "An administrator runs one of these, once:"] if fixes else []
    return heading + [f"  {printable(fix, kept=chr(10))}" for fix in fixes]


def yes(lever: Lever) -> str:
    """The verdict where the policy holds."""
    return {
        Lever.NONE: "YES: timestamps are relayed as the kernel makes them, and counted",
        Lever.SYSCTL: "YES: the policy holds by this namespace's sysctl",
        Lever.NFTABLES: "YES: the policy holds by a packet filter, as the witness SYN shows",
        Lever.TRUSTED: "YES, on your word (--trust-host): no witness stands for it here",
    }[lever]
