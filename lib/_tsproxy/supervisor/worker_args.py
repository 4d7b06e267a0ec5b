"""The arguments of a worker, and the one function that runs it, whatever started it.

A worker is written once, against descriptors and shared memory. WorkerArgs is plain data: it can be pickled into another
interpreter or process.
"""

from __future__ import annotations

import functools
import gc
import itertools
import os
import time
import traceback
from typing import Dict, Iterable, NamedTuple, Set, Tuple, Union

from _tsproxy.cli.config import Config, Route
from _tsproxy.linux import cpus, sockets
from _tsproxy.linux.addresses import Address
from _tsproxy.linux.needs import Refused
from _tsproxy.linux.sockets import Egress, Tuning
from _tsproxy.linux.wakeup import Wakeup
from _tsproxy.policy import gates, levers, syn
from _tsproxy.policy.evidence import Evidence
from _tsproxy.proxy import inbox
from _tsproxy.proxy.acceptor import Acceptor
from _tsproxy.proxy.clients import Clients
from _tsproxy.proxy.context import RouteContext, SessionSettings, WorkerContext
from _tsproxy.proxy.gate import PolicyGate
from _tsproxy.proxy.inbox import Channel, Ring
from _tsproxy.proxy.listener import Listener
from _tsproxy.proxy.worker import Worker
from _tsproxy.stats import metrics
from _tsproxy.stats.counters import Counter, SharedCounters, note_in
from _tsproxy.stats.records import Notice, RecordWriter


class RouteArgs(NamedTuple):
    """All that a worker needs for a route. Plain data: it goes with the route's counters to workers that run already."""

    number: int
    route: Route
    sources: Tuple[Address, ...]
    policy: levers.Policy
    lever: levers.Lever
    for_rules: bool  # upstream sockets carry the mark that packet filter rules know
    counters_fd: int = -1


class WorkerShared(NamedTuple):
    """What is alike for all workers. The descriptors are the main process's to close."""

    config: Config
    routes: Dict[int, RouteArgs]  # by number; those of now, for a worker that starts
    evidence_fd: int
    asked: Dict[int, Wakeup]  # by family; rung by a gate that needs fresh evidence
    counters_fd: int  # of the process
    records_fd: int
    exited: Wakeup  # rung by whatever started a worker, when it has exited

    @property
    def fds(self) -> Set[int]:
        """All descriptors in it."""
        wakeups = (self.exited, *self.asked.values())
        of_routes = {args.counters_fd for args in self.routes.values()}
        return {self.evidence_fd, self.counters_fd, self.records_fd, *of_routes, *(fd for wakeup in wakeups for fd in wakeup)}

    def add_route(self, number: int, fd: int) -> None:
        """A route whose arguments are the note in its counters. Twice is once."""
        if number not in self.routes:
            import pickle  # 0.3 MiB that only a reload needs

            args: RouteArgs = pickle.loads(note_in(fd))  # noqa: S301 -- our own main process's
            self.routes[number] = args._replace(counters_fd=fd)


class WorkerArgs(NamedTuple):
    """All that run_worker() needs."""

    number: int
    shared: WorkerShared
    inbox: Union[Ring, Channel]
    listeners: Tuple[int, ...] = ()  # of a worker that accepts by itself, which closes them


def run_worker(args: WorkerArgs) -> None:
    """Build a worker and run it until it ends. SystemExit(1) after a bug, whose traceback is a Notice then."""
    row = SharedCounters(args.shared.counters_fd).worker(args.number)
    records = RecordWriter(args.shared.records_fd, row)
    try:
        _prepare_thread(args)
        context = WorkerContext(args.number, row, records, spin_ns=args.shared.config.busy_poll_us * 1000)
        routes = RouteContexts(context, args)
        worker = Worker(context, routes, inbox.consumer(args.inbox, row))
        _attach_listeners(worker, routes, args)
        try:
            worker.run()
        finally:
            worker.close()
    except Exception as problem:
        why = problem.strerror if isinstance(problem, Refused) else traceback.format_exc()
        records.put(Notice(args.number, time.time_ns(), "error", f"worker {args.number} died: {why}"))
        raise SystemExit(1) from None


