"""The relay command: the main thread, from the `start` line to the `stop` line.

Knows the phases: start, relay, drain, kill, stop. Each but the last waits in the event loop, whose handlers and timers are
those of the modules that it puts together here. Knows nothing of how they work.
"""

from __future__ import annotations

import importlib
import itertools
import os
import signal
import time
from functools import partial
from typing import TYPE_CHECKING, Callable, List, Sequence, Tuple

from _tsproxy.cli import exits
from _tsproxy.cli.config import Config
from _tsproxy.cli.exits import Exit
from _tsproxy.linux import children, heap, inherited, limits, systemd, uapi
from _tsproxy.linux.needs import needing
from _tsproxy.linux.systemd import Notifier
from _tsproxy.loop.event_loop import EventLoop
from _tsproxy.loop.poller import READ
from _tsproxy.policy import levers
from _tsproxy.policy.evidence import FAMILY_NAMES
from _tsproxy.proxy.acceptor import Acceptor
from _tsproxy.proxy.inbox import Command
from _tsproxy.stats.counters import Counter
from _tsproxy.stats.reporter import Reporter
from _tsproxy.supervisor import listening, start_line, startup
from _tsproxy.supervisor.callbacks import CallTimer, OnReadable, ThreadsafeCalls
from _tsproxy.supervisor.drain import HANDSHAKE_S, ListenerDrain
from _tsproxy.supervisor.drift import Drift
from _tsproxy.supervisor.monitor import EvidenceUpdate
from _tsproxy.supervisor.route_table import RouteTable, ServedRoute
from _tsproxy.supervisor.signals import Signals
from _tsproxy.supervisor.startup import Prepared
from _tsproxy.supervisor.watchdog import Watchdog
from _tsproxy.supervisor.worker_pool import Replacement, WorkerExit, WorkerPool

if TYPE_CHECKING:
    from _tsproxy.supervisor.reload import Done, Reload

_START_S = 5.0  # for the workers to run: an interpreter takes half a second
_POLL_S = 0.001  # (and up to a tick of the timers) between two looks at shared memory, whose changes are no events
_STOP_ACCEPTING_S = 1.0  # a worker that has not stopped by then is stuck
_KILL_S = 5.0
_LAST_S = _KILL_S + 4.0  # that, the last lines, and a margin
_MOST_LISTENERS = uapi.SCM_MAX_FD - 2  # of a worker: its inbox and exit pipe go in the same message
_STDOUT = 1


def serve(config: Config) -> int:
    """Relay until a signal ends it; the exit code. Exit with its code if it can't start."""
    inherited.close_all_but(systemd.inherited_fds(os.environ, os.getpid()))
    inherited.change_to_root()
    with needing("pipe2(2) or rt_sigaction(2)", "to handle signals"):
        signals = Signals(reloads=config.routes_file is not None)
    inherited.unblock_signals()
    notifier = Notifier(os.environ, os.getpid())
    if config.routes_file:
        importlib.import_module("_tsproxy.supervisor.reload")  # now, while this user may read it, and before workers are forked
    prepared = startup.prepare(config, os.environ, notifier, signals)
    heap.prepare_fork()
    return Supervisor(prepared, notifier, signals).run()


