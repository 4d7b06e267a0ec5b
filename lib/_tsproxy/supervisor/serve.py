"""The relay command: the main thread's loop over listeners, signals, workers' ends and the clock, then the drain.

Knows the order of these. Each of them is done elsewhere.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import time
from collections import deque
from functools import partial
from typing import Deque, List, Optional, Tuple, Union

from _tsproxy.cli import exits
from _tsproxy.cli.config import Config
from _tsproxy.linux import children, inherited, sockets, systemd, uapi, wakeup
from _tsproxy.linux.needs import needing
from _tsproxy.linux.systemd import Notifier
from _tsproxy.policy import levers
from _tsproxy.proxy.acceptor import Acceptor
from _tsproxy.proxy.clients import Clients, slots_for
from _tsproxy.proxy.inbox import DRAIN, DRIFTED, EVIDENCE, KILL, LEAVE, OPEN
from _tsproxy.stats import metrics
from _tsproxy.stats.counters import ACCEPTOR_ROW, Counter, SharedCounters
from _tsproxy.stats.records import RecordPipe
from _tsproxy.stats.reporter import Reporter
from _tsproxy.supervisor import listening, start_line, startup
from _tsproxy.supervisor.drift import Drift
from _tsproxy.supervisor.handoff import ReuseportHandoff
from _tsproxy.supervisor.monitor import Look, PolicyMonitor
from _tsproxy.supervisor.signals import DRAINING, Signals
from _tsproxy.supervisor.startup import Prepared
from _tsproxy.supervisor.watchdog import Watchdog
from _tsproxy.supervisor.worker_pool import Retry, WorkerExit, WorkerPool

_END_NOW_S = 5.0
_LAST_S = _END_NOW_S + 4.0  # that, the last lines, and some
_ATTEND_S = 0.05
_ORDER_AGAIN_S = 0.005
_LEAVE_S = 3.0  # a client whose handshake takes longer is given up
_LEAVE_PACE_S = 0.005
_MOST_LISTENERS = uapi.SCM_MAX_FD - 3  # the other three: what it is told, its inbox, its lifeline
_BEGIN_S, _BEGIN_PACE_S = 5.0, 0.002
_ANSWER_S = 1.0  # a worker that does not answer by then is stuck
_STDOUT = 1  # by number: sys.stdout is None when it was closed at the start


def serve(config: Config) -> int:
    """Relay until a signal ends it; the exit code. Exit with its code if it can't begin."""
    inherited.close_all_but(systemd.numbers(os.environ, os.getpid()))
    inherited.leave_directory()
    with needing("pipe2(2) or rt_sigaction(2)", "to take signals"):
        signals = Signals()
    inherited.unblock_signals()
    notifier = Notifier(os.environ, os.getpid())
    return Server(startup.prepare(config, os.environ, notifier, signals), notifier, signals).run()


