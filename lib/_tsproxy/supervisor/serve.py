"""The relay command: the main thread, from the `start` line to the `stop` line.

Knows the phases: start, relay, drain, kill, stop. Each but the last waits in the event loop, whose handlers and timers are
those of the modules that it puts together here. Knows nothing of how they work.
"""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from typing import Callable, List

from _tsproxy.cli import exits
from _tsproxy.cli.config import Config
from _tsproxy.linux import children, heap, inherited, systemd, uapi
from _tsproxy.linux.needs import needing
from _tsproxy.linux.systemd import Notifier
from _tsproxy.loop.event_loop import EventLoop
from _tsproxy.loop.poller import READ
from _tsproxy.policy import levers
from _tsproxy.proxy.acceptor import Acceptor
from _tsproxy.proxy.clients import Clients, slots_for
from _tsproxy.proxy.inbox import Command
from _tsproxy.proxy.listener import Listener
from _tsproxy.stats import metrics
from _tsproxy.stats.counters import ACCEPTOR_ROW, Counter
from _tsproxy.stats.reporter import Reporter
from _tsproxy.supervisor import listening, start_line, startup
from _tsproxy.supervisor.callbacks import CallTimer, OnReadable, ThreadsafeCalls
from _tsproxy.supervisor.drain import ListenerDrain
from _tsproxy.supervisor.drift import Drift
from _tsproxy.supervisor.monitor import EvidenceUpdate, PolicyMonitor
from _tsproxy.supervisor.signals import TERMINATING, Signals
from _tsproxy.supervisor.startup import Prepared
from _tsproxy.supervisor.watchdog import Watchdog
from _tsproxy.supervisor.worker_pool import Replacement, WorkerExit, WorkerPool

_START_S = 5.0  # for the workers to run: an interpreter takes half a second
_POLL_S = 0.001  # (and up to a tick of the timers) between two looks at shared memory, whose changes are no events
_STOP_ACCEPTING_S = 1.0  # a worker that has not stopped by then is stuck
_HANDSHAKE_S = 3.0  # a client of a shared port whose handshake takes longer is reset
_KILL_S = 5.0
_LAST_S = _KILL_S + 4.0  # that, the last lines, and a margin
_MOST_LISTENERS = uapi.SCM_MAX_FD - 2  # of a worker: its inbox and exit pipe go in the same message
_STDOUT = 1  # by number: sys.stdout is None when it was closed at the start


def serve(config: Config) -> int:
    """Relay until a signal ends it; the exit code. Exit with its code if it can't start."""
    inherited.close_all_but(systemd.inherited_fds(os.environ, os.getpid()))
    inherited.change_to_root()
    with needing("pipe2(2) or rt_sigaction(2)", "to handle signals"):
        signals = Signals()
    inherited.unblock_signals()
    notifier = Notifier(os.environ, os.getpid())
    prepared = startup.prepare(config, os.environ, notifier, signals)
    heap.prepare_fork()
    return Supervisor(prepared, notifier, signals).run()


