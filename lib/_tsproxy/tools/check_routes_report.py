"""What `check --routes` found: a row for each route and what is wrong told once, for people, and one JSON object.

Knows the reports of single routes and how to fit them into 80 columns. Knows nothing of how they were come by.
"""

from __future__ import annotations

import re
from typing import Dict, Iterable, Iterator, List, NamedTuple, Sequence, TextIO, Tuple

import _tsproxy
from _tsproxy.linux.printable import printable
from _tsproxy.policy.levers import Lever
from _tsproxy.tools import check_report, terminal
from _tsproxy.tools.check_report import Report, Row
from _tsproxy.tools.terminal import BOLD, GREEN, RED, WIDTH, Style

_NAME = 20  # a name that is longer has its own line
_MOST = 8  # routes that are named beside a reason which does not fail them
_MODE, _BY, _OUTCOME = 8, 8, 12
_ASCII = {"ok": "y", "leak": "N", "unknown": "?"}


class Found(NamedTuple):
    """The reports of all routes of a file."""

    file: str
    reports: Sequence[Report]

    @property
    def failing(self) -> List[Report]:
        """Those whose policy would not hold."""
        return [report for report in self.reports if report.missing]

    @property
    def unknown(self) -> List[Report]:
        """Those of which nothing is known, since none of their names can be resolved."""
        return [report for report in self.reports if not report.holds and not report.missing]


def as_json(found: Found) -> bytes:
    """One line: for each route what `check` prints for it alone, and its name."""
    routes = [{"route": report.route.name, **check_report.fields(report)} for report in found.reports]
    holds = all(report.holds for report in found.reports)
    return check_report.encoded({"version": _tsproxy.__version__, "holds": holds, "routes": routes})


def as_table(found: Found, stream: TextIO) -> str:
    """For people: 80 columns, but for commands, and addresses in what is wrong with them, which stay whole."""
    style = terminal.style_of(stream)
    sections = [
        _head(found, style),
        *_grounds(found, style),
        _routes(found, style),
        _targets(found, style),
        _verdict(found, style),
    ]
    return style.fit("\n\n".join("\n".join(lines) for lines in sections if lines))


def _head(found: Found, style: Style) -> List[str]:
    lines = terminal.wrapped(f"tsproxy check: {_count(found.reports)} of {found.file}", WIDTH)
    return [style.paint(line, BOLD) for line in lines]


def _count(reports: Sequence[Report]) -> str:
    return f"{len(reports)} routes" if len(reports) != 1 else "1 route"


# What all routes rest on


def _grounds(found: Found, style: Style) -> Iterator[List[str]]:
    """The host; levers and witnesses of each mode, but those of `preserve` only where there is no other."""
    yield check_report.host(found.reports[0], style)
    modes: Dict[str, List[Report]] = {}
    for report in found.reports:
        if report.levers:
            modes.setdefault(_mode(report), []).append(report)
    if len(modes) > 1:
        modes.pop("preserve", None)
    for mode, reports in modes.items():
        which = f" ({mode})" if len(modes) > 1 else ""
        yield check_report.rows(f"Levers{which}", _distinct(row for one in reports for row in one.levers), style)
        yield check_report.rows(f"Witnesses{which}", [*_loopback(reports), *_on_the_wire(reports)], style)


def _mode(report: Report) -> str:
    return f"{report.route.timestamps}, trusted" if report.route.trust_host else report.route.timestamps


def _distinct(rows: Iterable[Row]) -> List[Row]:
    return list(dict.fromkeys(rows))


def _loopback(reports: Sequence[Report]) -> List[Row]:
    """A witness SYN of each family, the one that shows the worst; they differ in their TSvals alone."""
    found: Dict[str, Row] = {}
    for row in (row for report in reports for row in report.witnesses if row.name.endswith("on loopback")):
        if row.name not in found or row.shows != "ok":
            found[row.name] = row
    return list(found.values())


def _on_the_wire(reports: Sequence[Report]) -> List[Row]:
    """One row for all that were seen, in the place of one for each address; and why others were not."""
    wires = [row for report in reports for row in report.witnesses if not row.name.endswith("on loopback")]
    seen = [row for row in wires if row.value is not None]
    unseen = [row._replace(name="SYN on the wire") for row in wires if row.value is None]
    leaks = [row for row in seen if row.shows == "leak"]
    note = f"{len(leaks)} of {len(seen)} leave with what they must not" if leaks else f"{len(seen)} seen, all as they must be"
    return [*([Row("SYNs on the wire", None, "leak" if leaks else "ok", note)] if seen else []), *_distinct(unseen)]


# The routes


def _routes(found: Found, style: Style) -> List[str]:
    name = min(_NAME, max(len(report.route.name) for report in found.reports))
    target = WIDTH - (2 + 2 + name + 1 + 1 + _MODE + 1 + _BY + 1 + _OUTCOME)
    lines = [style.paint("Routes", BOLD)]
    for report in found.reports:
        if len(report.route.name) > name:
            lines.append(f"  {_mark(report, style)} {report.route.name}")
        first = f"{_mark(report, style)} {report.route.name:<{name}}" if len(report.route.name) <= name else " " * (name + 2)
        columns = [f"{_first_target(report, target):<{target}}", f"{report.route.timestamps:<{_MODE}}", f"{_by(report):<{_BY}}"]
        lines.append(f"  {first} {' '.join(columns)} {_outcome(report)}".rstrip())
    return lines


