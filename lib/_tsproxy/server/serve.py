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

from _tsproxy import exits
from _tsproxy.config import Config
from _tsproxy.dataplane.acceptor import Acceptor
from _tsproxy.dataplane.clients import Clients, slots_for
from _tsproxy.dataplane.inbox import DRAIN, DRIFTED, EVIDENCE, KILL, LEAVE, OPEN
from _tsproxy.host import children, inherited, linux, sockets, systemd, wakeup
from _tsproxy.host.needs import needing
from _tsproxy.host.systemd import Notifier
from _tsproxy.runtime.crew import Crew, Death, Retry
from _tsproxy.server import listening, start_line, startup
from _tsproxy.server.drift import Drift
from _tsproxy.server.keeper import Keeper, Look
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
_LAST_S = _END_NOW_S + 4.0  # that, the last lines, and some
_ATTEND_S = 0.05
_ORDER_AGAIN_S = 0.005
_LEAVE_S = 3.0  # a client whose handshake takes longer is given up
_LEAVE_PACE_S = 0.005
_MOST_DOORS = linux.SCM_MAX_FD - 3  # the other three: what it is told, its inbox, its lifeline
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
    """Owns the crew, the reporter and the listeners, from the `start` line to the `stop` line."""

    def __init__(self, ready: Ready, notifier: Notifier, signals: Signals) -> None:
        self._ready, self._config, self._signals = ready, ready.plan.config, signals
        self._slots = slots_for(self._config.max_connections, self._config.max_connections_per_client)
        self._ledger = Ledger.create(self._config.workers, self._slots)
        pipe = RecordPipe.create()
        self._crew = Crew(ready.plan, self._ledger, pipe.writer, ready.listeners if _worker_accepts(ready) else ())
        self._reporter = self._make_reporter(pipe)
        self._acceptor = self._make_acceptor()
        self._told: Optional[bytes] = None  # the upstream addresses that a worker which accepts was told last
        self._news: Deque[Tuple[str, str, str]] = deque()  # what the resolver's thread wants said
        self._looks: Deque[Look] = deque()  # what the keeper's thread has found
        self._has_news = wakeup.create()
        self._watchdog = Watchdog(notifier, self._crew, self._status)
        self._drift = Drift(ready.plan.lever, self._say, lambda: self._crew.notify(DRIFTED))
        with needing("epoll_create1(2)", "to wait for events"):
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

    def _start_keepers(self) -> None:
        """One for each address family, so that none waits for another."""
        ready, lever = self._ready, self._ready.plan.lever
        complain = partial(self._tell, "error", "error")
        for family, asked in ready.plan.asked.items():
            keeper = Keeper(family, ready.inspector, lever, ready.evidence, asked, tell=self._tell_look, complain=complain)
            keeper.start()

    def run(self) -> int:
        """Start everything, accept until told to end, drain, say the last words; the exit code."""
        self._begin()
        self._await_workers()
        with needing("getsockname(2)", "to tell what address it listens on"):
            fields = start_line.fields(self._ready, self._has_news.kind)
        self._reporter.say("start", **fields)
        exposed = listening.unbounded(self._config, self._ready.listeners)
        if exposed:
            self._say("warning", "warning", exposed)
        if self._ready.resolver.excess:
            self._say("warning", "warning", self._ready.resolver.excess)
        for target, reason in self._ready.resolver.failures:
            self._say("warning", "warning", f"can't resolve {target}: {reason}; the other targets are in use")
        children.reap_others(self._crew.children)
        self._watchdog.say(READY=1)
        self._accept_until_told()
        return self._stop(self._drain())

    def _begin(self) -> None:
        """Start what needs a thread or a process. OSError, with nothing left running, if one can't be had."""
        with needing("epoll_ctl(2) or epoll_wait(2)", "to wait for events"):
            for fd in (self._signals.fd, self._has_news.reader, *self._crew.watched):
                self._selector.register(fd, selectors.EVENT_READ)
            self._selector.select(0)
        self._reporter.start()
        try:
            self._crew.start()
            if self._ready.plan.lever in policy.WATCHED:
                self._start_keepers()
            self._ready.resolver.follow(self._unreached, self._tell)
        except OSError:
            self._kill()
            self._reporter.close()
            raise

    def _await_workers(self) -> None:
        """The `start` line says that clients are served: an interpreter takes half a second to be there."""
        self._crew.ping()
        until = time.monotonic() + _BEGIN_S
        while not self._crew.all_answered() and time.monotonic() < until and not self._signals.ask_for_the_end:
            time.sleep(_BEGIN_PACE_S)

    def _accept_until_told(self) -> None:
        """Accept, or let the worker accept, until a signal or a worker's death."""
        self._on_signals()  # those that the look-up of names has passed over
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
        """How long to sleep: until accepting goes on, an order or a start is tried again, or the watchdog is due."""
        again = _ORDER_AGAIN_S if self._crew.owes else None
        dues = (pause or None, again, self._crew.retry_s, self._watchdog.due_s)
        return min((due for due in dues if due is not None), default=None)

    def _keep_time(self) -> None:
        self._acceptor.offer_again()
        self._crew.deliver()
        for retry in self._crew.try_again():
            self._on_retry(retry)
        self._watchdog.tick()

    def _status(self) -> str:
        """What it does just now, for the manager to show."""
        connections = f"{metrics.active(self._ledger)} connections"
        if self._ended_by or self._died:
            return f"draining {connections}"
        if self._drift.refused:
            return f"refusing {self._drift.refused}, with {connections}: {self._drift.evidence}"
        return f"relaying {connections}"

    def _listen(self, accepting: bool) -> None:
        for listener in self._ready.listeners:
            if accepting:
                self._selector.register(listener, selectors.EVENT_READ, sockets.taker(listener))
            else:
                self._selector.unregister(listener)

    def _on_word(self, fd: int) -> None:
        """A signal, news of the resolver or the keeper, or the end of a worker."""
        if fd == self._signals.fd:
            self._on_signals()
        elif fd == self._has_news.reader:
            self._on_news()
        else:
            self._on_loss(self._crew.loss())
            children.reap_others(self._crew.children)  # those behind the fork server, whose status has been taken now
            for death in self._crew.replace_the_dead():
                self._on_death(death)

    def _on_signals(self) -> None:
        for number in self._signals.take():
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
        while self._looks:
            self._on_look(self._looks.popleft())

    def _on_look(self, look: Look) -> None:
        """Clients that wait may have an answer now; what has changed is said, and told to the manager."""
        before = self._drift.refused
        self._drift.on_look(look)
        if look.was_asked:
            self._crew.notify(EVIDENCE)
        if self._drift.refused != before:
            self._watchdog.say()

    def _on_loss(self, fate: str) -> None:
        """Nobody can start workers any more. Those that run go on: to end them would cost the clients more."""
        if fate:
            about = "the connections go on, but a worker that dies has no successor: restart when it suits"
            self._say("error", "error", f"the zygote, which starts workers, died ({fate}); {about}")

    def _on_death(self, death: Death) -> None:
        """Its connections are closed, the others are untouched; one that dies again and again ends the whole."""
        self._told = None
        then = self._then(death) or "a successor took its place"
        about = f"worker {death.number} died ({death.fate}); {death.connections} connections closed; {then}"
        self._say("error", "error", about)

    def _on_retry(self, retry: Retry) -> None:
        then = self._then(retry)
        level = "error" if then else "warning"
        self._say(level, level, f"worker {retry.number}: {then or 'a successor took its place after all'}")

    def _then(self, news: Union[Death, Retry]) -> str:
        """What becomes of a worker's place that can't be filled now; "" if it is."""
        self._died = self._died or bool(news.obstacle)
        if news.obstacle:
            return f"{news.obstacle}: draining, then ending"
        return f"no successor yet, trying again: {news.delay}" if news.delay else ""

    def _drain(self) -> int:
        """Close the listeners, let connections end; at the deadline or the next signal end them. How many were cut."""
        self._watchdog.extend(self._config.drain_timeout_s + _LAST_S, STOPPING=1)
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
            self._attend_until(deadline)
        return self._kill()

    def _accept_instead(self, until: float) -> None:
        """A worker that accepts shall stop; who is in the backlog by then is for the main thread to take."""
        self._crew.order(LEAVE)
        while self._crew.alive and not self._crew.has_obeyed and self._may_wait(until):
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
        left = metrics.active(self._ledger)
        self._watchdog.extend(_LAST_S)
        self._crew.order(KILL)
        until = time.monotonic() + _END_NOW_S
        while self._crew.alive and time.monotonic() < until:
            self._attend_until(until)
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

    def _unreached(self) -> int:
        """How often an address was tried in vain, or could not be tried at all."""
        return self._ledger.total(Counter.CONNECT_FAIL) + self._ledger.total(Counter.POLICY_REFUSED)

    def _tell(self, event: str, level: str, message: str) -> None:
        """In the resolver's thread."""
        self._news.append((event, level, message))
        self._has_news.ring()

    def _tell_look(self, look: Look) -> None:
        """In the keeper's thread."""
        self._looks.append(look)
        self._has_news.ring()

    def _say(self, event: str, level: str, message: str) -> None:
        self._reporter.say(event, level, message=message)


def _worker_accepts(ready: Ready) -> bool:
    """One worker needs nobody to deal clients out. Those of an address are counted here; and SCM_RIGHTS has a limit."""
    config = ready.plan.config
    return config.workers == 1 and not config.max_connections_per_client and len(ready.listeners) <= _MOST_DOORS
