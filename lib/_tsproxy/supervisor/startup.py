"""All that must be in place before the first client: addresses, policy, limits, listeners, user, shared memory.

Knows the order, and for each step that fails its exit code and one message. The policy needs the address families; bind(2)
may need root. Knows nothing of threads or processes: none is started here.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import socket
import time
from typing import Dict, List, Mapping, NamedTuple, Optional, Tuple

from _tsproxy.cli import exits
from _tsproxy.cli.config import Config, Route
from _tsproxy.cli.exits import Exit
from _tsproxy.linux import limits, privileges, sockets, systemd, wakeup
from _tsproxy.linux.addresses import Address
from _tsproxy.policy import advice, witness
from _tsproxy.policy.evidence import FAMILY_NAMES, Answer, Evidence
from _tsproxy.policy.inspector import CHECK_TIMEOUT_S, Inspector, PolicyCheck
from _tsproxy.policy.levers import Lever, Policy
from _tsproxy.policy.syn import Syn
from _tsproxy.policy.witness import NoWitness
from _tsproxy.proxy.clients import slots_for
from _tsproxy.stats.counters import SharedCounters, bytes_for
from _tsproxy.stats.records import RecordPipe
from _tsproxy.supervisor import listening, runners
from _tsproxy.supervisor.listening import Ends
from _tsproxy.supervisor.resolver import Resolver
from _tsproxy.supervisor.signals import Signals
from _tsproxy.supervisor.worker_args import WorkerShared

# What getaddrinfo(3) can take for one name: 5 s, twice, for three servers and each of six domains to search (resolv.conf(5)).
_LOOK_UP_S = 240.0


class Prepared(NamedTuple):
    """What the supervisor starts with. `counters` and `records` are those whose descriptors are in `shared`."""

    shared: WorkerShared
    counters: SharedCounters
    records: RecordPipe
    listeners: List[socket.socket]
    resolver: Resolver
    inspector: Inspector
    evidence: Evidence
    nofile: int


def prepare(config: Config, environment: Mapping[str, str], notifier: systemd.Notifier, signals: Signals) -> Prepared:
    """Do all of it, and drop root. Exit with the code and message of the step that fails.

    The first look-up of names may take minutes: SIGTERM, SIGINT or SIGHUP end it, with Exit.
    """
    account = _account(config)
    (route,) = config.routes
    names = [target for target in route.targets if not target.is_literal]
    if names:
        notifier.extend(_LOOK_UP_S * len(names), STATUS=f"resolving {', '.join(map(str, names))}")
    resolver = _resolve_unless(route, signals)
    inspector = Inspector(policy_of(config, route, resolver))
    policy_check = _require_policy(route, inspector)
    require_dscp(route, inspector.policy, policy_check)
    nofile = _raise_limits(config, route)
    _require_interface(route)
    sources = _require_sources(route)
    runtime = _runtime(config)
    # From here on clients can connect: what may refuse to start comes before it.
    listeners = listening.listeners(route, config.reuse_port, Ends(resolver.addresses, sources), environment)
    _renounce(account)
    if account:
        runtime = _runtime(config)  # again: the user may have no right to read the Python that an interpreter starts from
        _require_interface(route)  # again: before Linux 5.7 the user has no right to
    config = config._replace(runtime=runtime)
    evidence, records = Evidence.create(), RecordPipe.create()
    counters = SharedCounters.create(config.workers, slots_for(route.max_connections, route.max_connections_per_client))
    shared = WorkerShared(
        config=config,
        sources=sources,
        policy=inspector.policy,
        lever=policy_check.lever or Lever.NONE,
        evidence_fd=evidence.fd,
        asked={family: wakeup.create() for family in FAMILY_NAMES},
        for_rules=bool(inspector.rules_clear_mark),
        counters_fd=counters.fd,
        records_fd=records.writer,
        exited=wakeup.create(),
    )
    return Prepared(shared, counters, records, listeners, resolver, inspector, evidence, nofile)


def policy_of(config: Config, route: Route, resolver: Resolver) -> Policy:
    """The policy asked for, for the families of the targets' addresses."""
    families = tuple(dict.fromkeys(address.family for address in resolver.addresses))
    return Policy(route.timestamps, config.static_timestamp, route.trust_host, families)


def _require_policy(route: Route, inspector: Inspector) -> PolicyCheck:
    policy_check = check_twice(inspector)
    if policy_check.lever is not None:
        return policy_check
    if policy_check.families and len(policy_check.of(Answer.ABSENT)) == len(policy_check.families):
        raise Exit(exits.NOT_YET, f"{policy_check.problem}; no target has another address")
    raise Exit(exits.POLICY, advice.unattainable(policy_check, inspector.policy, [str(target) for target in route.targets]))


def require_dscp(route: Route, policy: Policy, policy_check: PolicyCheck) -> None:
    """Exit 2 if rules would set another DSCP than --dscp: the witness SYNs had TAG_DSCP, and show what became of it."""
    if route.dscp is None:
        return
    syns = policy_check.syns or _witnessed(policy)
    found = {syn.dscp for syn in syns.values()} - {sockets.TAG_DSCP, route.dscp}
    if found:
        allowed = f"{min(found)}, which packet filter rules set here (generate nftables --dscp={route.dscp} prints others)"
        raise Exit(exits.USAGE, f"--dscp: given '{route.dscp}'; allowed: {allowed}")


