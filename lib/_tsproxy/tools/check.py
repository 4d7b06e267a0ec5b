"""`check`: would the timestamp policy hold here? Each lever, each witness: yes (0), no (78), no target resolves (75).

It decides as relaying does, with the same Inspector and the same gate. No SYN leaves for a target before the loopback
witness is clean: that SYN would be the leak. What a target answers does not change what is true of the policy. A capture
that lost packets can't tell: no (78).
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
import time
from typing import Iterator, List, NamedTuple, Optional, Sequence, Tuple

from _tsproxy.capture.outgoing import Capture, Seen
from _tsproxy.cli import exits
from _tsproxy.cli.config import Config, Route
from _tsproxy.linux import facts, netfilter, sockets, uapi, wakeup
from _tsproxy.linux.addresses import Address
from _tsproxy.policy import advice, syn, witness
from _tsproxy.policy.evidence import FAMILY_NAMES, Answer, Evidence
from _tsproxy.policy.gates import LeverGate, gate_for
from _tsproxy.policy.inspector import CHECK_TIMEOUT_S, Inspector, PolicyCheck
from _tsproxy.policy.levers import MONITORED, Lever, Policy
from _tsproxy.policy.syn import Syn
from _tsproxy.policy.witness import NoWitness
from _tsproxy.supervisor.host_policy import check_twice
from _tsproxy.supervisor.startup import policy_of, require_dscp, resolve
from _tsproxy.supervisor.worker_args import egress_of
from _tsproxy.tools import check_report
from _tsproxy.tools.check_report import Connection, Report, Row

_FOLLOW_S = 2.0  # how long the wire is watched after the connections were closed


def run(config: Config, as_json: bool) -> int:
    """Print the report, for people or as one JSON object; 0 if the policy would hold, else 78."""
    (route,) = config.routes
    report = update(config, route)
    if as_json:
        sys.stdout.buffer.write(check_report.as_json(report))
    else:
        print(check_report.as_table(report, sys.stdout))
    sys.stdout.flush()
    return exits.DRAINED if report.holds else exits.POLICY


def update(config: Config, route: Route) -> Report:
    """All of it, in order: the host, the levers, the witnesses on loopback, then the targets. Exit 75 if none resolves."""
    resolver = resolve(route)
    policy = policy_of(config, route, resolver)
    with contextlib.closing(Inspector(policy)) as inspector:
        policy_check = check_twice(inspector)
        require_dscp(route, policy, policy_check)
        tried = inspector.rehearsed
        rows, syns = _loopback(policy, policy_check)
        attempts = list(_attempts(route, inspector, policy_check, resolver.addresses))
    wires, refusals = _wires(policy, policy_check, attempts)
    lost = _lost(policy, attempts)
    problems = [policy_check.problem, *(wire.note for wire in wires if wire.shows == "leak"), *refusals]
    wrong = list(dict.fromkeys(problem for problem in problems if problem))
    missing = [*wrong, *(row.note for row in lost)]
    return Report(
        route=route,
        static_timestamp=config.static_timestamp,
        lever=None if missing else policy_check.lever,
        host=facts.read_all(),
        levers=[_sysctl(policy, policy_check, syns), _rules(policy_check, syns, tried)],
        witnesses=[*rows, *wires, *lost],
        connections=[attempt.connection for attempt in attempts],
        unresolved=[f"{target}: {reason}" for target, reason in resolver.failures],
        left_out=resolver.left_out,
        missing=missing,
        fixes=_fixes(route, policy, policy_check, wrong),
    )


def _fixes(route: Route, policy: Policy, policy_check: PolicyCheck, wrong: Sequence[str]) -> List[str]:
    if not wrong:
        return []
    found = policy_check._replace(lever=None, problem=wrong[0])
    return advice.fixes(found, policy, [str(target) for target in route.targets])


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


def _loopback(policy: Policy, policy_check: PolicyCheck) -> Tuple[List[Row], List[Syn]]:
    """One row and, if it could be made, one SYN for each family; also where the policy does not ask for a witness."""
    rows: List[Row] = []
    syns: List[Syn] = []
    for family in policy.families:
        name = f"{FAMILY_NAMES[family]} SYN on loopback"
        try:
            found = policy_check.syns.get(family) or witness.capture_syn(family, time.monotonic() + CHECK_TIMEOUT_S)
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


# The targets


class _Attempt(NamedTuple):
    """One connection: how it went, what was seen of it on the wire, and whether tsproxy would have relayed on it."""

    connection: Connection
    seen: List[Seen]
    blind: str  # why the wire was not watched; "" if it was
    lost: int = 0  # packets that the capture dropped, of whichever connection


def _attempts(
    route: Route, inspector: Inspector, policy_check: PolicyCheck, addresses: Sequence[Address]
) -> Iterator[_Attempt]:
    """One for each address, one after the other; none where the policy does not hold."""
    if policy_check.lever is None:
        for address in addresses:
            yield _Attempt(Connection(str(address), "not tried", "its SYN would be the leak"), [], "no SYN was sent")
        return
    capture, blind = _capture(inspector.policy, addresses)
    evidence, asked = Evidence.create(), {family: wakeup.create() for family in FAMILY_NAMES}
    try:
        gate = gate_for(policy_check.lever, inspector.policy, evidence, asked, for_rules=bool(inspector.rules_clear_mark))
        tries = [_try(route, gate, address, _fresh(inspector, policy_check.lever, evidence, address)) for address in addresses]
        yield from _with_the_wire(tries, capture, blind)
    finally:
        for wake in asked.values():
            wake.close()
        if capture:
            capture.close()


class _Try(NamedTuple):
    """How one connection went, and its own end of it, if there was one."""

    connection: Connection
    target: Address
    ours: Sequence[object] = ()


def _fresh(inspector: Inspector, lever: Lever, evidence: Evidence, address: Address) -> str:
    """Look anew, as for any connect(); what stands in its way."""
    if lever not in MONITORED:
        return ""
    began = time.monotonic_ns()
    policy_check = inspector.check((address.family,))
    answer = policy_check.answer(address.family, lever)
    evidence.publish(address.family, answer, began)
    problem = policy_check.families[address.family].problem if address.family in policy_check.families else policy_check.problem
    return "" if answer is Answer.HOLDS else problem or "the policy does not hold any more"


def _capture(policy: Policy, addresses: Sequence[Address]) -> Tuple[Optional[Capture], str]:
    """The tap, or None and why there is none."""
    if policy.trusted:
        return None, "with --trust-host it is changed where this host can't see it"
    try:
        return Capture({address.port for address in addresses}), ""
    except PermissionError:
        return None, f"that takes CAP_NET_RAW, which uid {os.geteuid()} does not have here: run check as root once"
    except OSError as error:
        return None, f"no packet socket here: {error.strerror or error}"


def _try(route: Route, gate: LeverGate, address: Address, obstacle: str) -> _Try:
    """Connect as a worker would, and close in order. What stands in the way of one connection is told, not raised."""
    if obstacle or not gate.may_connect(address.family):
        return _Try(Connection(str(address), "not tried", obstacle or "the policy does not hold any more"), address)
    try:
        source = _source(route, address.family)
        sock = sockets.dial(address.family, source, gate.for_rules, egress_of(route))
    except OSError as error:
        return _Try(Connection(str(address), "failed", error.strerror or str(error)), address)
    with contextlib.closing(sock):
        begun = time.monotonic_ns()
        number = sock.connect_ex(address.sockaddr)
        ours = sock.getsockname()
        return _Try(_outcome(sock, address, gate, route.connect_timeout_s, begun, number), address, ours)


def _with_the_wire(tries: Sequence[_Try], capture: Optional[Capture], blind: str) -> Iterator[_Attempt]:
    """Each connection with all that left for it, to its end and for some time after it: FIN, answers to the far end's."""
    left = _left(tries, capture) if capture else []
    lost = capture.lost() if capture else 0
    for one in tries:
        seen = [segment for segment in left if _is_ours(segment, one)]
        yield _Attempt(one.connection, seen, blind or ("" if seen else _unseen(one, lost)), lost)


