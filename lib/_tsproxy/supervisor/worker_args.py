"""The arguments of a worker, and the one function that runs it, whatever started it.

A worker is written once, against descriptors and shared memory. WorkerArgs is plain data: it can be pickled into another
interpreter or process.
"""

from __future__ import annotations

import gc
import time
import traceback
from typing import Dict, NamedTuple, Set, Tuple, Union

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
from _tsproxy.proxy.context import SessionSettings, WorkerContext
from _tsproxy.proxy.inbox import Channel, Ring
from _tsproxy.proxy.listener import Listener
from _tsproxy.proxy.worker import Worker
from _tsproxy.stats.counters import SharedCounters
from _tsproxy.stats.records import Notice, RecordWriter


class WorkerShared(NamedTuple):
    """What is alike for all workers. The descriptors are the main process's to close."""

    config: Config
    sources: Tuple[Address, ...]
    policy: levers.Policy
    lever: levers.Lever
    evidence_fd: int
    asked: Dict[int, Wakeup]  # by family; rung by a gate that needs fresh evidence
    for_rules: bool  # upstream sockets carry the mark that packet filter rules know
    counters_fd: int
    records_fd: int
    exited: Wakeup  # rung by whatever started a worker, when it has exited

    @property
    def fds(self) -> Set[int]:
        """All descriptors in it."""
        wakeups = (self.exited, *self.asked.values())
        return {self.evidence_fd, self.counters_fd, self.records_fd, *(fd for wakeup in wakeups for fd in wakeup)}


class WorkerArgs(NamedTuple):
    """All that run_worker() needs."""

    number: int
    shared: WorkerShared
    inbox: Union[Ring, Channel]
    listeners: Tuple[int, ...] = ()  # of a worker that accepts by itself, which closes them


def run_worker(args: WorkerArgs) -> None:
    """Build a worker and run it until it ends. SystemExit(1) after a bug, whose traceback is a Notice then."""
    counters = SharedCounters(args.shared.counters_fd)
    row = counters.worker(args.number)
    records = RecordWriter(args.shared.records_fd, row)
    try:
        _prepare_thread(args)
        worker = Worker(_context(args, row, records), inbox.consumer(args.inbox, row))
        _attach_listeners(worker, args, counters, row)
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


def _context(args: WorkerArgs, row: memoryview, records: RecordWriter) -> WorkerContext:
    shared, config = args.shared, args.shared.config
    (route,) = config.routes
    gate = gates.gate_for(shared.lever, shared.policy, Evidence(shared.evidence_fd), shared.asked, for_rules=shared.for_rules)
    return WorkerContext(
        args.number,
        settings_of(config, route, 0),
        gate,
        syn.offered_tsval,
        row,
        records,
        shared.sources,
        route.buffer_size,
        spin_ns=config.busy_poll_us * 1000,
    )


def _attach_listeners(worker: Worker, args: WorkerArgs, counters: SharedCounters, row: memoryview) -> None:
    """Let the worker accept by itself, if it has listeners, from START_ACCEPTING on."""
    if args.listeners:
        context, (route,) = worker.context, args.shared.config.routes
        acceptor = Acceptor(
            route,
            counters,
            row,
            Clients(counters, 0, 0),
            dispatch=worker.dispatch,
            log_ratelimited=lambda level, why: context.log_ratelimited(level, f"accept {level}", why),
        )
        worker.listen(acceptor, [Listener(context.loop, acceptor, sockets.listener_from_fd(fd)) for fd in args.listeners])


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
