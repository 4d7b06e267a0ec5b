"""`check`: would the timestamp policy hold here? Each lever, each witness: yes (0), no (78), no target resolves (75).

It decides as relaying does, with the same Inspector and the same gate. No SYN leaves for a target before the loopback
witness is clean: that SYN would be the leak. What a target answers does not change what is true of the policy.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
import time
from typing import Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from _tsproxy import exits
from _tsproxy.commands import check_report
from _tsproxy.commands.check_report import Connection, Report, Row
from _tsproxy.config import Config
from _tsproxy.host import facts, linux, netfilter, sockets
from _tsproxy.host.addresses import Address
from _tsproxy.host.capture import Capture, Seen
from _tsproxy.runtime.spec import tuning_of
from _tsproxy.server.startup import resolve, wanted_of
from _tsproxy.timestamps import advice, syn
from _tsproxy.timestamps.policy import Finding, Gate, Inspector, Lever, Wanted, gate_for
from _tsproxy.timestamps.syn import Syn
from _tsproxy.timestamps.witness import NAMES, NoWitness, Witness


def run(config: Config, as_json: bool) -> int:
    """Print the report, for people or as one JSON object; 0 if the policy would hold, else 78."""
    report = look(config)
    if as_json:
        sys.stdout.buffer.write(check_report.as_json(report))
    else:
        print(check_report.as_table(report, sys.stdout))
    sys.stdout.flush()
    return exits.DRAINED if report.holds else exits.POLICY


def look(config: Config) -> Report:
    """All of it, in order: the host, the levers, the witnesses on loopback, then the targets. Exit 75 if none resolves."""
    resolver = resolve(config)
    wanted = wanted_of(config, resolver)
    inspector = Inspector(wanted)
    finding = inspector.look()
    inspector.close()
    rows, syns = _loopback(wanted, finding)
    attempts = list(_attempts(config, wanted, finding, resolver.addresses))
    wires, refusals = _wires(wanted, finding, attempts)
    problems = [finding.problem, *(wire.note for wire in wires if wire.shows == "leak"), *refusals]
    missing = list(dict.fromkeys(problem for problem in problems if problem))
    return Report(
        config=config,
        lever=None if missing else finding.lever,
        host=facts.all_of_them(),
        levers=[_sysctl(wanted, finding, syns), _rules(wanted, finding, syns)],
        witnesses=[*rows, *wires],
        connections=[attempt.connection for attempt in attempts],
        unresolved=[f"{target}: {reason}" for target, reason in resolver.failures],
        missing=missing,
        fixes=_fixes(config, wanted, finding, missing),
    )


def _fixes(config: Config, wanted: Wanted, finding: Finding, missing: Sequence[str]) -> List[str]:
    if not missing:
        return []
    found = finding._replace(lever=None, problem=missing[0])
    return advice.fixes(found, wanted, [str(target) for target in config.targets])


# The levers


def _sysctl(wanted: Wanted, finding: Finding, syns: Sequence[Syn]) -> Row:
    name, value = "net.ipv4.tcp_timestamps", finding.sysctl
    if value is None:
        return Row(name, None, "unknown", finding.problem)
    meaning = {0: "no timestamps", 1: "timestamps, a random offset for each connection"}.get(
        value, "timestamps without an offset: they are this host's uptime"
    )
    needed = wanted.mode == "preserve" or (value == 0) == (wanted.mode == "strip")
    return Row(name, str(value), "ok" if needed else "off", f"in this namespace: {meaning}")


def _rules(wanted: Wanted, finding: Finding, syns: Sequence[Syn]) -> Row:
    """nftables, from what it does to our SYNs and, with the right to, from the names of its tables."""
    try:
        names, seen = netfilter.tables(), ""
        seen = f"tables here: {', '.join(names)}" if names else "no table here"
    except OSError as error:
        names, why = [], "that takes CAP_NET_ADMIN" if isinstance(error, PermissionError) else error.strerror or str(error)
        seen = f"the rules can't be read ({why}); what they do shows in the witness"
    value = ", ".join(names) or None
    if finding.lever is Lever.NFTABLES:
        return Row("nftables", value, "ok", f"a filter changes our SYN as wanted; {seen}")
    if finding.sysctl == 0 or not syns:
        return Row("nftables", value, "unknown", f"nothing to change in our SYN; {seen}" if syns else seen)
    return Row("nftables", value, "off", f"our SYN keeps its timestamp on loopback; {seen}" if _leaks(syns) else seen)


def _leaks(syns: Sequence[Syn]) -> bool:
    return any(found.has_timestamps for found in syns)


# The witnesses on loopback


def _loopback(wanted: Wanted, finding: Finding) -> Tuple[List[Row], List[Syn]]:
    """One row and, if it could be made, one SYN for each family; also where the policy does not ask for a witness."""
    rows: List[Row] = []
    syns: List[Syn] = []
    for family in wanted.families:
        name = f"{NAMES[family]} SYN on loopback"
        try:
            found = finding.syns.get(family) or _one_look(family)
        except NoWitness as problem:
            rows.append(Row(name, None, "unknown", str(problem)))
        else:
            syns.append(found)
            rows.append(Row(name, str(found), *_shown(wanted, found)))
    return rows, syns


def _one_look(family: int) -> Syn:
    witness = Witness((family,))
    try:
        return witness.look()[family]
    finally:
        witness.close()


def _shown(wanted: Wanted, found: Syn) -> Tuple[str, str]:
    """(what it shows, why) of a SYN that was seen."""
    what = "no timestamp" if not found.has_timestamps else f"TSval {found.tsval}"
    if wanted.mode == "preserve" or wanted.fits(found):
        return "ok", what
    beyond = "; taken as changed further on (--trust-host)" if wanted.trusted else ""
    return "leak", (f"{what}, not {wanted.tsval}" if wanted.mode == "rewrite" else what) + beyond


# The targets


class _Attempt(NamedTuple):
    """One connection: how it went, what was seen of its SYN, and whether tsproxy would have relayed on it."""

    connection: Connection
    seen: List[Seen]
    blind: str  # why the wire was not watched; "" if it was


def _attempts(config: Config, wanted: Wanted, finding: Finding, addresses: Sequence[Address]) -> Iterator[_Attempt]:
    """One for each address, one after the other; none where the policy does not hold."""
    if finding.lever is None:
        for address in addresses:
            yield _Attempt(Connection(str(address), "not tried", "its SYN would be the leak"), [], "no SYN was sent")
        return
    capture, blind = _capture(wanted)
    try:
        gate = gate_for(finding.lever, wanted)
        for address in addresses:
            yield _try(config, gate, address, capture, blind)
    finally:
        if capture:
            capture.close()


def _capture(wanted: Wanted) -> Tuple[Optional[Capture], str]:
    """The tap, or None and why there is none."""
    if wanted.trusted:
        return None, "with --trust-host it is changed where this host can't see it"
    try:
        return Capture(), ""
    except PermissionError:
        return None, f"that takes CAP_NET_RAW, which uid {os.geteuid()} does not have here: run check as root once"
    except OSError as error:
        return None, f"no packet socket here: {error.strerror or error}"


def _try(config: Config, gate: Gate, address: Address, capture: Optional[Capture], blind: str) -> _Attempt:
    """Connect as a worker would. What stands in the way of one connection is told, not raised."""
    if not gate.may_connect():
        return _Attempt(Connection(str(address), "not tried", "the policy does not hold any more"), [], "no SYN was sent")
    try:
        sock = sockets.dial(address.family, tuning_of(config), _source(config, address.family))
    except OSError as error:
        return _Attempt(Connection(str(address), "failed", error.strerror or str(error)), [], "no SYN was sent")
    with contextlib.closing(sock):
        begun = time.monotonic_ns()
        number = sock.connect_ex(address.sockaddr)
        ours = sock.getsockname()
        connection = _outcome(sock, address, gate, config.connect_timeout_s, begun, number)
    seen = [syn_seen for syn_seen in capture.take() if _is_ours(syn_seen, ours, address)] if capture else []
    return _Attempt(connection, seen, blind or ("" if seen else "no SYN left"))


def _source(config: Config, family: int) -> Optional[Address]:
    """The first --source of that family."""
    return next((Address(family, ip, 0) for ip in config.sources if (":" in ip) == (family == socket.AF_INET6)), None)


def _outcome(sock: socket.SocketType, to: Address, gate: Gate, patience_s: float, begun: int, number: int) -> Connection:
    """`number` is what connect(2) answered at once: without a route that is all there is."""
    if number in linux.RETRY:
        if not _writable(sock, patience_s):
            return Connection(str(to), "timed out", f"no answer within {patience_s:g} s")
        number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if number:
        return Connection(str(to), "failed", os.strerror(number))
    took_us = (time.monotonic_ns() - begun) // 1000
    negotiated = sockets.has_timestamps(sock)
    what = "timestamps negotiated" if negotiated else "no timestamps negotiated"
    return Connection(str(to), "connected", what, took_us, negotiated, gate.may_relay(sock, negotiated))


def _writable(sock: socket.SocketType, patience_s: float) -> bool:
    """poll(2), since a descriptor may be beyond what select(2) can take."""
    poller = select.poll()
    poller.register(sock, select.POLLOUT)
    return bool(poller.poll(patience_s * 1000))


def _is_ours(seen: Seen, ours: Sequence[object], target: Address) -> bool:
    """A packet filter may have changed one of the addresses."""
    return seen.source.port == ours[1] and (seen.source.ip == ours[0] or seen.destination == target._replace(scope=0))


def _wires(wanted: Wanted, finding: Finding, attempts: Sequence[_Attempt]) -> Tuple[List[Row], List[str]]:
    """A row for what was seen on the wire to each address, and what tsproxy would not have relayed."""
    rows = [row for attempt in attempts for row in _wire_rows(wanted, attempt)]
    if len({attempt.blind for attempt in attempts}) == 1 and attempts[0].blind:
        rows = [Row("SYN on the wire", None, "unknown", f"not watched: {attempts[0].blind}")]
    refused = [attempt.connection for attempt in attempts if attempt.connection.relays is False]
    return rows, [f"the connection to {one.address} would not be relayed: {one.note}" for one in refused]


def _wire_rows(wanted: Wanted, attempt: _Attempt) -> Iterator[Row]:
    to = attempt.connection.address
    if attempt.blind:
        yield Row(f"SYN to {to}", None, "unknown", f"not watched: {attempt.blind}")
    told: Dict[Tuple[str, str], None] = {}
    for seen in attempt.seen:
        row = _wire_row(wanted, seen, to)
        if (seen.interface, row.shows) not in told:  # a retransmission tells nothing new
            told[seen.interface, row.shows] = None
            yield row


def _wire_row(wanted: Wanted, seen: Seen, to: str) -> Row:
    name = f"SYN to {to} on {seen.interface}"
    try:
        found = syn.parse(seen.headers)
    except syn.Malformed as problem:
        return Row(name, None, "unknown", str(problem))
    shows, what = _shown(wanted, found)
    return Row(name, str(found), shows, f"the SYN to {to} leaves {seen.interface} with {what}" if shows == "leak" else what)
