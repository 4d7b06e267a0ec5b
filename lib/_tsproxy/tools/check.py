"""`check`: would the timestamp policy hold here? Each lever, each witness: yes (0), no (78), no target resolves (75).

It decides as relaying does, with the same HostPolicy and the same gate. No SYN leaves for a target before the loopback
witness is clean: that SYN would be the leak. What a target answers does not change what is true of the policy. A capture
that lost packets can't tell: no (78).

With --routes each route is proved by itself. Levers and loopback are looked at once for all that ask for the same policy.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from typing import Dict, Iterator, List, NamedTuple, Sequence, Tuple, Union

from _tsproxy.capture.outgoing import Seen
from _tsproxy.cli import exits
from _tsproxy.cli.config import Config, Route
from _tsproxy.cli.exits import Exit
from _tsproxy.linux import facts, netfilter
from _tsproxy.policy import advice, syn, witness
from _tsproxy.policy.evidence import FAMILY_NAMES
from _tsproxy.policy.inspector import CHECK_TIMEOUT_S, PolicyCheck
from _tsproxy.policy.levers import Lever, Policy
from _tsproxy.policy.syn import Syn
from _tsproxy.policy.witness import NoWitness
from _tsproxy.supervisor.host_policy import HostPolicy
from _tsproxy.supervisor.resolver import Resolver, resolve_all
from _tsproxy.supervisor.startup import policy_of, require_dscp, resolve, resolver_of
from _tsproxy.tools import check_report, check_routes_report
from _tsproxy.tools.check_report import Report, Row
from _tsproxy.tools.check_targets import Attempt, Errand, attempts


def run(config: Config, as_json: bool) -> int:
    """Print the report, for people or as one JSON object; 0 if the policy would hold, else 78.

    With --routes: 78 if it would not for one of them, 75 if all that is missing is an answer for a name.
    """
    if config.routes_file is None:
        (route,) = config.routes
        (report,) = _reports(config, {route.name: resolve(route)})
        _print(check_report.as_json(report) if as_json else check_report.as_table(report, sys.stdout))
        return exits.DRAINED if report.holds else exits.POLICY
    resolvers = {route.name: resolver_of(route) for route in config.routes}
    resolve_all(list(resolvers.values()))
    found = check_routes_report.Found(config.routes_file, _reports(config, resolvers))
    _print(check_routes_report.as_json(found) if as_json else check_routes_report.as_table(found, sys.stdout))
    return exits.POLICY if found.failing else exits.NOT_YET if found.unknown else exits.DRAINED


def _print(report: Union[bytes, str]) -> None:
    if isinstance(report, bytes):
        sys.stdout.buffer.write(report)
    else:
        print(report)
    sys.stdout.flush()


class _Ground(NamedTuple):
    """What a policy rests on here, whichever routes ask for it."""

    policy_check: PolicyCheck
    levers: List[Row]
    loopback: List[Row]


def _reports(config: Config, resolvers: Dict[str, Resolver]) -> List[Report]:
    """All of it, in order: the levers, the witnesses on loopback, then the targets, then the host. Exit 2: see _dscp()."""
    routes = [route for route in config.routes if resolvers[route.name].addresses]
    policies = {route.name: policy_of(config, route, resolvers[route.name]) for route in routes}
    host = HostPolicy()
    grounds = _grounds(host, list(dict.fromkeys(policies.values())))
    refusals = {route.name: _dscp(config, route, policies[route.name], grounds) for route in routes}
    errands = [
        Errand(
            route,
            () if refusals[route.name] else resolvers[route.name].addresses,
            policies[route.name],
            grounds[policies[route.name]].policy_check,
        )
        for route in routes
    ]
    made = dict(zip(policies, zip(errands, attempts(errands, host) if errands else ())))
    facts_of_host = facts.read_all()
    reports: List[Report] = []
    for route in config.routes:
        resolver, name = resolvers[route.name], route.name
        if name in made:
            report = _report(config, *made[name], grounds[policies[name]], resolver, refusals[name])
        else:
            report = _unresolved(config, route)
        unresolved = [f"{target}: {reason}" for target, reason in resolver.failures]
        reports.append(replace(report, host=facts_of_host, unresolved=unresolved))
    return reports


def _grounds(host: HostPolicy, policies: Sequence[Policy]) -> Dict[Policy, _Ground]:
    """For each policy. What was seen of a family counts for all."""
    if not policies:
        return {}
    checks = host.check(policies)
    tried = host.inspector.rehearsed
    seen = {family: found for policy_check in checks for family, found in policy_check.syns.items()}
    return {policy: _ground(policy, policy_check, seen, tried) for policy, policy_check in zip(policies, checks)}


def _ground(policy: Policy, policy_check: PolicyCheck, seen: Dict[int, Syn], tried: Sequence[str]) -> _Ground:
    rows, syns = _loopback(policy, seen)
    return _Ground(policy_check, [_sysctl(policy, policy_check, syns), _rules(policy_check, syns, tried)], rows)


def _dscp(config: Config, route: Route, policy: Policy, grounds: Dict[Policy, _Ground]) -> str:
    """Why the DSCP of --dscp can't be had, "" if it can; without --routes that is Exit 2, as for relaying."""
    try:
        require_dscp(route, policy, grounds[policy].policy_check)
    except Exit as problem:
        if config.routes_file is None:
            raise
        return str(problem)
    return ""


