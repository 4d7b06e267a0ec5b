"""All that must be in place before the first client: addresses, policy, limits, listeners, user, shared memory.

Knows the order, and for each step that fails its exit code and one message. The policy needs the address families; bind(2)
may need root. Knows nothing of threads or processes: none is started here.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pwd
import socket
import time
from typing import Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from _tsproxy.cli import exits
from _tsproxy.cli.config import Config, Route
from _tsproxy.cli.exits import Exit
from _tsproxy.linux import limits, privileges, sockets, systemd, wakeup
from _tsproxy.linux.addresses import Address
from _tsproxy.policy import advice, witness
from _tsproxy.policy.evidence import FAMILY_NAMES, Answer, Evidence
from _tsproxy.policy.inspector import CHECK_TIMEOUT_S, PolicyCheck
from _tsproxy.policy.levers import Lever, Policy
from _tsproxy.policy.syn import Syn
from _tsproxy.policy.witness import NoWitness
from _tsproxy.proxy.clients import slots_for
from _tsproxy.stats.counters import SharedCounters, bytes_for
from _tsproxy.stats.records import RecordPipe
from _tsproxy.supervisor import listening, runners
from _tsproxy.supervisor.host_policy import HostPolicy
from _tsproxy.supervisor.listening import Ends
from _tsproxy.supervisor.resolver import Resolver, resolve_all, resolve_unless
from _tsproxy.supervisor.signals import Signals
from _tsproxy.supervisor.worker_args import RouteArgs, WorkerShared

# What getaddrinfo(3) can take for one name: 5 s, twice, for three servers and each of six domains to search (resolv.conf(5)).
LOOK_UP_S = 240.0
_MOST_NAMED = 8  # routes, or names, in a message


class ProvedRoute(NamedTuple):
    """A route whose targets have addresses, and whose policy holds."""

    route: Route
    resolver: Resolver
    sources: Tuple[Address, ...]
    policy: Policy
    lever: Lever
    for_rules: bool

    @property
    def ends(self) -> Ends:
        return Ends(self.resolver.addresses, self.sources)

    @property
    def client_slots(self) -> int:
        return slots_for(self.route.max_connections, self.route.max_connections_per_client)

    def args(self, number: int) -> RouteArgs:
        """For workers; their counters are not made yet."""
        return RouteArgs(number, self.route, self.sources, self.policy, self.lever, self.for_rules)


class PreparedRoute(NamedTuple):
    """A route that listens. `args` has the descriptor of `counters`."""

    proved: ProvedRoute
    listeners: List[socket.socket]
    args: RouteArgs
    counters: SharedCounters

    @property
    def route(self) -> Route:
        return self.proved.route

    @property
    def resolver(self) -> Resolver:
        return self.proved.resolver


class Prepared(NamedTuple):
    """What the supervisor starts with. `counters` and `records` are those whose descriptors are in `shared`.

    `asked` is what was asked for; the Config of `shared` has the runtime that this came to.
    """

    asked: Config
    shared: WorkerShared
    counters: SharedCounters
    records: RecordPipe
    routes: List[PreparedRoute]
    handed: Dict[str, List[socket.socket]]  # sockets that a service manager has handed over, by name
    host: HostPolicy
    evidence: Evidence
    nofile: int


def prepare(config: Config, environment: Mapping[str, str], notifier: systemd.Notifier, signals: Signals) -> Prepared:
    """Do all of it, and drop root. Exit with the code and message of the step that fails.

    The first look-up of names may take minutes: a signal that ends the program ends it, with Exit.
    """
    account = _account(config)
    resolvers = [resolver_of(route) for route in config.routes]
    _resolve_unless(resolvers, signals, notifier)
    host = HostPolicy()
    proved = prove(config, config.routes, resolvers, host)
    nofile = _raise_limits(config)
    runtime = _runtime(config)
    # Not before the end of the start do they listen: what may refuse to start comes before that.
    handed = listening.inherited(environment)
    sharer = account.pw_uid if account else None
    listeners = [_listeners(config, of_route, handed, sharer) for of_route in proved]
    refuse_circles(config, proved, listeners)
    _renounce(account)
    if account:
        runtime = _runtime(config)  # again: the user may have no right to read the Python that an interpreter starts from
        _require_interfaces(config)  # again: before Linux 5.7 the user has no right to
    evidence, records = Evidence.create(), RecordPipe.create()
    counters = SharedCounters.create(config.workers)
    routes = [
        with_counters(of_route, found, number, config.workers)
        for number, (of_route, found) in enumerate(zip(proved, listeners))
    ]
    shared = WorkerShared(
        config=config._replace(runtime=runtime),
        routes={number: of_route.args for number, of_route in enumerate(routes)},
        evidence_fd=evidence.fd,
        asked={family: wakeup.create() for family in FAMILY_NAMES},
        counters_fd=counters.fd,
        records_fd=records.writer,
        exited=wakeup.create(),
    )
    return Prepared(config, shared, counters, records, routes, handed, host, evidence, nofile)


def with_counters(
    proved: ProvedRoute,
    listeners: List[socket.socket],
    number: int,
    workers: int,
    encode: Callable[[RouteArgs], bytes] = lambda args: b"",
) -> PreparedRoute:
    """The route with new counters, which carry its encoded arguments to workers that run already. Refused without memory."""
    args = proved.args(number)
    counters = SharedCounters.create(workers, proved.client_slots, encode(args))
    return PreparedRoute(proved, listeners, args._replace(counters_fd=counters.fd), counters)


@contextlib.contextmanager
def naming(config: Config, *routes: Route) -> Iterator[None]:
    """Name the routes in the message of an Exit, where there is a file of them; what is about a key has its line."""
    try:
        yield
    except Exit as problem:
        if not config.routes_file:
            raise
        if not (config.places and problem.option):
            raise Exit(problem.code, f"{named(routes)} {problem}") from None
        said = str(problem).replace(f"--{problem.option}", problem.option)
        raise Exit(problem.code, f"{config.places.of(routes[0].name, problem.option)}: {named(routes)} {said}") from None


def named(routes: Sequence[Route]) -> str:
    """The names of some routes, for people; of many the first ones, and how many more there are."""
    first = " ".join(f"[{route.name}]" for route in routes[:_MOST_NAMED])
    return first if len(routes) <= _MOST_NAMED else f"{first} and {len(routes) - _MOST_NAMED} more:"


def prove(config: Config, routes: Sequence[Route], resolvers: Sequence[Resolver], host: HostPolicy) -> List[ProvedRoute]:
    """See to it that each route could be served. Exit with the code and message of the first thing that fails."""
    for route, resolver in zip(routes, resolvers):
        with naming(config, route):
            _require_answer(resolver)
    policies = [policy_of(config, route, resolver) for route, resolver in zip(routes, resolvers)]
    checks = host.check(policies)
    _require_policies(config, routes, policies, checks)
    proved: List[ProvedRoute] = []
    for route, resolver, policy, policy_check in zip(routes, resolvers, policies, checks):
        with naming(config, route):
            require_dscp(route, policy, policy_check)
            _require_interface(route)
            lever = policy_check.lever or Lever.NONE
            proved.append(ProvedRoute(route, resolver, _require_sources(route), policy, lever, host.for_rules))
    return proved


def policy_of(config: Config, route: Route, resolver: Resolver) -> Policy:
    """The policy asked for, for the families of the targets' addresses."""
    families = tuple(dict.fromkeys(address.family for address in resolver.addresses))
    return Policy(route.timestamps, config.static_timestamp, route.trust_host, families)


