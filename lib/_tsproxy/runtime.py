"""How a worker is started, and what it needs for that: plain numbers and the Config, nothing else.

A worker is written once, against descriptors and shared memory. What differs between the ways to start one stands
here: so far a thread of this interpreter.
"""

from __future__ import annotations

import threading
import time
import traceback
from typing import List, NamedTuple, Tuple

from _tsproxy.config import Config
from _tsproxy.dataplane import inbox
from _tsproxy.dataplane.workbench import Rules, Workbench
from _tsproxy.dataplane.worker import Worker
from _tsproxy.host import cpus, wakeup
from _tsproxy.host.addresses import Address
from _tsproxy.host.sockets import Tuning
from _tsproxy.telemetry.counters import Ledger
from _tsproxy.telemetry.records import Notice, RecordWriter
from _tsproxy.timestamps import policy, syn


class Plan(NamedTuple):
    """What all workers are told alike."""

    config: Config
    sources: Tuple[Address, ...]
    wanted: policy.Wanted
    lever: policy.Lever


class Spec(NamedTuple):
    """All that a worker is told: its number, the Plan, and its ends of the shared memory and pipes."""

    number: int
    config: Config
    sources: Tuple[Address, ...]
    wanted: policy.Wanted
    lever: policy.Lever
    ledger_fd: int
    ring: inbox.Ring
    records_fd: int
    gone: wakeup.Wakeup  # rung when the worker has ended


def run_worker(spec: Spec) -> None:
    """Build a worker and run it to its end; what ends it otherwise is reported. Rings `gone` in any case."""
    records = RecordWriter(spec.records_fd, Ledger(spec.ledger_fd).worker(spec.number))
    try:
        if spec.config.cpus:
            cpus.pin_this_thread(spec.config.cpus[spec.number])
        _build(spec, records).run()
    except Exception:
        records.put(Notice(spec.number, time.time_ns(), "error", f"worker {spec.number} died: {traceback.format_exc()}"))
        raise SystemExit(1) from None
    finally:
        spec.gone.ring()


def _build(spec: Spec, records: RecordWriter) -> Worker:
    config, row = spec.config, Ledger(spec.ledger_fd).worker(spec.number)
    gate = policy.gate_for(spec.lever, spec.wanted)
    bench = Workbench(spec.number, rules_of(config), gate, syn.offered_tsval, row, records, spec.sources, config.buffer_size)
    return Worker(bench, inbox.Consumer(spec.ring), config.busy_poll_us)


def rules_of(config: Config) -> Rules:
    """What a connection needs of the Config."""
    return Rules(
        tuning=tuning_of(config),
        connect_timeout_ns=round(config.connect_timeout_s * 1e9),
        idle_timeout_ns=round(config.idle_timeout_s * 1e9),
        half_close_timeout_ns=round(config.half_close_timeout_s * 1e9),
        log_connections=config.connection_log,
        log_debug=config.log_level == "debug",
    )


def tuning_of(config: Config) -> Tuning:
    """The socket options of both legs."""
    return Tuning(config.keepalive_s, config.user_timeout_ms)


class Crew:
    """All workers, as the acceptor sees them: a round-robin of inboxes, and whether they are still there."""

    def __init__(self, plan: Plan, ledger: Ledger, records_fd: int) -> None:
        self.gone = wakeup.create()
        rings = [inbox.create() for _ in range(plan.config.workers)]
        specs = [Spec(number, *plan, ledger.fd, ring, records_fd, self.gone) for number, ring in enumerate(rings)]
        self._inboxes = [inbox.Producer(ring) for ring in rings]
        self._threads = [
            threading.Thread(target=run_worker, args=(spec,), name=f"worker-{spec.number}", daemon=True) for spec in specs
        ]
        self._next = 0

    def start(self) -> None:
        """Start them all."""
        for thread in self._threads:
            thread.start()

    def hand(self, entry: inbox.Entry) -> bool:
        """Give an entry to the next worker that is there and has room; False if none has."""
        for _ in self._inboxes:
            turn, self._next = self._next, (self._next + 1) % len(self._inboxes)
            if self._threads[turn].is_alive() and self._inboxes[turn].put(entry):
                return True
        return False

    def order(self, kind: int) -> None:
        """Send an order to all."""
        for box in self._inboxes:
            box.put(inbox.Entry(kind))

    def ping(self) -> None:
        """Put a do-nothing order into each inbox that is empty, for all_answered() to ask about."""
        for box in self._inboxes:
            if box.is_empty:
                box.put(inbox.Entry(inbox.PING))

    def all_answered(self) -> bool:
        """Whether each worker has emptied its inbox since the last ping."""
        return all(box.is_empty for box in self._inboxes)

    @property
    def alive(self) -> List[int]:
        """The workers that have not ended."""
        return [index for index, thread in enumerate(self._threads) if thread.is_alive()]

    def wait(self, patience_s: float) -> bool:
        """Wait until all have ended; False if some have not in that time."""
        deadline = time.monotonic() + patience_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not self.alive