def _report(
    config: Config, errand: Errand, made: Sequence[Attempt], ground: _Ground, resolver: Resolver, refusal: str
) -> Report:
    policy, policy_check = errand.policy, errand.policy_check
    wires, refusals = _wires(policy, policy_check, made)
    lost = _lost(policy, made)
    problems = [policy_check.problem, *(wire.note for wire in wires if wire.shows == "leak"), *refusals]
    wrong = list(dict.fromkeys(problem for problem in problems if problem))
    missing = [*wrong, *(row.note for row in lost), *([refusal] if refusal else [])]
    return Report(
        route=errand.route,
        static_timestamp=config.static_timestamp,
        lever=None if missing else policy_check.lever,
        levers=ground.levers,
        witnesses=[*ground.loopback, *wires, *lost],
        connections=[attempt.connection for attempt in made],
        left_out=resolver.left_out,
        missing=missing,
        fixes=_fixes(config, errand, wrong),
    )


def _unresolved(config: Config, route: Route) -> Report:
    """Nothing is known of a route without an address: not even for which families its policy has to hold."""
    return Report(route, config.static_timestamp, None)


def _fixes(config: Config, errand: Errand, wrong: Sequence[str]) -> List[str]:
    if not wrong:
        return []
    found = errand.policy_check._replace(lever=None, problem=wrong[0])
    return advice.fixes(found, errand.policy, config)


# The levers


def _sysctl(policy: Policy, policy_check: PolicyCheck, syns: Sequence[Syn]) -> Row:
    name, value = "net.ipv4.tcp_timestamps", policy_check.sysctl
    if value is None:
        return Row(name, None, "unknown", policy_check.problem)
    meaning = {0: "no timestamps", 1: "timestamps, a random offset for each connection"}.get(
        value, "timestamps without an offset: they are this host's uptime"
    )
    needed = policy.mode == "preserve" or (value == 0) == (policy.mode == "strip")
    return Row(name, str(value), "ok" if needed else "off", f"in this namespace: {meaning}")


def _rules(policy_check: PolicyCheck, syns: Sequence[Syn], tried: Sequence[str]) -> Row:
    """nftables, from what it does to our SYNs and, with the right to, from the names of its tables."""
    try:
        names, seen = netfilter.tables(), ""
        seen = f"tables here: {', '.join(names)}" if names else "no table here"
    except OSError as error:
        names, why = [], "that takes CAP_NET_ADMIN" if isinstance(error, PermissionError) else error.strerror or str(error)
        seen = f"the rules can't be read ({why}); what they do shows in the witness"
    value = ", ".join(names) or None
    if policy_check.lever is Lever.NFTABLES:
        note = f"a filter changes our SYN as wanted, and on loopback what answers this: {'; '.join(tried)}; {seen}"
        return Row("nftables", value, "ok", note)
    if policy_check.sysctl == 0 or not syns:
        return Row("nftables", value, "unknown", f"nothing to change in our SYN; {seen}" if syns else seen)
    return Row("nftables", value, "off", f"our SYN keeps its timestamp on loopback; {seen}" if _leaks(syns) else seen)