def _require_policies(
    config: Config, routes: Sequence[Route], policies: Sequence[Policy], checks: Sequence[PolicyCheck]
) -> None:
    """Exit 78, or 75, for the first route whose policy does not hold; it names all that have the same problem."""
    for policy, policy_check in zip(policies, checks):
        if policy_check.lever is None:
            alike = [one for one, found in zip(routes, checks) if (found.lever, found.problem) == (None, policy_check.problem)]
            with naming(config, *alike):
                _refuse(config, policy, policy_check)


def _refuse(config: Config, policy: Policy, policy_check: PolicyCheck) -> None:
    if policy_check.families and len(policy_check.of(Answer.ABSENT)) == len(policy_check.families):
        raise Exit(exits.NOT_YET, f"{policy_check.problem}; no target has another address")
    raise Exit(exits.POLICY, advice.unattainable(policy_check, policy, config))


def require_dscp(route: Route, policy: Policy, policy_check: PolicyCheck) -> None:
    """Exit 2 if rules would set another DSCP than --dscp: the witness SYNs had TAG_DSCP, and show what became of it."""
    if route.dscp is None or route.timestamps == "preserve":  # rules leave that one alone
        return
    syns = policy_check.syns or _witnessed(policy)
    found = {syn.dscp for syn in syns.values()} - {sockets.TAG_DSCP, route.dscp}
    if found:
        allowed = f"{min(found)}, which packet filter rules set here (generate nftables --dscp={route.dscp} prints others)"
        raise Exit(exits.USAGE, f"--dscp: given '{route.dscp}'; allowed: {allowed}", "dscp")