def _mark(report: Report, style: Style) -> str:
    shows = "ok" if report.holds else "leak" if report.missing else "unknown"
    return style.paint(check_report.MARKS[shows] if style.wide else _ASCII[shows], check_report.COLOURS[shows])


def _first_target(report: Report, width: int) -> str:
    """The first one, and how many there are besides; cut where it is too long."""
    targets = report.route.targets
    more = f" +{len(targets) - 1}" if len(targets) > 1 else ""
    text = printable(str(targets[0]))
    room = width - len(more)
    return (text if len(text) <= room else f"{text[: room - 3]}...") + more


def _by(report: Report) -> str:
    """What the policy rests on."""
    return report.lever.label if report.lever is not None else "NO" if report.missing else "?"


def _outcome(report: Report) -> str:
    outcomes = [connection.outcome for connection in report.connections]
    if not outcomes:
        return "not tried" if report.missing else "unresolved"
    if len({*outcomes}) == 1:
        return outcomes[0]
    return f"{outcomes.count('connected')} of {len(outcomes)}"


def _targets(found: Found, style: Style) -> List[str]:
    """What did not connect though it was tried, and names without an answer: each reason once, with whom it concerns."""
    reasons: List[Tuple[str, str]] = []
    for report in found.reports:
        for one in report.connections:
            if one.outcome in ("failed", "timed out"):
                reasons.append((f"{one.outcome}: {one.note}", f"{report.route.name} ({one.address})"))
        reasons += [(f"can't be resolved: {text}", report.route.name) for text in report.unresolved]
        if report.left_out:
            reasons.append((f"{report.left_out} addresses more, which would not be tried", report.route.name))
    lines = [line for reason, whom in _grouped(reasons) for line in _reason(reason, whom)]
    return [style.paint("Targets", BOLD), *lines] if lines else []


def _reason(reason: str, whom: Sequence[str]) -> Iterator[str]:
    yield from (f"  {line}" for line in terminal.wrapped(reason, WIDTH - 2))
    some = [*whom[:_MOST], *([f"and {len(whom) - _MOST} more"] if len(whom) > _MOST else [])]
    yield from (f"      {line}" for line in terminal.wrapped(", ".join(some), WIDTH - 6))


def _grouped(reasons: Iterable[Tuple[str, str]]) -> List[Tuple[str, List[str]]]:
    found: Dict[str, List[str]] = {}
    for reason, whom in reasons:
        found.setdefault(reason, []).append(whom)
    return list(found.items())


# The verdict


def _verdict(found: Found, style: Style) -> List[str]:
    if not found.failing and not found.unknown:
        return _yes(found, style)
    lines: List[str] = []
    if found.failing:
        lines += _named(f"NO: the policy would not hold for {_share(found.failing, found)}", found.failing, style)
    for problem, whom in _problems(found):
        lines += check_report.columns("missing", 8, problem)
        if len(whom) < len(found.failing):
            lines += check_report.columns("", 8, ", ".join(whom))
    if found.unknown:
        said = f"NOT KNOWN for {_share(found.unknown, found)}, for want of an address"
        lines += _named(said, found.unknown, style)
    fixes = dict.fromkeys(fix for report in found.failing for fix in report.fixes)
    return [*lines, *check_report.commands(list(fixes))]


def _yes(found: Found, style: Style) -> List[str]:
    """All routes; what the policy of which rests on, where that differs."""
    all_of_them = f"all {_count(found.reports)}" if len(found.reports) > 1 else "the route"
    levers = _grouped((check_report.yes(report.lever or Lever.NONE), report.route.name) for report in found.reports)
    if len(levers) > 1:
        reasons = [line for text, whom in levers for line in _reason(text, whom)]
        return [style.paint(f"YES, for {all_of_them}:", GREEN), *reasons]
    return [style.paint(line, GREEN) for line in terminal.wrapped(f"{levers[0][0]}, for {all_of_them}", WIDTH)]


def _share(reports: Sequence[Report], found: Found) -> str:
    return f"{len(reports)} of {_count(found.reports)}"


def _named(text: str, reports: Sequence[Report], style: Style) -> List[str]:
    names = ", ".join(report.route.name for report in reports)
    return [style.paint(line, RED) for line in terminal.wrapped(f"{text}: {names}", WIDTH)]


def _problems(found: Found) -> List[Tuple[str, List[str]]]:
    """Each problem with the routes that have it. Those of several routes that differ in target and TSval alone are one."""
    exact: Dict[str, List[Tuple[str, str]]] = {}
    for report in found.failing:
        for problem in report.missing:
            exact.setdefault(_general(problem, report), []).append((problem, report.route.name))
    told: List[Tuple[str, List[str]]] = []
    for general, some in exact.items():
        names = list(dict.fromkeys(name for _, name in some))
        told += [(general, names)] if len(names) > 1 else [(problem, names) for problem, _ in some]
    return told


def _general(problem: str, report: Report) -> str:
    for address in sorted((connection.address for connection in report.connections), key=len, reverse=True):
        problem = problem.replace(address, "its target")
    return re.sub(r"TSval \d+", "a TSval", problem) if "its target" in problem else problem