class Supervisor:
    """Owns the loop, the worker pool, the reporter and the listeners."""

    def __init__(self, prepared: Prepared, notifier: Notifier, signals: Signals) -> None:
        self._prepared, self._config, self._signals = prepared, prepared.shared.config, signals
        (self._route,) = self._config.routes
        self._counters, self._resolver = prepared.counters, prepared.resolver
        self._started_at = time.monotonic()
        self._terminated_by: List[str] = []  # names of signals, in order
        self._worker_died = False  # and can't be replaced
        self._loop = EventLoop()
        ours, the_workers = ([], prepared.listeners) if _worker_accepts(prepared) else (prepared.listeners, [])
        self._pool = WorkerPool(self._loop, self, prepared.shared, self._counters, the_workers)
        self._reporter = self._make_reporter()
        self._acceptor = self._make_acceptor()
        self._listeners = [Listener(self._loop, self._acceptor, sock) for sock in ours]
        self._calls = ThreadsafeCalls()
        self._watchdog = Watchdog(self._loop, notifier, self._pool, self._status)
        self._drift = Drift(prepared.shared.lever, self._log_of_route, partial(self._pool.notify, Command.POLICY_FAILED))

    def _make_reporter(self) -> Reporter:
        return Reporter(
            _STDOUT,
            self._counters,
            self._prepared.records,
            level=self._config.log_level,
            interval_s=self._config.metrics_interval_s,
            witness_names=levers.WITNESS_NAMES,
            route_names=[route.name for route in self._config.routes],
        )

    def _make_acceptor(self) -> Acceptor:
        route = self._route
        slots = slots_for(route.max_connections, route.max_connections_per_client)
        acceptor = Acceptor(
            route,
            self._counters,
            self._counters.rows[ACCEPTOR_ROW],
            Clients(self._counters, slots, route.max_connections_per_client),
            dispatch=self._pool.dispatch,
            log_ratelimited=lambda level, why: self._log_of_route(level, level, why),
        )
        acceptor.upstreams = self._resolver.packed
        return acceptor

    # The phases

    def run(self) -> int:
        """All of them, in order; the exit code."""
        self._start()
        self._log_start()
        self._relay()
        self._drain()
        return self._stop(killed=self._kill())

    def _start(self) -> None:
        """Start threads and processes, and wait for the workers. OSError, with nothing left running, if one can't be had."""
        with needing("epoll_ctl(2) or epoll_wait(2)", "to wait for events"):
            self._calls.watch(self._loop)
            self._loop.poller.wait(0, 1)
        self._reporter.start()
        try:
            self._pool.start()
            if self._prepared.shared.lever in levers.MONITORED:
                self._start_monitors()
            self._resolver.follow(self._failed_connects, self._call(self._on_resolver))
        except OSError:
            self._kill()
            self._reporter.close()
            raise
        self._pool.ping()
        self._poll(_START_S, lambda: self._pool.all_answered() or self._signals.has_termination)

    def _start_monitors(self) -> None:
        """One for each address family, so that neither waits for the other."""
        prepared, log_bug = self._prepared, self._call(partial(self._log, "error", "error"))
        for family, asked in prepared.shared.asked.items():
            PolicyMonitor(
                family,
                prepared.inspector,
                prepared.shared.lever,
                prepared.evidence,
                asked,
                on_update=self._call(self._on_update),
                log_ratelimited=log_bug,
            ).start()

    def _log_start(self) -> None:
        """The `start` line, which says that clients are served, and what to warn of."""
        with needing("getsockname(2)", "for the addresses it listens on"):
            fields = start_line.fields(self._prepared, self._calls.kind)
        self._reporter.log("start", **fields)
        for warning in (listening.unbounded(self._route, self._prepared.listeners), self._resolver.excess):
            if warning:
                self._log_of_route("warning", "warning", warning)
        for target, reason in self._resolver.failures:
            self._log_of_route("warning", "warning", f"can't resolve {target}: {reason}; the other targets are in use")
        children.reap_others(self._pool.children)
        self._watchdog.notify(READY=1)

    def _relay(self) -> None:
        """Accept, or have the worker accept, until a signal or the exit of a worker that can't be replaced."""
        self._watchdog.start()
        self._loop.watch(self._signals.fd, READ, OnReadable(self._on_signals))
        self._on_signals()  # those that came earlier
        self._set_upstreams()
        for listener in self._listeners if not self._is_ending else []:
            listener.start_accepting()
        self._loop.run(lambda: self._is_ending)

    def _drain(self) -> None:
        """Close the listeners; let connections end, until the deadline or the next signal."""
        self._watchdog.extend(self._config.drain_timeout_s + _LAST_S, STOPPING=1)
        deadline = time.monotonic() + self._config.drain_timeout_s
        if self._pool.accepts:
            self._take_over_accepting(deadline)
        drain = ListenerDrain(self._loop, self._acceptor)
        for listener in self._prepared.listeners:
            until = min(deadline, time.monotonic() + _HANDSHAKE_S)
            drain.close(listener, self._config.reuse_port, partial(self._may_wait, until))
        self._acceptor.give_up()
        active = metrics.active(self._counters)
        self._reporter.log("drain", active_connections=active, drain_timeout_s=self._config.drain_timeout_s)
        self._pool.drain()
        self._run_for(deadline - time.monotonic(), lambda: not self._pool.is_alive or self._is_hurried)

    def _take_over_accepting(self, deadline: float) -> None:
        """Have the worker stop: clients who are in the backlog then are accepted here. Their ids go on from its last one."""
        self._pool.stop_accepting()
        self._poll(
            min(deadline - time.monotonic(), _STOP_ACCEPTING_S),
            lambda: self._pool.has_consumed_all or not self._pool.is_alive or self._is_hurried,
        )
        self._acceptor = self._make_acceptor()

    def _kill(self) -> int:
        """End the connections that are left, and wait for the workers; how many those were. The watchdog does not count now."""
        left = metrics.active(self._counters)
        self._watchdog.extend(_LAST_S)
        self._pool.kill()
        self._run_for(_KILL_S, lambda: not self._pool.is_alive)
        return left

    def _stop(self, killed: int) -> int:
        """The last lines, and the exit code."""
        self._reporter.metrics_now()
        self._reporter.log(
            "stop",
            reason="worker_died" if self._worker_died else self._terminated_by[0],
            drained=killed == 0,
            killed_connections=killed,
            uptime_s=round(time.monotonic() - self._started_at, 3),
        )
        self._reporter.close()
        return exits.FAILED if self._worker_died else exits.DRAINED

    # Waiting

    @property
    def _is_ending(self) -> bool:
        return bool(self._terminated_by) or self._worker_died

    @property
    def _is_hurried(self) -> bool:
        """Whether a second signal has come."""
        return len(self._terminated_by) > 1

    def _may_wait(self, deadline: float) -> bool:
        return not self._is_hurried and time.monotonic() < deadline

    def _run_for(self, timeout_s: float, until: Callable[[], bool]) -> None:
        self._loop.run_for(round(max(0.0, timeout_s) * 1e9), until)

    def _poll(self, timeout_s: float, until: Callable[[], bool]) -> None:
        """The same for what changes in shared memory, without an event."""
        timer = CallTimer(self._loop, lambda: timer.arm(_POLL_S))
        timer.arm(_POLL_S)
        self._run_for(timeout_s, until)
        timer.disarm()

    # Events

    def _on_signals(self) -> None:
        for number in self._signals.pop_all():
            if number in TERMINATING:
                self._terminated_by.append(number.name)
                self._stop_accepting()
            elif number == signal.SIGUSR1:
                self._reporter.metrics_now()
            else:
                children.reap_others(self._pool.children)

    def _stop_accepting(self) -> None:
        """At once: while listeners have events, run() may not get round to its condition. Clients wait in the backlog."""
        for listener in self._listeners:
            listener.stop_accepting()

    def _on_resolver(self, event: str, level: str, message: str) -> None:
        """Other addresses are in use before the line says so."""
        self._set_upstreams()
        self._log_of_route(event, level, message)

    def _set_upstreams(self) -> None:
        self._acceptor.upstreams = self._resolver.packed
        if self._pool.accepts and not self._is_ending:
            self._pool.start_accepting(self._resolver.packed)

    def _on_update(self, update: EvidenceUpdate) -> None:
        """Have clients that wait for the policy try again; update STATUS if something else is refused now."""
        before = self._drift.refused
        self._drift.on_update(update)
        if update.was_asked:
            self._pool.notify(Command.EVIDENCE)
        if self._drift.refused != before:
            self._watchdog.notify()

    def on_fork_server_exit(self, exit_status: str) -> None:
        """The workers that run go on: to end them would cost more connections than to wait for a restart."""
        about = "the connections go on, but a worker that dies has no replacement: restart when it suits"
        self._log("error", "error", f"the fork server, which starts workers, died ({exit_status}); {about}")
        children.reap_others(self._pool.children)  # those that waitid(2) gave behind it

    def on_worker_exit(self, worker_exit: WorkerExit) -> None:
        """Its connections are closed; those of other workers go on."""
        then = self._consequence(worker_exit.replacement) or "a replacement took its place"
        about = f"worker {worker_exit.number} died ({worker_exit.exit_status})"
        self._log("error", "error", f"{about}; {worker_exit.connections} connections closed; {then}")

    def on_restart(self, number: int, replacement: Replacement) -> None:
        """See PoolObserver."""
        then = self._consequence(replacement)
        level = "error" if then else "warning"
        self._log(level, level, f"worker {number}: {then or 'a replacement took its place after all'}")

    def _consequence(self, replacement: Replacement) -> str:
        """What follows if there is none; "" if there is one. A worker that can't be replaced ends the whole."""
        if replacement.obstacle:
            self._worker_died = True
            self._stop_accepting()
            return f"{replacement.obstacle}: draining, then ending"
        return f"no replacement yet, trying again: {replacement.delay}" if replacement.delay else ""

    # Called by others

    def _call(self, method: Callable[..., None]) -> Callable[..., None]:
        """The method, for other threads to call: it runs in this one."""
        return lambda *arguments: self._calls.call_soon(partial(method, *arguments))

    def _status(self) -> str:
        """What it does now, for `systemctl status`."""
        connections = f"{metrics.active(self._counters)} connections"
        if self._is_ending:
            return f"draining {connections}"
        if self._drift.refused:
            return f"refusing {self._drift.refused}, with {connections}: {self._drift.evidence}"
        return f"relaying {connections}"

    def _failed_connects(self) -> int:
        """How often an address could not be connected to, for the resolver's thread."""
        return self._counters.total(Counter.CONNECT_FAIL) + self._counters.total(Counter.POLICY_REFUSED)

    def _log(self, event: str, level: str, message: str) -> None:
        self._reporter.log(event, level, message=message)

    def _log_of_route(self, event: str, level: str, message: str) -> None:
        """Log what is about its connections, targets, policy or limits."""
        self._reporter.log(event, level, route=self._route.name, message=message)


def _worker_accepts(prepared: Prepared) -> bool:
    """With one worker no client need be dispatched: unless clients are counted here, or SCM_RIGHTS has not that much room."""
    config = prepared.shared.config
    (route,) = config.routes
    return config.workers == 1 and not route.max_connections_per_client and len(prepared.listeners) <= _MOST_LISTENERS
