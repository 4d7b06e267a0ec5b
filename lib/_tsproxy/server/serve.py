"""The relay command: the main thread's loop over listeners, signals, workers' ends and the clock, then the drain.

Knows the order of these. Each of them is done elsewhere.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import time
from collections import deque
from typing import Deque, Iterator, List, Optional, Tuple

from _tsproxy import exits
from _tsproxy.config import Config
from _tsproxy.dataplane.acceptor import Acceptor
from _tsproxy.dataplane.clients import Clients, slots_for
from _tsproxy.dataplane.inbox import DRAIN, DRIFTED_ALL, DRIFTED_CONNECTING, KILL, LEAVE, OPEN
from _tsproxy.exits import Exit
from _tsproxy.host import children, inherited, linux, sockets, systemd, wakeup
from _tsproxy.host.systemd import Notifier
from _tsproxy.runtime.crew import Crew, Death
from _tsproxy.server import listening, start_line, startup
from _tsproxy.server.drift import DriftWatch
from _tsproxy.server.leaving import Leaving
from _tsproxy.server.signals import DRAINING, Signals
from _tsproxy.server.startup import Ready
from _tsproxy.server.watchdog import Watchdog
from _tsproxy.telemetry import metrics
from _tsproxy.telemetry.counters import ACCEPTOR_ROW, Counter, Ledger
from _tsproxy.telemetry.records import RecordPipe
from _tsproxy.telemetry.reporter import Reporter
from _tsproxy.timestamps import policy

_END_NOW_S = 5.0
_ORDER_AGAIN_S = 0.005
_LEAVE_S = 3.0  # a client whose handshake takes longer is given up
_LEAVE_PACE_S = 0.005
_MOST_DOORS = linux.SCM_MAX_FD - 3  # the other three: what it is told, its inbox, its lifeline
_ANSWER_S = 1.0  # a worker that does not answer by then is stuck
_STDOUT = 1  # by number: sys.stdout is None when it was closed at the start


def serve(config: Config) -> int:
    """Relay until a signal ends it; the exit code. Exit with its code if it can't begin."""
    inherited.close_all_but(systemd.numbers(os.environ, os.getpid()))
    inherited.leave_directory()
    signals = Signals()
    inherited.unblock_signals()
    with _room_to_begin():
        server = Server(startup.prepare(config, os.environ, signals), signals)
        server.begin()
    return server.run()


@contextlib.contextmanager
def _room_to_begin() -> Iterator[None]:
    """EAGAIN of clone(2) told as what it is. Python gives it no class of its own for a thread."""
    try:
        yield
    except (BlockingIOError, RuntimeError) as problem:
        if isinstance(problem, RuntimeError) and "new thread" not in str(problem):
            raise
        why = "RLIMIT_NPROC (ulimit -u) or the cgroup's pids.max allows no more threads and processes"
        raise Exit(exits.FAILED, f"can't begin: {why}") from None


