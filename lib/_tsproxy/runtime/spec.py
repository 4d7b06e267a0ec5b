"""What a worker is told, and the one function that runs it, whatever started it.

A worker is written once, against descriptors and shared memory. A Spec is plain data: it can be pickled into another
interpreter or process.
"""

from __future__ import annotations

import gc
import time
import traceback
from typing import Dict, NamedTuple, Tuple, Union

from _tsproxy.config import Config
from _tsproxy.dataplane import inbox
from _tsproxy.dataplane.acceptor import Acceptor
from _tsproxy.dataplane.clients import Clients
from _tsproxy.dataplane.door import Door
from _tsproxy.dataplane.workbench import Rules, Workbench
from _tsproxy.dataplane.worker import Worker
from _tsproxy.host import cpus, sockets, wakeup
from _tsproxy.host.addresses import Address
from _tsproxy.host.needs import Refused
from _tsproxy.host.sockets import Tuning
from _tsproxy.telemetry.counters import Ledger
from _tsproxy.telemetry.records import Notice, RecordWriter
from _tsproxy.timestamps import gates, policy, syn
from _tsproxy.timestamps.evidence import Evidence


class Plan(NamedTuple):
    """What all workers are told alike."""

    config: Config
    sources: Tuple[Address, ...]
    wanted: policy.Wanted
    lever: policy.Lever
    evidence_fd: int
    asked: Dict[int, wakeup.Wakeup]  # by family; rung by a gate that needs fresh evidence
    for_rules: bool  # upstream sockets carry the mark that packet filter rules know


class Spec(NamedTuple):
    """All that a worker is told: its number, the Plan, and its ends of the shared memory and pipes."""

    number: int
    config: Config
    sources: Tuple[Address, ...]
    wanted: policy.Wanted
    lever: policy.Lever
    evidence_fd: int
    asked: Dict[int, wakeup.Wakeup]
    for_rules: bool
    ledger_fd: int
    inbox: Union[inbox.Ring, inbox.Channel]
    records_fd: int
    gone: wakeup.Wakeup  # rung by whoever started the worker, when it has ended
    listeners: Tuple[int, ...] = ()  # for a worker that accepts by itself; run_worker() closes them


def run_worker(spec: Spec) -> None:
    """Build a worker and run it to its end. A bug that ends it is reported."""
    ledger = Ledger(spec.ledger_fd)
    row = ledger.worker(spec.number)
    records = RecordWriter(spec.records_fd, row)
    try:
        worker = _build(spec, row, records)
        _hang_doors(worker, spec, ledger, row)
        try:
            worker.run()
        finally:
            worker.close()
    except Exception as problem:
        why = problem.strerror if isinstance(problem, Refused) else traceback.format_exc()
        records.put(Notice(spec.number, time.time_ns(), "error", f"worker {spec.number} died: {why}"))
        raise SystemExit(1) from None


def _build(spec: Spec, row: memoryview, records: RecordWriter) -> Worker:
    config = spec.config
    if config.cpus:
        cpus.pin_this_thread(config.cpus[spec.number])
    # Nothing on the hot path makes a cycle, so there is nothing to collect, and a collection is a pause.
    gc.collect()
    gc.freeze()
    gc.disable()
    gate = gates.gate_for(spec.lever, spec.wanted, Evidence(spec.evidence_fd), spec.asked, for_rules=spec.for_rules)
    bench = Workbench(spec.number, rules_of(config), gate, syn.offered_tsval, row, records, spec.sources, config.buffer_size)
    return Worker(bench, inbox.consumer(spec.inbox, row), config.busy_poll_us)


def _hang_doors(worker: Worker, spec: Spec, ledger: Ledger, row: memoryview) -> None:
    """Let the worker accept by itself, if it has listeners; the doors stay shut until an order says what upstreams."""
    if spec.listeners:
        acceptor = Acceptor(
            spec.config,
            ledger,
            row,
            Clients(ledger, 0, 0),
            upstreams=lambda: worker.upstreams,
            hand=worker.begin,
            complain=lambda level, why: worker.bench.complain(level, f"accept {level}", why),
        )
        listeners = [sockets.inherit(fd) for fd in spec.listeners]
        worker.doors += [Door(worker, worker.bench, acceptor, listener) for listener in listeners]


def rules_of(config: Config) -> Rules:
    """What a connection needs of the Config."""
    return Rules(
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