def _witnessed(policy: Policy) -> Dict[int, Syn]:
    """Witness SYNs where the policy asks for none, by family; where one can't be had nothing is known."""
    syns: Dict[int, Syn] = {}
    for family in policy.families:
        with contextlib.suppress(NoWitness):
            syns[family] = witness.capture_syn(family, time.monotonic() + CHECK_TIMEOUT_S)
    return syns


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


def _raise_limits(config: Config) -> int:
    """The descriptor limit in force; with a file of routes the highest that can be had. Exit 2 if it is too low."""
    needed = _descriptors_for(config, config.routes)
    got = limits.raise_nofile(limits.MOST if config.routes_file else needed)
    require_limits(config, config.routes, got)
    return got


def require_limits(config: Config, routes: Sequence[Route], nofile: int) -> None:
    """Exit 2 if RLIMIT_FSIZE, or a limit of so many descriptors, is too low for these routes.

    With a file of routes each may have its limit of connections as long as not all do at once: see shortage().
    """
    for route in routes:
        with naming(config, route):
            _require_file_size(config, route)
    needed = _descriptors_for(config, routes) if not config.routes_file else _descriptors(config, routes, len(routes))
    if nofile < needed:
        room = limits.connections_within(nofile, config.workers, len(routes))
        most = f"--max-connections: given {routes[0].max_connections}; allowed: up to {room}"
        raise Exit(
            exits.USAGE,
            f"{f'--routes: given {len(routes)} routes; allowed: fewer' if config.routes_file else most} with this process's "
            f"hard limit of {nofile} descriptors (raise it with ulimit -Hn {needed} or LimitNOFILE={needed})",
        )


def require_room(config: Config, routes: int, connections: int, nofile: int) -> None:
    """Exit 2 if a worker could not be told of so many routes, beside all connections that there are.

    A descriptor of each route goes to each worker process (SCM_RIGHTS): one without room for it would end, and its sessions.
    """
    needed = limits.descriptors_of_worker(connections, routes)
    if nofile < needed:
        allowed = f"fewer beside {connections} connections with this process's limit of {nofile} descriptors"
        given = f"--routes: given {len(config.routes)} routes"
        raise Exit(exits.USAGE, f"{given}; allowed: {allowed} (start with LimitNOFILE={needed})")


def shortage(config: Config, routes: Sequence[Route], nofile: int) -> str:
    """The warning for routes that together allow more connections than there are descriptors for; "" if they don't."""
    needed = _descriptors_for(config, routes)
    if nofile >= needed:
        return ""
    room = limits.connections_within(nofile, config.workers, len(routes))
    return (
        f"the routes allow {sum(route.max_connections for route in routes)} connections, and {nofile} descriptors suffice for "
        f"{room}: beyond that clients wait in the backlog (lower max-connections, or start with LimitNOFILE={needed})"
    )


def _descriptors_for(config: Config, routes: Sequence[Route]) -> int:
    return _descriptors(config, routes, sum(route.max_connections for route in routes))


def _descriptors(config: Config, routes: Sequence[Route], connections: int) -> int:
    return limits.descriptors_for(connections, config.workers, len(routes))


def _require_file_size(config: Config, route: Route) -> None:
    counters_bytes = bytes_for(config.workers, slots_for(route.max_connections, route.max_connections_per_client))
    if limits.largest_file() < counters_bytes:
        given = f"the limit on file sizes (RLIMIT_FSIZE, ulimit -f): given {limits.largest_file():.0f} bytes"
        raise Exit(exits.USAGE, f"{given}; allowed: at least {counters_bytes}, for the counters in shared memory")