class Supervisor:
    """Owns the loop, the worker pool, the reporter and the listeners."""

    def __init__(self, prepared: Prepared, notifier: Notifier, signals: Signals) -> None:
        self._prepared, self._config, self._signals = prepared, prepared.shared.config, signals
        self._terminated_by: List[str] = []  # names of signals, in order
        self._worker_died = False  # and can't be replaced
        self._lost = 0  # connections of workers that died during the drain
        self._loop = EventLoop()
        self._pool = self._make_pool()
        self._reporter = Reporter(
            _STDOUT,
            prepared.counters,
            prepared.records,
            level=self._config.log_level,
            interval_s=self._config.metrics_interval_s,
            witness_names=levers.WITNESS_NAMES,
            many=self._config.routes_file is not None,
        )
        self._calls = ThreadsafeCalls()
        room_beside = partial(limits.connections_within, prepared.nofile, self._config.workers)
        self._listener_drain = drain = ListenerDrain(self._loop, self._config.reuse_port)
        self._table = RouteTable(self._loop, self._pool, self._reporter, drain, self._log_of, self._call, room_beside)
        for of_route in prepared.routes:
            self._table.add(of_route)
        self._notifier = notifier
        self._watchdog = Watchdog(self._loop, notifier, self._pool, self._status)
        self._drift = Drift(self._concerned, self._log_of_policy, partial(self._pool.notify, Command.POLICY_FAILED))
        self._reload = self._make_reload() if self._config.routes_file else None

    def _make_reload(self) -> Reload:
        from _tsproxy.supervisor.reload import Reload  # with what reads the file: a route of the command line needs neither

        prepared = self._prepared
        return Reload(
            prepared.asked,
            self._table,
            self._pool,
            prepared.host,
            prepared.handed,
            prepared.nofile,
            self._listener_drain,
            call_soon=self._calls.call_soon,
            on_done=self._on_reloaded,
        )

    def _make_pool(self) -> WorkerPool:
        prepared = self._prepared
        of_routes = {of_route.args.number: of_route.counters for of_route in prepared.routes}
        listeners = prepared.routes[0].listeners if _worker_accepts(prepared) else []
        return WorkerPool(self._loop, self, prepared.shared, prepared.counters, of_routes, listeners)

    # The phases

    def run(self) -> int:
        """All of them, in order; the exit code."""
        self._start()
        self._log_start()
        self._relay()
        self._drain()
        return self._stop(killed=self._kill())

    def _start(self) -> None:
        """Start threads and processes, wait for the workers, and listen. Exit or OSError, with nothing left running, if not."""
        with needing("epoll_ctl(2) or epoll_wait(2)", "to wait for events"):
            self._calls.watch(self._loop)
            self._loop.poller.wait(0, 1)
        self._reporter.start()
        try:
            self._pool.start()
            self._start_monitors()
            for served in self._table:
                self._table.follow(served)
            self._pool.ping()
            self._poll(_START_S, lambda: self._pool.all_answered() or self._signals.has_termination)
            self._listen()
        except (Exit, OSError):
            self._kill()
            self._reporter.close()
            raise

    def _listen(self) -> None:
        """Last: a start that fails must not cost another instance the clients that would have come here."""
        for served in self._table:
            with startup.naming(self._config, served.prepared.route):
                listening.listen(served.prepared.listeners, self._config.reuse_port)

    def _start_monitors(self) -> None:
        """Where a policy is one that has to be checked, and none runs yet."""
        self._prepared.host.monitor(
            self._prepared.evidence,
            self._prepared.shared.asked,
            on_update=self._call(self._on_update),
            log_ratelimited=self._call(partial(self._log, "error", "error")),
        )

    def _log_start(self) -> None:
        """The `start` line, which says that clients are served, a line for each route, and what to warn of."""
        with needing("getsockname(2)", "for the addresses it listens on"):
            fields = start_line.fields(self._prepared, self._calls.kind)
            self._reporter.log("start", **fields)
            self._log_routes(list(self._table))
        self._prepared.routes.clear()  # so that one which goes takes its memory along
        children.reap_others(self._pool.children)
        self._watchdog.notify(READY=1)

    def _log_routes(self, several: Sequence[ServedRoute]) -> None:
        """With a file of routes, their `route` lines; and what to warn of."""
        for served in several if self._config.routes_file else ():
            self._reporter.log("route", **start_line.of_route(self._config, served.prepared))
        routes = [served.prepared.route for served in self._table]
        short = startup.shortage(self._config, routes, self._prepared.nofile)
        if short and several:
            self._log("warning", "warning", short)
        for served in several:
            resolver = served.prepared.resolver
            unbounded = listening.unbounded(served.prepared.route, served.prepared.listeners)
            for warning in [*([unbounded] if unbounded else []), *resolver.warnings]:
                self._table.log(served, "warning", "warning", warning)
            for target, reason in resolver.failures:
                about = f"can't resolve {target}: {reason}; the other targets are in use"
                self._table.log(served, "warning", "warning", about)

    def _relay(self) -> None:
        """Accept, or have the worker accept, until a signal or the exit of a worker that can't be replaced."""
        self._watchdog.start()
        self._loop.watch(self._signals.fd, READ, OnReadable(self._on_signals))
        self._on_signals()  # those that came earlier
        if not self._is_ending:
            self._table.start_accepting()
        self._loop.run(lambda: self._is_ending)

    def _drain(self) -> None:
        """Close the listeners; let connections end, until the deadline or the next signal."""
        self._watchdog.extend(self._config.drain_timeout_s + _LAST_S, STOPPING=1)
        deadline = time.monotonic() + self._config.drain_timeout_s
        if self._reload:
            self._reload.stop()
        if self._pool.accepts:
            self._stop_worker_accepting(deadline)
        self._close_listeners(deadline)
        active = self._table.active
        self._reporter.log("drain", active_connections=active, drain_timeout_s=self._config.drain_timeout_s)
        self._pool.drain()
        self._run_for(deadline - time.monotonic(), lambda: not self._pool.is_alive or self._is_hurried)
        self._pool.reap_all()

    def _stop_worker_accepting(self, deadline: float) -> None:
        """Have the worker stop: clients who are in the backlog then are accepted here."""
        self._pool.stop_accepting()
        self._poll(
            min(deadline - time.monotonic(), _STOP_ACCEPTING_S),
            lambda: self._pool.has_consumed_all or not self._pool.is_alive or self._is_hurried,
        )

    def _close_listeners(self, deadline: float) -> None:
        """Accept who is in the backlogs, first."""
        drain, acceptors = self._listener_drain, [self._last_acceptor(one) for one in self._table]
        deadline = min(deadline, time.monotonic() + HANDSHAKE_S)
        for served, acceptor in zip(self._table, acceptors):
            for listener in served.prepared.listeners:
                drain.add(listener, acceptor, deadline)
        drain.close_all(lambda: self._is_hurried)
        for acceptor in acceptors:
            acceptor.give_up()

    def _last_acceptor(self, served: ServedRoute) -> Acceptor:
        """Ids go on from the last one of a worker that accepted until now."""
        if not self._pool.accepts:
            return served.acceptor
        return self._table.acceptor_of(served.prepared, itertools.count(served.counters.total(Counter.ACCEPTED) + 1))

    def _kill(self) -> int:
        """End the connections that are left, and wait for the workers. The watchdog does not count now.

        How many those were, with those of workers that died during the drain.
        """
        left = self._table.active + self._lost
        self._watchdog.extend(_LAST_S)
        self._pool.kill()
        self._run_for(_KILL_S, lambda: not self._pool.is_alive)
        self._pool.end()
        return left

    def _stop(self, killed: int) -> int:
        """The last lines, and the exit code."""
        self._reporter.metrics_now()
        reason = "worker_died" if self._worker_died else self._terminated_by[0]
        self._reporter.close(reason=reason, drained=killed == 0, killed_connections=killed)
        return exits.FAILED if self._worker_died else exits.DRAINED

    # Waiting

    @property
    def _is_ending(self) -> bool:
        return bool(self._terminated_by) or self._worker_died

    @property
    def _is_hurried(self) -> bool:
        """Whether a second signal has come."""
        return len(self._terminated_by) > 1

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
            if number in self._signals.terminating:
                self._terminated_by.append(number.name)
                self._table.stop_accepting()
            elif number == signal.SIGHUP:
                self._begin_reload()
            elif number == signal.SIGUSR1:
                self._reporter.metrics_now()
            else:
                children.reap_others(self._pool.children)

    def _begin_reload(self) -> None:
        """Not once the end has come: the routes are being closed."""
        if self._reload and not self._is_ending:
            self._notifier.extend(startup.LOOK_UP_S, RELOADING=1, MONOTONIC_USEC=time.monotonic_ns() // 1000)
            self._reload.request()

    def _on_reloaded(self, done: Done) -> None:
        """Say what came of it. New routes' policies may be the first to be monitored."""
        if done.problem:
            self._log("reload", "error", done.problem)
        else:
            self._reporter.log("reload", **done.counts)
            self._log_routes(done.served)
            try:
                self._start_monitors()
            except OSError as problem:  # then their gates have no evidence, and no client is connected
                self._log("error", "error", str(problem.strerror))
        self._watchdog.notify(READY=1)

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
        if worker_exit.replacement is None:
            self._lost += worker_exit.connections
            then = "no replacement while draining"
        else:
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
            self._table.stop_accepting()
            return f"{replacement.obstacle}: draining, then ending"
        return f"no replacement yet, trying again: {replacement.delay}" if replacement.delay else ""

    # Called by others

    def _call(self, method: Callable[..., None]) -> Callable[..., None]:
        """The method, for other threads to call: it runs in this one."""
        return lambda *arguments: self._calls.call_soon(partial(method, *arguments))

    def _status(self) -> str:
        """What it does now, for `systemctl status`. To systemd a reload has no outcome, so a refused one stands here."""
        connections = f"{self._table.active} connections"
        if self._is_ending:
            return f"draining {connections}"
        refusal = f"; {self._reload.refusal}" if self._reload and self._reload.refusal else ""
        if self._drift.refused:
            return f"refusing {self._drift.refused}, with {connections}: {self._drift.evidence}{refusal}"
        return f"relaying {connections}{refusal}"

    def _log(self, event: str, level: str, message: str) -> None:
        self._reporter.log(event, level, message=message)

    def _log_of(self, route: str, event: str, level: str, message: str) -> None:
        """Log what is about a route's connections, targets, policy or limits."""
        self._reporter.log(event, level, route=route, message=message)

    def _concerned(self, family: int) -> List[str]:
        """The routes that a policy over an address family concerns."""
        return [served.name for served in self._table if served.is_monitored and served.uses(family)]

    def _log_of_policy(self, route: str, event: str, level: str, message: str) -> None:
        """Log what is about a route's policy, if it is served still, and has one that is checked."""
        served = self._table.served.get(route)
        if served and served.is_monitored:
            self._table.log(served, event, *self._as_of(served, event, level, message))

    def _as_of(self, served: ServedRoute, event: str, level: str, message: str) -> Tuple[str, str]:
        """Level and message: a drift is over for a route once nothing is refused there any more."""
        left = [FAMILY_NAMES[family] for family in self._drift.failing if served.uses(family)]
        if event != "timestamps_drift" or level != "info" or not left:
            return level, message
        return "error", f"{message}; new connections over {' and '.join(left)} are still refused"


def _worker_accepts(prepared: Prepared) -> bool:
    """With one worker no client need be dispatched: unless clients are counted here, or SCM_RIGHTS has not that much room.

    With a file of routes the main thread accepts: they come and go.
    """
    config = prepared.shared.config
    if config.routes_file or config.workers > 1:
        return False
    (of_route,) = prepared.routes
    return not of_route.route.max_connections_per_client and len(of_route.listeners) <= _MOST_LISTENERS