def _witnessed(policy: Policy) -> Dict[int, Syn]:
    """Witness SYNs where the policy asks for none, by family; where one can't be had nothing is known."""
    syns: Dict[int, Syn] = {}
    for family in policy.families:
        with contextlib.suppress(NoWitness):
            syns[family] = witness.capture_syn(family, time.monotonic() + CHECK_TIMEOUT_S)
    return syns


def check_twice(inspector: Inspector) -> PolicyCheck:
    """Inspect; once more where the inspection itself failed, as it may on a busy host."""
    policy_check = inspector.check()
    return inspector.check() if policy_check.lever is None and policy_check.of(Answer.UNSEEN) else policy_check


def _runtime(config: Config) -> str:
    """The runtime to use; for auto the best that works here."""
    if config.runtime == "interpreters" and not runners.have_interpreters():
        needs = "interpreters needs Python 3.13, which --user may read"
        raise Exit(exits.USAGE, f"--runtime: given 'interpreters'; allowed: threads or processes ({needs})")
    return runners.best() if config.runtime == "auto" else config.runtime


def _account(config: Config) -> Optional[pwd.struct_passwd]:
    """The account of --user, to change to after bind(2); None without it, or if it is that already."""
    if config.user is None:
        return None
    try:
        account = privileges.account(config.user)
    except KeyError:
        raise Exit(exits.USAGE, f"--user: given {config.user!r}; allowed: a user of this host") from None
    if os.geteuid() not in (0, account.pw_uid):
        raise Exit(exits.USAGE, f"--user={config.user}: only root can become another user; start it as root or leave it out")
    if account.pw_uid == 0:
        raise Exit(exits.USAGE, f"--user: given {config.user!r}; allowed: a user that is not root")
    return account if os.geteuid() == 0 else None


def _renounce(account: Optional[pwd.struct_passwd]) -> None:
    """Change to the account. Without one, only set no_new_privs, where Python and the kernel can."""
    if account is None:
        with contextlib.suppress(OSError):
            privileges.set_no_new_privs()
        return
    try:
        privileges.drop(account)
    except (OSError, RuntimeError) as problem:
        raise Exit(exits.FAILED, f"--user={account.pw_name}: root can't be dropped for good: {problem}") from None


def _raise_limits(config: Config, route: Route) -> int:
    """The descriptor limit in force. Exit 2 if it, or RLIMIT_FSIZE, is too low for the options."""
    counters_bytes = bytes_for(config.workers, slots_for(route.max_connections, route.max_connections_per_client))
    if limits.largest_file() < counters_bytes:
        given = f"the limit on file sizes (RLIMIT_FSIZE, ulimit -f): given {limits.largest_file():.0f} bytes"
        raise Exit(exits.USAGE, f"{given}; allowed: at least {counters_bytes}, for the counters in shared memory")
    needed = limits.descriptors_for(route.max_connections, config.workers)
    got = limits.raise_nofile(needed)
    if got < needed:
        room = limits.connections_within(got, config.workers)
        raise Exit(
            exits.USAGE,
            f"--max-connections: given {route.max_connections}; allowed: up to {room} with this process's hard limit of "
            f"{got} descriptors (raise it with ulimit -Hn {needed} or LimitNOFILE={needed})",
        )
    return got


def _require_interface(route: Route) -> None:
    """Exit 75 if there is no interface of that name: as an address, it may come later. Exit 2 without the right to it."""
    if route.interface is None:
        return
    try:
        with socket.socket() as probe:
            sockets.bind_to_interface(probe, route.interface)
    except sockets.InterfaceUnavailable:
        given = f"--interface: given {route.interface!r}"
        raise Exit(exits.NOT_YET, f"{given}; allowed: an interface of this host (ip -brief link)") from None
    except PermissionError:
        raise Exit(exits.USAGE, f"--interface={route.interface}: takes Linux 5.7 or later, or CAP_NET_RAW") from None


def _require_sources(route: Route) -> Tuple[Address, ...]:
    """The addresses of --source. Exit 75 if one is not of this host: bind(2) finds out now, not with the first client.

    It may be a typing error, or an address that comes later: by DHCP, with a fail-over, or after IPv6 duplicate address
    detection. No errno distinguishes these, so it is the exit code for which a service manager tries again.
    """
    sources = _sources(route)
    for source in sources:
        if not listening.is_local(source, route.interface or ""):
            raise Exit(exits.NOT_YET, f"--source: given {source.ip!r}; allowed: an address of this host (ip -brief address)")
    return sources


def _sources(route: Route) -> Tuple[Address, ...]:
    return tuple(Address(listening.family_of(source), source, 0) for source in route.sources)


def resolve(route: Route) -> Resolver:
    """The targets' addresses. Exit 75 only if none of the targets can be resolved.

    Any answer of getaddrinfo(3), EAI_NONAME too, may change in a minute: the network is not up yet, the record not published,
    a negative answer cached (RFC 2308).
    """
    resolver = _resolver(route)
    resolver.resolve()
    return _require_answer(resolver)


def _resolve_unless(route: Route, signals: Signals) -> Resolver:
    """The same, but Exit 0 on SIGTERM, SIGINT or SIGHUP."""
    resolver = _resolver(route)
    if not resolver.resolve_unless(signals):
        raise Exit(exits.DRAINED, "ended by a signal while the targets' names were looked up; nothing was begun")
    return _require_answer(resolver)


def _resolver(route: Route) -> Resolver:
    return Resolver(route.targets, [source.family for source in _sources(route)])


def _require_answer(resolver: Resolver) -> Resolver:
    if not resolver.addresses:
        target, reason = resolver.failures[0]
        raise Exit(exits.NOT_YET, f"--target: given '{target}'; can't be resolved: {reason}")
    return resolver