def _listeners(
    config: Config, proved: ProvedRoute, handed: Mapping[str, List[socket.socket]], sharer: Optional[int]
) -> List[socket.socket]:
    """Those of one route. The route of the command line takes all that were handed over, whatever their names."""
    route = proved.route
    own = handed.get(route.name, []) if config.routes_file else [sock for socks in handed.values() for sock in socks]
    with naming(config, route):
        return listening.listeners(route, config.reuse_port, proved.ends, own, sharer=sharer)


def refuse_circles(config: Config, proved: Sequence[ProvedRoute], listeners: Sequence[Sequence[socket.socket]]) -> None:
    """Exit 2 for a target that is the listener of any route. Each is looked at once: of 200 routes there are 40,000 pairs.

    Also of the only one: a reload may keep its listener. The route of the command line was looked at as it began to listen.
    """
    own = listening.reachable(itertools.chain(*listeners)) if config.routes_file else {}
    for of_route in proved:
        with naming(config, of_route.route):
            listening.refuse_loops(own, of_route.ends)


def _require_interfaces(config: Config) -> None:
    for route in config.routes:
        with naming(config, route):
            _require_interface(route)


def _require_interface(route: Route) -> None:
    """Exit 75 if there is no interface of that name: as an address, it may come later. Exit 2 without the right to it."""
    if route.interface is None:
        return
    try:
        with socket.socket() as probe:
            sockets.bind_to_interface(probe, route.interface)
    except sockets.InterfaceUnavailable:
        given = f"--interface: given {route.interface!r}"
        raise Exit(exits.NOT_YET, f"{given}; allowed: an interface of this host (ip -brief link)", "interface") from None
    except PermissionError:
        needs = f"--interface={route.interface}: takes Linux 5.7 or later, or CAP_NET_RAW"
        raise Exit(exits.USAGE, needs, "interface") from None


def _require_sources(route: Route) -> Tuple[Address, ...]:
    """The addresses of --source. Exit 75 if one is not of this host: bind(2) finds out now, not with the first client.

    It may be a typing error, or an address that comes later: by DHCP, with a fail-over, or after IPv6 duplicate address
    detection. No errno distinguishes these, so it is the exit code for which a service manager tries again.
    """
    sources = _sources(route)
    for source in sources:
        if not listening.is_local(source, route.interface or ""):
            allowed = "an address of this host (ip -brief address)"
            raise Exit(exits.NOT_YET, f"--source: given {source.ip!r}; allowed: {allowed}", "source")
    return sources


def _sources(route: Route) -> Tuple[Address, ...]:
    return tuple(Address(listening.family_of(source), source, 0) for source in route.sources)


def resolve(route: Route) -> Resolver:
    """The targets' addresses. Exit 75 only if none of the targets can be resolved.

    Any answer of getaddrinfo(3), EAI_NONAME too, may change in a minute: the network is not up yet, the record not published,
    a negative answer cached (RFC 2308). No signal ends getaddrinfo(3), but in a thread Ctrl-C ends the wait for it.
    """
    resolver = resolver_of(route)
    resolve_all([resolver])
    return _require_answer(resolver)


def _resolve_unless(resolvers: Sequence[Resolver], signals: Signals, notifier: systemd.Notifier) -> None:
    """Exit 0 on a signal that ends the program."""
    names = [str(target) for resolver in resolvers for target in resolver.targets if not target.is_literal]
    if names:
        shown = ", ".join(names) if len(names) <= _MOST_NAMED else f"{len(names)} names"
        notifier.extend(LOOK_UP_S * len(names), STATUS=f"resolving {shown}")
    if not resolve_unless(resolvers, signals):
        raise Exit(exits.DRAINED, "ended by a signal while the targets' names were looked up; nothing was begun")


def resolver_of(route: Route) -> Resolver:
    """Which has resolved nothing so far."""
    return Resolver(route.targets, [source.family for source in _sources(route)])


def _require_answer(resolver: Resolver) -> Resolver:
    if not resolver.addresses:
        target, reason = resolver.failures[0]
        raise Exit(exits.NOT_YET, f"--target: given '{target}'; can't be resolved: {reason}", "target")
    return resolver