def _prepare_thread(args: WorkerArgs) -> None:
    """Pin it, and switch the collector off: nothing on the hot path makes a cycle, and a collection is a pause."""
    if args.shared.config.cpus:
        cpus.pin_this_thread(args.shared.config.cpus[args.number])
    gc.freeze()  # without a collection before: what it would find is less than the pages that it would write to
    gc.disable()


class RouteContexts:
    """See worker.Routes. A route without clients has no context, and so no buffer and no memory of counters here."""

    def __init__(self, worker: WorkerContext, args: WorkerArgs) -> None:
        """Descriptors of routes are this worker's own where it is a process."""
        self._worker, self._owns_fds = worker, isinstance(args.inbox, Channel)
        self._shared = args.shared._replace(routes=dict(args.shared.routes))
        self._made: Dict[int, RouteContext] = {}
        self._evidence = Evidence(args.shared.evidence_fd)
        self._gates: Dict[Tuple[levers.Policy, levers.Lever, bool], PolicyGate] = {}
        for of_route in self._shared.routes.values():
            self._gate(of_route)

    def of(self, number: int) -> RouteContext:
        """See worker.Routes."""
        return self._made.get(number) or self._make(self._shared.routes[number])

    def in_use(self) -> Iterable[RouteContext]:
        """See worker.Routes."""
        return self._made.values()

    def add(self, number: int, fd: int) -> None:
        """See worker.Routes."""
        self._shared.add_route(number, fd)
        self._gate(self._shared.routes[number])
        if self._owns_fds and self._shared.routes[number].counters_fd != fd:
            os.close(fd)  # it started with the route, and has this message from before

    def remove(self, number: int) -> None:
        """See worker.Routes."""
        self._made.pop(number, None)
        args = self._shared.routes.pop(number, None)
        if args and self._owns_fds:
            os.close(args.counters_fd)

    def _make(self, args: RouteArgs) -> RouteContext:
        context = RouteContext(
            self._worker,
            settings_of(self._shared.config, args.route, args.number),
            self._gate(args),
            syn.offered_tsval,
            SharedCounters(args.counters_fd).worker(self._worker.number),
            args.sources,
            args.route.buffer_size,
        )
        self._made[args.number] = context
        return context

    def _gate(self, args: RouteArgs) -> PolicyGate:
        """One for all routes that are alike to it."""
        key = args.policy._replace(families=()), args.lever, args.for_rules
        if key not in self._gates:
            policy, lever, for_rules = key
            self._gates[key] = gates.gate_for(lever, policy, self._evidence, self._shared.asked, for_rules=for_rules)
        return self._gates[key]


def _attach_listeners(worker: Worker, routes: RouteContexts, args: WorkerArgs) -> None:
    """Let the worker accept by itself, if it has listeners, from START_ACCEPTING on: for the one route that there is."""
    if args.listeners:
        ((number, of_route),) = args.shared.routes.items()
        context, counters = routes.of(number), SharedCounters(of_route.counters_fd)
        acceptor = Acceptor(
            of_route.route,
            context.counters,
            Clients(counters, 0, 0),
            number=number,
            ids=itertools.count(counters.total(Counter.ACCEPTED) + 1),
            active=functools.partial(metrics.active, counters),
            dispatch=worker.dispatch,
            log_ratelimited=lambda level, why: context.log_ratelimited(level, f"accept {level}", why),
        )
        loop = worker.context.loop
        worker.listen(acceptor, [Listener(loop, acceptor, sockets.listener_from_fd(fd)) for fd in args.listeners])


def settings_of(config: Config, route: Route, number: int) -> SessionSettings:
    """The part of the options that a session of the route with this number needs."""
    return SessionSettings(
        tuning=tuning_of(route),
        connect_timeout_ns=round(route.connect_timeout_s * 1e9),
        idle_timeout_ns=round(route.idle_timeout_s * 1e9),
        half_close_timeout_ns=round(route.half_close_timeout_s * 1e9),
        log_connections=config.connection_log,
        log_debug=config.log_level == "debug",
        zero_copy=route.zero_copy == "auto",
        egress=egress_of(route),
        route=number,
    )


def tuning_of(route: Route) -> Tuning:
    """The socket options of both legs."""
    return Tuning(route.keepalive_s, route.user_timeout_ms)


def egress_of(route: Route) -> Egress:
    """The socket options of the upstream leg alone."""
    return Egress(route.interface or "", route.dscp or 0)