def _left(tries: Sequence[_Try], capture: Capture) -> List[Seen]:
    """What left so far; where one of our SYNs did, what follows as well: one that was given up may still be answered."""
    left = capture.take()
    if any(_is_ours(segment, one) for segment in left for one in tries):
        time.sleep(_FOLLOW_S)
        left += capture.take()
    return left


def _unseen(one: _Try, lost: int) -> str:
    if not one.ours:
        return "no SYN was sent"
    return "its SYN may be among the packets that were dropped" if lost else "no SYN left"


def _source(route: Route, family: int) -> Optional[Address]:
    """The first --source of that family."""
    return next((Address(family, ip, 0) for ip in route.sources if (":" in ip) == (family == socket.AF_INET6)), None)


def _outcome(sock: socket.SocketType, to: Address, gate: LeverGate, patience_s: float, begun: int, number: int) -> Connection:
    """`number` is what connect(2) answered at once: without a route that is all there is."""
    if number in uapi.RETRY:
        if not witness.poll(sock, select.POLLOUT, time.monotonic() + patience_s):
            return Connection(str(to), "timed out", f"no answer within {patience_s:g} s")
        number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if number:
        return Connection(str(to), "failed", os.strerror(number))
    took_us = (time.monotonic_ns() - begun) // 1000
    info = sockets.tcp_info(sock)
    what = "timestamps negotiated" if info.timestamps else "no timestamps negotiated"
    return Connection(str(to), "connected", what, took_us, info.timestamps, gate.may_relay(sock, info))


def _is_ours(seen: Seen, one: _Try) -> bool:
    """A packet filter may have changed one of the addresses."""
    if not one.ours or seen.source.port != one.ours[1]:
        return False
    return seen.source.ip == one.ours[0] or seen.destination == one.target._replace(scope=0)


def _wires(policy: Policy, policy_check: PolicyCheck, attempts: Sequence[_Attempt]) -> Tuple[List[Row], List[str]]:
    """A row for what was seen on the wire to each address, and what tsproxy would not have relayed."""
    rows = [row for attempt in attempts for row in _wire_rows(policy, attempt)]
    if len({attempt.blind for attempt in attempts}) == 1 and attempts[0].blind:
        rows = [Row("SYN on the wire", None, "unknown", f"not watched: {attempts[0].blind}")]
    refused = [attempt.connection for attempt in attempts if attempt.connection.relays is False]
    return rows, [f"the connection to {one.address} would not be relayed: {one.note}" for one in refused]


def _lost(policy: Policy, attempts: Sequence[_Attempt]) -> List[Row]:
    """A row where a leak may be among what the capture dropped: then there is no yes."""
    lost = max((attempt.lost for attempt in attempts), default=0)
    if not lost or policy.mode == "preserve":
        return []
    note = f"not all was watched: {lost} packets to these ports were dropped, more than could be read; run check again"
    return [Row("SYN on the wire", None, "unknown", note)]


def _wire_rows(policy: Policy, attempt: _Attempt) -> Iterator[Row]:
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