class Server:
    """Owns the crew, the reporter and the listeners, from the `start` line to the `stop` line."""

    def __init__(self, ready: Ready, signals: Signals) -> None:
        self._ready, self._config, self._signals = ready, ready.plan.config, signals
        self._slots = slots_for(self._config.max_connections, self._config.max_connections_per_client)
        self._ledger = Ledger.create(self._config.workers, self._slots)
        pipe = RecordPipe.create()
        self._crew = Crew(ready.plan, self._ledger, pipe.writer, ready.listeners if _worker_accepts(ready) else ())
        self._reporter = self._make_reporter(pipe)
        self._acceptor = self._make_acceptor()
        self._told: Optional[bytes] = None  # the upstream addresses that a worker which accepts was told last
        self._news: Deque[Tuple[str, str, str]] = deque()  # what the resolver's thread wants said
        self._has_news = wakeup.create()
        self._notifier = Notifier(os.environ, os.getpid())
        self._watchdog = Watchdog(self._notifier, self._crew)
        self._drift = DriftWatch(ready.inspector, ready.plan.lever, self._on_drift, self._on_held)
        self._selector = selectors.DefaultSelector()
        self._started = time.monotonic()
        self._ended_by: List[str] = []  # the signals that asked for the end, in order
        self._died = False

    def _make_reporter(self, pipe: RecordPipe) -> Reporter:
        return Reporter(
            _STDOUT,
            self._ledger,
            pipe,
            level=self._config.log_level,
            interval_s=self._config.metrics_interval_s,
            witness_words=policy.WITNESS_WORDS,
        )

    def _make_acceptor(self) -> Acceptor:
        return Acceptor(
            self._config,
            self._ledger,
            self._ledger.rows[ACCEPTOR_ROW],
            Clients(self._ledger, self._slots, self._config.max_connections_per_client),
            upstreams=lambda: self._ready.resolver.packed,
            hand=self._crew.hand,
            complain=lambda level, why: self._say(level, level, why),
        )

    def begin(self) -> None:
        """Start the threads and processes."""
        self._reporter.start()
        self._crew.start()
        self._ready.resolver.follow(lambda: self._ledger.total(Counter.CONNECT_FAIL), self._tell)

    def run(self) -> int:
        """Accept until told to end, drain, say the last words; the exit code."""
        self._reporter.say("start", **start_line.fields(self._ready))
        exposed = listening.unbounded(self._config, self._ready.listeners)
        if exposed:
            self._say("warning", "warning", exposed)
        for target, reason in self._ready.resolver.failures:
            self._say("warning", "warning", f"can't resolve {target}: {reason}; the other targets are in use")
        for fd in (self._signals.fd, self._has_news.reader, *self._crew.watched):
            self._selector.register(fd, selectors.EVENT_READ)
        children.reap_others(self._crew.children)
        self._notifier.say(READY=1, STATUS="relaying")
        self._accept_until_told()
        return self._stop(self._drain())

    def _accept_until_told(self) -> None:
        """Accept, or let the worker accept, until a signal or a worker's death."""
        accepting = False
        while not self._ended_by and not self._died:
            self._open_doors()
            pause = 0.0
            if not self._crew.accepts:
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

    def _open_doors(self) -> None:
        """Tell a worker that accepts where to connect to, if it does not know yet, or not any more."""
        if self._crew.accepts and self._told is not self._ready.resolver.packed:
            self._told = self._ready.resolver.packed
            self._crew.order(OPEN, self._told)

    def _patience_s(self, pause: float) -> Optional[float]:
        """How long to sleep: until accepting goes on, an order is tried again, or the policy or the watchdog is due."""
        dues = (pause or None, _ORDER_AGAIN_S if self._crew.owes else None, self._drift.due_s, self._watchdog.due_s)
        return min((due for due in dues if due is not None), default=None)

    def _keep_time(self) -> None:
        self._acceptor.offer_again()
        self._crew.deliver()
        if self._drift.due_s == 0:
            self._drift.look()
        if self._watchdog.due_s == 0:
            self._watchdog.tick(f"relaying {metrics.active(self._ledger)} connections")

    def _listen(self, accepting: bool) -> None:
        for listener in self._ready.listeners:
            if accepting:
                self._selector.register(listener, selectors.EVENT_READ, sockets.taker(listener))
            else:
                self._selector.unregister(listener)

    def _on_word(self, fd: int) -> None:
        """A signal, news of the resolver, or the end of a worker."""
        if fd == self._signals.fd:
            for number in self._signals.take():
                self._on_signal(number)
        elif fd == self._has_news.reader:
            self._on_news()
        else:
            self._on_loss(self._crew.loss())
            children.reap_others(self._crew.children)  # those behind the fork server, whose status has been taken now
            for death in self._crew.replace_the_dead():
                self._on_death(death)

    def _on_signal(self, number: signal.Signals) -> None:
        if number in DRAINING:
            self._ended_by.append(number.name)
        elif number == signal.SIGUSR1:
            self._reporter.metrics_now()
        else:
            children.reap_others(self._crew.children)

    def _on_news(self) -> None:
        """Other addresses are said to be in use only when they are."""
        self._has_news.collect()
        self._open_doors()
        while self._news:
            self._say(*self._news.popleft())

    def _on_loss(self, fate: str) -> None:
        """Nobody can start workers any more. Those that run go on: to end them would cost the clients more."""
        if fate:
            about = "the connections go on, but a worker that dies has no successor: restart when it suits"
            self._say("error", "error", f"the zygote, which starts workers, died ({fate}); {about}")

    def _on_death(self, death: Death) -> None:
        """Its connections are closed, the others are untouched; one that dies again and again ends the whole."""
        self._died = self._died or bool(death.obstacle)
        self._told = None
        then = f"{death.obstacle}: draining, then ending" if death.obstacle else "a successor took its place"
        about = f"worker {death.number} died ({death.fate}); {death.connections} connections closed; {then}"
        self._say("error", "error", about)

    def _on_drift(self, evidence: str) -> None:
        """The policy does not hold any more: what would leak from now on ends, and people are told once."""
        rewriting = self._config.timestamps == "rewrite"
        self._crew.order(DRIFTED_ALL if rewriting else DRIFTED_CONNECTING)
        self._say("timestamps_drift", "error", f"new connections are refused until it holds again: {evidence}")
        self._notifier.say(STATUS="refusing connections: the timestamp policy does not hold")

    def _on_held(self, evidence: str) -> None:
        self._say("timestamps_drift", "info", f"the policy holds again: {evidence}")
        self._notifier.say(STATUS="relaying")

    def _drain(self) -> int:
        """Close the listeners, let connections end; at the deadline or the next signal end them. How many were cut."""
        self._notifier.say(STOPPING=1, STATUS="draining")
        deadline = time.monotonic() + self._config.drain_timeout_s
        if self._crew.accepts:
            self._accept_instead(min(deadline, time.monotonic() + _ANSWER_S))
        for listener in self._ready.listeners:
            if listener in self._selector.get_map():
                self._selector.unregister(listener)
            self._leave(listener, min(deadline, time.monotonic() + _LEAVE_S))
        self._acceptor.give_up()
        active = metrics.active(self._ledger)
        self._reporter.say("drain", active_connections=active, drain_timeout_s=self._config.drain_timeout_s)
        self._crew.order(DRAIN)
        while self._crew.alive and self._may_wait(deadline):
            self._attend(max(0.0, min(0.05, deadline - time.monotonic())))
        return self._kill()

    def _accept_instead(self, until: float) -> None:
        """A worker that accepts shall stop; who is in the backlog by then is for the main thread to take."""
        self._crew.order(LEAVE)
        while self._crew.alive and (self._crew.owes or not self._crew.all_answered()) and self._may_wait(until):
            self._attend(_LEAVE_PACE_S)
        self._acceptor = self._make_acceptor()

    def _leave(self, listener: socket.socket, until: float) -> None:
        """Take whoever has connected, or is about to on a shared port, and close: that would reset them."""
        leaving = Leaving(listener, self._config.reuse_port)
        self._take_all(leaving, until)
        while not leaving.has_left and self._may_wait(until):
            leaving.look()
            self._attend(_LEAVE_PACE_S)
            self._take_all(leaving, until)
        listener.close()

    def _take_all(self, leaving: Leaving, until: float) -> None:
        """Those on a shared port can wait for room, since later ones go to another instance."""
        while time.monotonic() < until and (leaving.is_alone or not self._acceptor.pause_s):
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

    def _kill(self) -> int:
        left = metrics.active(self._ledger)
        self._crew.order(KILL)
        self._crew.wait(_END_NOW_S)
        return left

    def _stop(self, killed: int) -> int:
        """The last lines, and the exit code."""
        self._reporter.metrics_now()
        self._reporter.say(
            "stop",
            reason="worker_died" if self._died else self._ended_by[0],
            drained=killed == 0,
            killed_connections=killed,
            uptime_s=round(time.monotonic() - self._started, 3),
        )
        self._reporter.close()
        return exits.FAILED if self._died else exits.DRAINED

    def _tell(self, event: str, level: str, message: str) -> None:
        """In the resolver's thread."""
        self._news.append((event, level, message))
        self._has_news.ring()

    def _say(self, event: str, level: str, message: str) -> None:
        self._reporter.say(event, level, message=message)


def _worker_accepts(ready: Ready) -> bool:
    """One worker needs nobody to deal clients out. Those of an address are counted here; and SCM_RIGHTS has a limit."""
    config = ready.plan.config
    return config.workers == 1 and not config.max_connections_per_client and len(ready.listeners) <= _MOST_DOORS
