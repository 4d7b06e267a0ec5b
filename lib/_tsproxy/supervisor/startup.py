"""All that must be in place before the first client: names, policy, limits, listeners, the right user.

Each step ends with its own exit code and one message when it can't be done. Order matters: the policy needs to know the
address families, root is needed until the listeners are bound.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import socket
from dataclasses import replace
from typing import List, Mapping, NamedTuple, Optional, Tuple

from _tsproxy.cli import exits
from _tsproxy.cli.config import Config
from _tsproxy.cli.exits import Exit
from _tsproxy.linux import limits, privileges, systemd, wakeup
from _tsproxy.linux.addresses import Address
from _tsproxy.policy import advice
from _tsproxy.policy.evidence import NAMES, Answer, Evidence
from _tsproxy.policy.inspector import Inspector, PolicyCheck
from _tsproxy.policy.levers import Lever, Policy
from _tsproxy.proxy.clients import slots_for
from _tsproxy.stats.counters import bytes_for
from _tsproxy.supervisor import listening, worker_slots
from _tsproxy.supervisor.resolver import Resolver
from _tsproxy.supervisor.signals import Signals
from _tsproxy.supervisor.worker_args import WorkerShared

# What getaddrinfo(3) can take for one name: 5 s, twice, for three servers and each of six domains to search (resolv.conf(5)).
_LOOK_UP_S = 240.0


class Prepared(NamedTuple):
    """What a server starts with."""

    shared: WorkerShared
    listeners: List[socket.socket]
    resolver: Resolver
    inspector: Inspector
    evidence: Evidence
    nofile: int


def prepare(config: Config, environment: Mapping[str, str], notifier: systemd.Notifier, signals: Signals) -> Prepared:
    """Do all of it, and drop root at the end. Exit with its code and message if something is in the way.

    What takes long, the first look-up of names, ends when a signal asks for the end, and with it all.
    """
    account = _account(config)
    names = [target for target in config.targets if not target.is_literal]
    if names:
        notifier.extend(_LOOK_UP_S * len(names), STATUS=f"resolving {', '.join(map(str, names))}")
    resolver = _resolve_unless(config, signals)
    inspector = Inspector(policy_of(config, resolver))
    policy_check = _require_policy(config, inspector)
    nofile = _raise_limits(config)
    sources = _require_sources(config)
    runtime = _runtime(config)
    # From here on clients may come to us: no refusal after it.
    listeners = listening.listeners(config, resolver.addresses, sources, environment)
    _renounce(account)
    if account:
        runtime = _runtime(config)  # anew: it may have no right to read the Python that an interpreter starts from
    config = replace(config, runtime=runtime)
    evidence, lever = Evidence.create(), policy_check.lever or Lever.NONE
    asked = {family: wakeup.create() for family in NAMES}
    shared = WorkerShared(config, sources, inspector.policy, lever, evidence.fd, asked, bool(inspector.mark_is_known))
    return Prepared(shared, listeners, resolver, inspector, evidence, nofile)


def policy_of(config: Config, resolver: Resolver) -> Policy:
    """The policy asked for, for the families of the targets' addresses."""
    families = tuple(dict.fromkeys(address.family for address in resolver.addresses))
    return Policy(config.timestamps, config.static_timestamp, config.trust_host, families)


def _require_policy(config: Config, inspector: Inspector) -> PolicyCheck:
    policy_check = look_twice(inspector)
    if policy_check.lever is not None:
        return policy_check
    if policy_check.families and len(policy_check.of(Answer.ABSENT)) == len(policy_check.families):
        raise Exit(exits.NOT_YET, f"{policy_check.problem}; no target has another address")
    raise Exit(exits.POLICY, advice.unattainable(policy_check, inspector.policy, [str(target) for target in config.targets]))


