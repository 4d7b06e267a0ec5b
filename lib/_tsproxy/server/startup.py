"""All that must be in place before the first client: names, policy, limits, listeners, the right user.

Each step ends with its own exit code and one message when it can't be done. Order matters: the policy needs to know the
address families, root is needed until the listeners are bound.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import socket
from dataclasses import replace
from typing import List, Mapping, NamedTuple, Optional, Sequence, Tuple

from _tsproxy import exits
from _tsproxy.config import Config
from _tsproxy.exits import Exit
from _tsproxy.host import limits, privileges, reuseport, sockets, systemd, wakeup
from _tsproxy.host.addresses import Address
from _tsproxy.runtime import seats
from _tsproxy.runtime.spec import Plan, tuning_of
from _tsproxy.server.resolver import Resolver
from _tsproxy.timestamps import advice
from _tsproxy.timestamps.evidence import Answer, Evidence
from _tsproxy.timestamps.inspector import Finding, Inspector
from _tsproxy.timestamps.policy import Lever, Wanted

# What getaddrinfo(3) can take for one name: 5 s, twice, for three servers and each of six domains to search (resolv.conf(5)).
_LOOK_UP_S = 240.0
_BACKLOG = 4096  # the kernel takes the smaller of this and net.core.somaxconn
_SANDBOX = " (does a sandbox refuse socket(2), setsockopt(2), bind(2) or listen(2)? SECURITY.md lists the system calls)"
_HINTS = {
    errno.EADDRINUSE: " (ss -ltnp shows by whom; --reuse-port shares a port)",
    errno.EACCES: " (ports below 1024 need root; --user drops it after binding)",
    errno.EADDRNOTAVAIL: " (--bind takes an address of this host)",
    errno.EPERM: _SANDBOX,
    errno.ENOSYS: _SANDBOX,
}


class Ready(NamedTuple):
    """What a server starts with."""

    plan: Plan
    listeners: List[socket.socket]
    resolver: Resolver
    inspector: Inspector
    evidence: Evidence
    nofile: int


def prepare(config: Config, environment: Mapping[str, str], notifier: systemd.Notifier) -> Ready:
    """Do all of it, and drop root at the end. Exit with its code and message if something is in the way."""
    account = _account(config)
    names = [target for target in config.targets if not target.is_literal]
    if names:
        notifier.extend(_LOOK_UP_S * len(names), STATUS=f"resolving {', '.join(map(str, names))}")
    resolver = resolve(config)
    inspector = Inspector(wanted_of(config, resolver))
    finding = _require_policy(config, inspector)
    nofile = _raise_limits(config)
    sources = _require_sources(config)
    runtime = _runtime(config)
    listeners = _listeners(config, resolver, environment)  # from here on clients may come to us: no refusal after it
    _renounce(account)
    if account:
        runtime = _runtime(config)  # anew: it may have no right to read the Python that an interpreter starts from
    config = replace(config, runtime=runtime)
    evidence, lever = Evidence.create(), finding.lever or Lever.NONE
    plan = Plan(config, sources, inspector.wanted, lever, evidence.fd, wakeup.create(), bool(inspector.mark_is_known))
    return Ready(plan, listeners, resolver, inspector, evidence, nofile)


def wanted_of(config: Config, resolver: Resolver) -> Wanted:
    """The policy asked for, for the families of the targets' addresses."""
    families = tuple(dict.fromkeys(address.family for address in resolver.addresses))
    return Wanted(config.timestamps, config.static_timestamp, config.trust_host, families)


def _require_policy(config: Config, inspector: Inspector) -> Finding:
    finding = look_twice(inspector)
    if finding.lever is not None:
        return finding
    if finding.families and len(finding.of(Answer.ABSENT)) == len(finding.families):
        raise Exit(exits.NOT_YET, f"{finding.problem}; no target has another address")
    raise Exit(exits.POLICY, advice.unattainable(finding, inspector.wanted, [str(target) for target in config.targets]))


def look_twice(inspector: Inspector) -> Finding:
    """A look; and another one where it failed itself, as it may on a host that is busy just now."""
    finding = inspector.look()
    return inspector.look() if finding.lever is None and finding.of(Answer.UNSEEN) else finding


def _runtime(config: Config) -> str:
    """The runtime to use; auto is the best that works here, tried."""
    if config.runtime == "interpreters" and not seats.have_interpreters():
        needs = "interpreters needs Python 3.13, which --user may read"
        raise Exit(exits.USAGE, f"--runtime: given 'interpreters'; allowed: threads or processes ({needs})")
    return seats.best() if config.runtime == "auto" else config.runtime


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
    """The descriptor limit in force; a clear no if it is too low for what was asked."""
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
        if not _is_local(source):
            raise Exit(exits.NOT_YET, f"--source: given {source.ip!r}; allowed: an address of this host (ip -brief address)")
    return sources


def _sources(config: Config) -> Tuple[Address, ...]:
    return tuple(Address(_family(source), source, 0) for source in config.sources)


def _family(ip: str) -> int:
    return socket.AF_INET6 if ":" in ip else socket.AF_INET


def resolve(config: Config) -> Resolver:
    """The targets' addresses; a target that can't be resolved is an error only if no other can be.

    Whatever the resolver says, "no such name" too, may be otherwise in a minute: the name was sound, the network is not up,
    the record not out, a negative answer cached (RFC 2308).
    """
    resolver = Resolver(config.targets, [source.family for source in _sources(config)])
    resolver.resolve()
    if not resolver.addresses:
        target, reason = resolver.failures[0]
        raise Exit(exits.NOT_YET, f"--target: given '{target}'; can't be resolved: {reason}")
    return resolver


def _listeners(config: Config, resolver: Resolver, environment: Mapping[str, str]) -> List[socket.socket]:
    """The listeners that were handed over, or one of our own."""
    try:
        listeners = [systemd.take(handed) for handed in systemd.inherited(environment, os.getpid())]
    except systemd.BadHandover as problem:
        raise Exit(exits.USAGE, str(problem)) from None
    ours = (*config.listen_options, *(["--reuse-port"] if config.reuse_port else []))
    if listeners and ours:
        raise Exit(exits.USAGE, f"{ours[0]}: given with LISTEN_FDS; allowed: only without inherited listeners")
    for listener in listeners:
        sockets.tune_inherited(listener, tuning_of(config))
    listeners = listeners or [_own_listener(config, resolver.addresses)]
    for listener in listeners:
        sockets.save_syns(listener)
    return listeners


def _own_listener(config: Config, upstreams: Sequence[Address]) -> socket.socket:
    address = Address(_family(config.bind), config.bind, config.port)
    _refuse_loop(address, upstreams)
    try:
        listener = sockets.listener(address, _BACKLOG, tuning_of(config), config.reuse_port)
    except OSError as error:
        hint = _HINTS.get(error.errno or 0, "")
        raise Exit(exits.CANNOT_BIND, f"can't listen on {address}: {error.strerror}{hint}") from None
    if config.reuse_port:
        reuseport.spread(listener)
    return listener


def _refuse_loop(listening: Address, upstreams: Sequence[Address]) -> None:
    """A proxy that is its own target would connect to itself until it has no room left."""
    for upstream in upstreams:
        same = upstream.ip == listening.ip or (listening.ip in ("0.0.0.0", "::") and _is_local(upstream))
        if listening.port == upstream.port and same:
            raise Exit(exits.USAGE, f"--target: given {str(upstream)!r}; allowed: any address but tsproxy's own")


def _is_local(address: Address) -> bool:
    with socket.socket(address.family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind(address._replace(port=0).sockaddr)
        except OSError:
            return False
    return True
