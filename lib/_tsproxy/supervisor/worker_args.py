"""What a worker is told, and the one function that runs it, whatever started it.

A worker is written once, against descriptors and shared memory. WorkerArgs is plain data: it can be pickled into another
interpreter or process.
"""

from __future__ import annotations

import gc
import time
import traceback
from typing import Dict, NamedTuple, Tuple, Union

from _tsproxy.cli.config import Config
from _tsproxy.linux import cpus, sockets, wakeup
from _tsproxy.linux.addresses import Address
from _tsproxy.linux.needs import Refused
from _tsproxy.linux.sockets import Tuning
from _tsproxy.policy import gates, levers, syn
from _tsproxy.policy.evidence import Evidence
from _tsproxy.proxy import inbox
from _tsproxy.proxy.acceptor import Acceptor
from _tsproxy.proxy.clients import Clients
from _tsproxy.proxy.context import SessionSettings, WorkerContext
from _tsproxy.proxy.listener import Listener
from _tsproxy.proxy.worker import Worker
from _tsproxy.stats.counters import SharedCounters
from _tsproxy.stats.records import Notice, RecordWriter


class WorkerShared(NamedTuple):
    """What all workers are told alike."""

    config: Config
    sources: Tuple[Address, ...]
    policy: levers.Policy
    lever: levers.Lever
    evidence_fd: int
    asked: Dict[int, wakeup.Wakeup]  # by family; rung by a gate that needs fresh evidence
    for_rules: bool  # upstream sockets carry the mark that packet filter rules know


class WorkerArgs(NamedTuple):
    """All that a worker is told: its number, the shared part, and its ends of the shared memory and pipes."""

    number: int
    config: Config
    sources: Tuple[Address, ...]
    policy: levers.Policy
    lever: levers.Lever
    evidence_fd: int
    asked: Dict[int, wakeup.Wakeup]
    for_rules: bool
    ledger_fd: int
    inbox: Union[inbox.Ring, inbox.Channel]
    records_fd: int
    exited: wakeup.Wakeup  # rung by whoever started the worker, when it has ended
    listeners: Tuple[int, ...] = ()  # for a worker that accepts by itself; run_worker() closes them


def run_worker(args: WorkerArgs) -> None:
    """Build a worker and run it to its end. A bug that ends it is reported."""
    shared_counters = SharedCounters(args.ledger_fd)
    row = shared_counters.worker(args.number)
    records = RecordWriter(args.records_fd, row)
    try:
        worker = _build(args, row, records)
        _attach_listeners(worker, args, shared_counters, row)
        try:
            worker.run()
        finally:
            worker.close()
    except Exception as problem:
        why = problem.strerror if isinstance(problem, Refused) else traceback.format_exc()
        records.put(Notice(args.number, time.time_ns(), "error", f"worker {args.number} died: {why}"))
        raise SystemExit(1) from None


def _build(args: WorkerArgs, row: memoryview, records: RecordWriter) -> Worker:
    config = args.config
    if config.cpus:
        cpus.pin_this_thread(config.cpus[args.number])
    # Nothing on the hot path makes a cycle, so there is nothing to collect, and a collection is a pause.
    gc.collect()
    gc.freeze()
    gc.disable()
    gate = gates.gate_for(args.lever, args.policy, Evidence(args.evidence_fd), args.asked, for_rules=args.for_rules)
    context = WorkerContext(
        args.number, settings_of(config), gate, syn.offered_tsval, row, records, args.sources, config.buffer_size
    )
    return Worker(context, inbox.consumer(args.inbox, row), config.busy_poll_us)


def _attach_listeners(worker: Worker, args: WorkerArgs, shared_counters: SharedCounters, row: memoryview) -> None:
    """Let the worker accept by itself, if it has listeners; the listeners stay shut until an order says what upstreams."""
    if args.listeners:
        acceptor = Acceptor(
            args.config,
            shared_counters,
            row,
            Clients(shared_counters, 0, 0),
            upstreams=lambda: worker.upstreams,
            dispatch=worker.begin,
            log_ratelimited=lambda level, why: worker.context.log_ratelimited(level, f"accept {level}", why),
        )
        listeners = [sockets.inherit(fd) for fd in args.listeners]
        worker.listeners += [Listener(worker, worker.context, acceptor, listener) for listener in listeners]


def settings_of(config: Config) -> SessionSettings:
    """What a connection needs of the Config."""
    return SessionSettings(
        tuning=tuning_of(config),
        connect_timeout_ns=round(config.connect_timeout_s * 1e9),
        idle_timeout_ns=round(config.idle_timeout_s * 1e9),
        half_close_timeout_ns=round(config.half_close_timeout_s * 1e9),
        log_connections=config.connection_log,
        log_debug=config.log_level == "debug",
        zero_copy=config.zero_copy == "auto",
    )


def tuning_of(config: Config) -> Tuning:
    """The socket options of both legs."""
    return Tuning(config.keepalive_s, config.user_timeout_ms)