def look_twice(inspector: Inspector) -> PolicyCheck:
    """A look; and another one where it failed itself, as it may on a host that is busy just now."""
    policy_check = inspector.look()
    return inspector.look() if policy_check.lever is None and policy_check.of(Answer.UNSEEN) else policy_check


def _runtime(config: Config) -> str:
    """The runtime to use; auto is the best that works here, tried."""
    if config.runtime == "interpreters" and not worker_slots.have_interpreters():
        needs = "interpreters needs Python 3.13, which --user may read"
        raise Exit(exits.USAGE, f"--runtime: given 'interpreters'; allowed: threads or processes ({needs})")
    return worker_slots.best() if config.runtime == "auto" else config.runtime


def _account(config: Config) -> Optional[pwd.struct_passwd]:
    """Who to become after binding; None if nobody was named."""
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
    """Become the user, if one was named. Without one, only gain no more rights, as far as Python and the kernel can."""
    if account is None:
        with contextlib.suppress(OSError):
            privileges.gain_no_more()
        return
    try:
        privileges.drop(account)
    except (OSError, RuntimeError) as problem:
        raise Exit(exits.FAILED, f"--user={account.pw_name}: root can't be dropped for good: {problem}") from None


def _raise_limits(config: Config) -> int:
    """The descriptor limit in force; a clear no if it, or that on files, is too low for what was asked."""
    counters_bytes = bytes_for(config.workers, slots_for(config.max_connections, config.max_connections_per_client))
    if limits.largest_file() < counters_bytes:
        given = f"the limit on file sizes (RLIMIT_FSIZE, ulimit -f): given {limits.largest_file():.0f} bytes"
        raise Exit(exits.USAGE, f"{given}; allowed: at least {counters_bytes}, for the counters in shared memory")
    needed = limits.descriptors_for(config.max_connections, config.workers)
    got = limits.raise_nofile(needed)
    if got < needed:
        room = limits.connections_within(got, config.workers)
        raise Exit(
            exits.USAGE,
            f"--max-connections: given {config.max_connections}; allowed: up to {room} with this process's hard limit of "
            f"{got} descriptors (raise it with ulimit -Hn {needed} or LimitNOFILE={needed})",
        )
    return got


def _require_sources(config: Config) -> Tuple[Address, ...]:
    """Each --source must be an address of this host: found out now, not with the first order.

    It may be a slip, and it may be yet to come: by DHCP, with a fail-over, or an IPv6 one that nobody else is known not to
    have so far. No errno tells these apart. To try again costs little where it is a slip, to give up costs a person where not.
    """
    sources = _sources(config)
    for source in sources:
        if not listening.is_local(source):
            raise Exit(exits.NOT_YET, f"--source: given {source.ip!r}; allowed: an address of this host (ip -brief address)")
    return sources


def _sources(config: Config) -> Tuple[Address, ...]:
    return tuple(Address(listening.family_of(source), source, 0) for source in config.sources)


def resolve(config: Config) -> Resolver:
    """The targets' addresses; a target that can't be resolved is an error only if no other can be.

    Whatever the resolver says, "no such name" too, may be otherwise in a minute: the name was sound, the network is not up,
    the record not out, a negative answer cached (RFC 2308).
    """
    resolver = _resolver(config)
    resolver.resolve()
    return _require_answer(resolver)


def _resolve_unless(config: Config, signals: Signals) -> Resolver:
    """The same, unless a signal comes first."""
    resolver = _resolver(config)
    if not resolver.resolve_unless(signals):
        raise Exit(exits.DRAINED, "ended by a signal while the targets' names were looked up; nothing was begun")
    return _require_answer(resolver)


def _resolver(config: Config) -> Resolver:
    return Resolver(config.targets, [source.family for source in _sources(config)])


def _require_answer(resolver: Resolver) -> Resolver:
    if not resolver.addresses:
        target, reason = resolver.failures[0]
        raise Exit(exits.NOT_YET, f"--target: given '{target}'; can't be resolved: {reason}")
    return resolver