def _leaks(syns: Sequence[Syn]) -> bool:
    return any(found.has_timestamps for found in syns)


# The witnesses on loopback


def _loopback(policy: Policy, seen: Dict[int, Syn]) -> Tuple[List[Row], List[Syn]]:
    """One row and, if it could be made, one SYN for each family; also where the policy does not ask for a witness."""
    rows: List[Row] = []
    syns: List[Syn] = []
    for family in policy.families:
        name = f"{FAMILY_NAMES[family]} SYN on loopback"
        try:
            found = seen.get(family) or witness.capture_syn(family, time.monotonic() + CHECK_TIMEOUT_S)
        except NoWitness as problem:
            rows.append(Row(name, None, "unknown", str(problem)))
        else:
            syns.append(found)
            rows.append(Row(name, str(found), *_shown(policy, found)))
    return rows, syns


def _shown(policy: Policy, found: Syn) -> Tuple[str, str]:
    """(what it shows, why) of a SYN that was seen."""
    what = "no timestamp" if not found.has_timestamps else f"TSval {found.tsval}"
    if policy.mode == "preserve" or policy.fits(found):
        return "ok", what
    beyond = "; taken as changed further on (--trust-host)" if policy.trusted else ""
    return "leak", (f"{what}, not {policy.tsval}" if policy.mode == "rewrite" else what) + beyond


# The wire


def _wires(policy: Policy, policy_check: PolicyCheck, attempts: Sequence[Attempt]) -> Tuple[List[Row], List[str]]:
    """A row for what was seen on the wire to each address, and what tsproxy would not have relayed."""
    rows = [row for attempt in attempts for row in _wire_rows(policy, attempt)]
    if len({attempt.blind for attempt in attempts}) == 1 and attempts[0].blind:
        rows = [Row("SYN on the wire", None, "unknown", f"not watched: {attempts[0].blind}")]
    refused = [attempt.connection for attempt in attempts if attempt.connection.relays is False]
    return rows, [f"the connection to {one.address} would not be relayed: {one.note}" for one in refused]


def _lost(policy: Policy, attempts: Sequence[Attempt]) -> List[Row]:
    """A row where a leak may be among what the capture dropped: then there is no yes."""
    lost = max((attempt.lost for attempt in attempts), default=0)
    if not lost or policy.mode == "preserve":
        return []
    note = f"not all was watched: {lost} packets to these ports were dropped, more than could be read; run check again"
    return [Row("SYN on the wire", None, "unknown", note)]


def _wire_rows(policy: Policy, attempt: Attempt) -> Iterator[Row]:
    """A row for each interface that segments of the connection left through."""
    to = attempt.connection.address
    if attempt.blind:
        yield Row(f"SYN to {to}", None, "unknown", f"not watched: {attempt.blind}")
    for interface in dict.fromkeys(seen.interface for seen in attempt.seen):
        yield _wire_row(policy, [seen for seen in attempt.seen if seen.interface == interface], to)


def _wire_row(policy: Policy, segments: Sequence[Seen], to: str) -> Row:
    """The worst of what the segments show, with the options of the first that shows it."""
    name = f"SYN to {to} on {segments[0].interface}"
    found = [_segment_row(policy, name, seen, to) for seen in segments]
    for shows in ("leak", "unknown"):
        for row in found:
            if row.shows == shows:
                return row
    further = f", nor in {len(found) - 1} segments that followed" if len(found) > 1 and policy.mode == "strip" else ""
    return found[0]._replace(note=found[0].note + further)


def _segment_row(policy: Policy, name: str, seen: Seen, to: str) -> Row:
    try:
        found = syn.parse(seen.headers)
    except syn.Malformed as problem:
        return Row(name, None, "unknown", str(problem))
    if policy.mode == "rewrite" and not seen.is_syn and not found.has_timestamps:
        return Row(name, str(found), "ok", "no timestamp")  # e.g. a reset without a connection
    shows, what = _shown(policy, found)
    kind = "the SYN" if seen.is_syn else f"a later segment (flags {seen.flags:#04x})"
    return Row(name, str(found), shows, f"{kind} to {to} leaves {seen.interface} with {what}" if shows == "leak" else what)