class Server:
    """Owns the worker pool, the reporter and the listeners, from the `start` line to the `stop` line."""

    def __init__(self, prepared: Prepared, notifier: Notifier, signals: Signals) -> None:
        self._prepared, self._config, self._signals = prepared, prepared.shared.config, signals
        self._slots = slots_for(self._config.max_connections, self._config.max_connections_per_client)
        self._counters_of_all = SharedCounters.create(self._config.workers, self._slots)
        pipe = RecordPipe.create()
        self._pool = WorkerPool(
            prepared.shared, self._counters_of_all, pipe.writer, prepared.listeners if _worker_accepts(prepared) else ()
        )
        self._reporter = self._make_reporter(pipe)
        self._acceptor = self._make_acceptor()
        self._told: Optional[bytes] = None  # the upstream addresses that a worker which accepts was told last
        self._news: Deque[Tuple[str, str, str]] = deque()  # what the resolver's thread wants said
        self._looks: Deque[Look] = deque()  # what the monitor's thread has found
        self._has_news = wakeup.create()
        self._watchdog = Watchdog(notifier, self._pool, self._status)
        self._drift = Drift(prepared.shared.lever, self._log, lambda: self._pool.notify(DRIFTED))
        with needing("epoll_create1(2)", "to wait for events"):
            self._selector = selectors.DefaultSelector()
        self._started = time.monotonic()
        self._ended_by: List[str] = []  # the signals that asked for the end, in order
        self._died = False

    def _make_reporter(self, pipe: RecordPipe) -> Reporter:
        return Reporter(
            _STDOUT,
            self._counters_of_all,
            pipe,
            level=self._config.log_level,
            interval_s=self._config.metrics_interval_s,
            witness_words=levers.WITNESS_WORDS,
        )

    def _make_acceptor(self) -> Acceptor:
        return Acceptor(
            self._config,
            self._counters_of_all,
            self._counters_of_all.rows[ACCEPTOR_ROW],
            Clients(self._counters_of_all, self._slots, self._config.max_connections_per_client),
            upstreams=lambda: self._prepared.resolver.packed,
            dispatch=self._pool.dispatch,
            log_ratelimited=lambda level, why: self._log(level, level, why),
        )

    def _start_monitors(self) -> None:
        """One for each address family, so that none waits for another."""
        prepared, lever = self._prepared, self._prepared.shared.lever
        log_ratelimited = partial(self._tell, "error", "error")
        for family, asked in prepared.shared.asked.items():
            monitor = PolicyMonitor(
                family,
                prepared.inspector,
                lever,
                prepared.evidence,
                asked,
                tell=self._tell_look,
                log_ratelimited=log_ratelimited,
            )
            monitor.start()

    def run(self) -> int:
        """Start everything, accept until told to end, drain, say the last words; the exit code."""
        self._begin()
        self._await_workers()
        with needing("getsockname(2)", "to tell what address it listens on"):
            fields = start_line.fields(self._prepared, self._has_news.kind)
        self._reporter.log("start", **fields)
        exposed = listening.unbounded(self._config, self._prepared.listeners)
        if exposed:
            self._log("warning", "warning", exposed)
        if self._prepared.resolver.excess:
            self._log("warning", "warning", self._prepared.resolver.excess)
        for target, reason in self._prepared.resolver.failures:
            self._log("warning", "warning", f"can't resolve {target}: {reason}; the other targets are in use")
        children.reap_others(self._pool.children)
        self._watchdog.notify(READY=1)
        self._accept_until_told()
        return self._stop(self._drain())

    def _begin(self) -> None:
        """Start what needs a thread or a process. OSError, with nothing left running, if one can't be had."""
        with needing("epoll_ctl(2) or epoll_wait(2)", "to wait for events"):
            for fd in (self._signals.fd, self._has_news.reader, *self._pool.watched):
                self._selector.register(fd, selectors.EVENT_READ)
            self._selector.select(0)
        self._reporter.start()
        try:
            self._pool.start()
            if self._prepared.shared.lever in levers.WATCHED:
                self._start_monitors()
            self._prepared.resolver.follow(self._unreached, self._tell)
        except OSError:
            self._kill()
            self._reporter.close()
            raise

    def _await_workers(self) -> None:
        """The `start` line says that clients are served: an interpreter takes half a second to be there."""
        self._pool.ping()
        until = time.monotonic() + _BEGIN_S
        while not self._pool.all_answered() and time.monotonic() < until and not self._signals.ask_for_the_end:
            self._attend(_BEGIN_PACE_S)

    def _accept_until_told(self) -> None:
        """Accept, or let the worker accept, until a signal or a worker's death."""
        self._on_signals()  # those that the look-up of names has passed over
        accepting = False
        while not self._ended_by and not self._died:
            self._start_accepting()
            pause = 0.0
            if not self._pool.accepts:
                pause = self._acceptor.pause_s
                if accepting == (pause > 0):
                    accepting = not accepting
                    self._listen(accepting)
            for key, _ in self._selector.select(self._patience_s(pause)):
                if key.data is not None:
                    self._acceptor.accept(key.data)
                else:
                    self._on_word(key.fd)
            self._keep_time()

    def _start_accepting(self) -> None:
        """Tell a worker that accepts where to connect to, if it does not know yet, or not any more."""
        if self._pool.accepts and self._told is not self._prepared.resolver.packed:
            self._told = self._prepared.resolver.packed
            self._pool.send_command(OPEN, self._told)

    def _patience_s(self, pause: float) -> Optional[float]:
        """How long to sleep: until accepting goes on, an order or a start is tried again, or the watchdog is due."""
        again = _ORDER_AGAIN_S if self._pool.has_pending_commands else None
        dues = (pause or None, again, self._pool.retry_s, self._watchdog.due_s)
        return min((due for due in dues if due is not None), default=None)

    def _keep_time(self) -> None:
        self._acceptor.redispatch()
        self._pool.send_pending_commands()
        for retry in self._pool.try_again():
            self._on_retry(retry)
        self._watchdog.tick()

    def _status(self) -> str:
        """What it does just now, for the manager to show."""
        connections = f"{metrics.active(self._counters_of_all)} connections"
        if self._ended_by or self._died:
            return f"draining {connections}"
        if self._drift.refused:
            return f"refusing {self._drift.refused}, with {connections}: {self._drift.evidence}"
        return f"relaying {connections}"

    def _listen(self, accepting: bool) -> None:
        for listener in self._prepared.listeners:
            if accepting:
                self._selector.register(listener, selectors.EVENT_READ, sockets.bind_accept4(listener))
            else:
                self._selector.unregister(listener)

    def _on_word(self, fd: int) -> None:
        """A signal, news of the resolver or the monitor, or the end of a worker."""
        if fd == self._signals.fd:
            self._on_signals()
        elif fd == self._has_news.reader:
            self._on_news()
        else:
            self._on_fork_server_exit(self._pool.fork_server_exit())
            children.reap_others(self._pool.children)  # those behind the fork server, whose status has been taken now
            for worker_exit in self._pool.replace_exited():
                self._on_worker_exit(worker_exit)

    def _on_signals(self) -> None:
        for number in self._signals.take():
            if number in DRAINING:
                self._ended_by.append(number.name)
            elif number == signal.SIGUSR1:
                self._reporter.metrics_now()
            else:
                children.reap_others(self._pool.children)

    def _on_news(self) -> None:
        """Other addresses are said to be in use only when they are."""
        self._has_news.collect()
        self._start_accepting()
        while self._news:
            self._log(*self._news.popleft())
        while self._looks:
            self._on_look(self._looks.popleft())

    def _on_look(self, look: Look) -> None:
        """Clients that wait may have an answer now; what has changed is said, and told to the manager."""
        before = self._drift.refused
        self._drift.on_look(look)
        if look.was_asked:
            self._pool.notify(EVIDENCE)
        if self._drift.refused != before:
            self._watchdog.notify()

    def _on_fork_server_exit(self, exit_status: str) -> None:
        """Nobody can start workers any more. Those that run go on: to end them would cost the clients more."""
        if exit_status:
            about = "the connections go on, but a worker that dies has no successor: restart when it suits"
            self._log("error", "error", f"the fork server, which starts workers, died ({exit_status}); {about}")

    def _on_worker_exit(self, worker_exit: WorkerExit) -> None:
        """Its connections are closed, the others are untouched; one that dies again and again ends the whole."""
        self._told = None
        then = self._then(worker_exit) or "a successor took its place"
        about = f"worker {worker_exit.number} died ({worker_exit.exit_status})"
        self._log("error", "error", f"{about}; {worker_exit.connections} connections closed; {then}")

    def _on_retry(self, retry: Retry) -> None:
        then = self._then(retry)
        level = "error" if then else "warning"
        self._log(level, level, f"worker {retry.number}: {then or 'a successor took its place after all'}")

    def _then(self, news: Union[WorkerExit, Retry]) -> str:
        """What becomes of a worker's place that can't be filled now; "" if it is."""
        self._died = self._died or bool(news.obstacle)
        if news.obstacle:
            return f"{news.obstacle}: draining, then ending"
        return f"no successor yet, trying again: {news.delay}" if news.delay else ""

    def _drain(self) -> int:
        """Close the listeners, let connections end; at the deadline or the next signal end them. How many were cut."""
        self._watchdog.extend(self._config.drain_timeout_s + _LAST_S, STOPPING=1)
        deadline = time.monotonic() + self._config.drain_timeout_s
        if self._pool.accepts:
            self._accept_instead(min(deadline, time.monotonic() + _ANSWER_S))
        for listener in self._prepared.listeners:
            if listener in self._selector.get_map():
                self._selector.unregister(listener)
            self._leave(listener, min(deadline, time.monotonic() + _LEAVE_S))
        self._acceptor.give_up()
        active = metrics.active(self._counters_of_all)
        self._reporter.log("drain", active_connections=active, drain_timeout_s=self._config.drain_timeout_s)
        self._pool.send_command(DRAIN)
        while self._pool.alive and self._may_wait(deadline):
            self._attend_until(deadline)
        return self._kill()

    def _accept_instead(self, until: float) -> None:
        """A worker that accepts shall stop; who is in the backlog by then is for the main thread to take."""
        self._pool.send_command(LEAVE)
        while self._pool.alive and not self._pool.has_handled_all and self._may_wait(until):
            self._attend(_LEAVE_PACE_S)
        self._acceptor = self._make_acceptor()

    def _leave(self, listener: socket.socket, until: float) -> None:
        """Take whoever has connected, or is about to on a shared port, and close: that would reset them."""
        leaving = ReuseportHandoff(listener, self._config.reuse_port)
        self._take_all(leaving, until)
        while not leaving.has_left and self._may_wait(until):
            leaving.look()
            self._attend(_LEAVE_PACE_S)
            self._take_all(leaving, until)
        listener.close()

    def _take_all(self, leaving: ReuseportHandoff, until: float) -> None:
        """Those on a shared port can wait for room, since later ones go to another instance."""
        while time.monotonic() < until and (leaving.is_alone or not self._acceptor.pause_s):
            self._watchdog.tick()
            if self._acceptor.is_held_up:
                self._attend(_LEAVE_PACE_S)
            elif not self._acceptor.accept(leaving.take):
                return

    def _may_wait(self, until: float) -> bool:
        return len(self._ended_by) < 2 and time.monotonic() < until

    def _attend(self, patience_s: float) -> None:
        """Signals, workers' ends and the clock, with the listeners out of the loop."""
        for key, _ in self._selector.select(patience_s):
            self._on_word(key.fd)
        self._keep_time()

    def _attend_until(self, deadline: float) -> None:
        self._attend(max(0.0, min(_ATTEND_S, deadline - time.monotonic())))

    def _kill(self) -> int:
        """From here on the clock ends everything, a stuck worker too: nobody has to answer for it any more."""
        left = metrics.active(self._counters_of_all)
        self._watchdog.extend(_LAST_S)
        self._pool.send_command(KILL)
        until = time.monotonic() + _END_NOW_S
        while self._pool.alive and time.monotonic() < until:
            self._attend_until(until)
        return left

    def _stop(self, killed: int) -> int:
        """The last lines, and the exit code."""
        self._reporter.metrics_now()
        self._reporter.log(
            "stop",
            reason="worker_died" if self._died else self._ended_by[0],
            drained=killed == 0,
            killed_connections=killed,
            uptime_s=round(time.monotonic() - self._started, 3),
        )
        self._reporter.close()
        return exits.FAILED if self._died else exits.DRAINED

    def _unreached(self) -> int:
        """How often an address was tried in vain, or could not be tried at all."""
        return self._counters_of_all.total(Counter.CONNECT_FAIL) + self._counters_of_all.total(Counter.POLICY_REFUSED)

    def _tell(self, event: str, level: str, message: str) -> None:
        """In the resolver's thread."""
        self._news.append((event, level, message))
        self._has_news.ring()

    def _tell_look(self, look: Look) -> None:
        """In the monitor's thread."""
        self._looks.append(look)
        self._has_news.ring()

    def _log(self, event: str, level: str, message: str) -> None:
        self._reporter.log(event, level, message=message)


def _worker_accepts(prepared: Prepared) -> bool:
    """One worker needs nobody to deal clients out. Those of an address are counted here; and SCM_RIGHTS has a limit."""
    config = prepared.shared.config
    return config.workers == 1 and not config.max_connections_per_client and len(prepared.listeners) <= _MOST_LISTENERS
