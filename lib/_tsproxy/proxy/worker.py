"""A worker: the sessions of one event loop, and the commands from the main thread.

Knows its inbox, its routes' contexts and, if it is the only worker, its listeners. Knows nothing of other workers, or of how
it was started: its input is plain numbers and shared memory, its output records and counters.
"""

from __future__ import annotations

import time
from typing import Iterable, List, Protocol, Tuple

from _tsproxy.loop.poller import READ, READABLE
from _tsproxy.loop.posted import NEW
from _tsproxy.loop.timers import Timer
from _tsproxy.proxy.acceptor import Acceptor
from _tsproxy.proxy.context import RouteContext, WorkerContext
from _tsproxy.proxy.inbox import Command, Consumer, Message
from _tsproxy.proxy.listener import Listener
from _tsproxy.proxy.registry import LiveSession, Registry
from _tsproxy.proxy.session import Session
from _tsproxy.stats.counters import Counter
from _tsproxy.stats.endings import Ending
from _tsproxy.stats.records import ConnectionRecord

_RETRIES = 16  # connectors that wait for evidence, at a time: each may cost a connect(2)


class Routes(Protocol):
    """The contexts of the worker's routes, by number: each is made for its first client."""

    def of(self, number: int) -> RouteContext:
        """The context of a route that was added."""
        ...

    def in_use(self) -> Iterable[RouteContext]:
        """The contexts made so far."""
        ...

    def add(self, number: int, fd: int) -> None:
        """Clients of this route may come; `fd` is the memory of its counters. Again: nothing is done."""
        ...

    def remove(self, number: int) -> None:
        """None will come any more, and the last session has ended."""
        ...


class Worker:
    """A handler of its inbox's descriptor. Runs until DRAIN or KILL has come and its last session has ended."""

    lane = NEW

    def __init__(self, context: WorkerContext, routes: Routes, inbox: Consumer) -> None:
        self.context, self._routes, self._inbox = context, routes, inbox
        self._draining = False
        self._retries: List[Tuple[Registry, Timer]] = []  # waiting connectors that have yet to ask the gate again
        self._listeners: List[Listener] = []
        context.loop.watch(inbox.fileno, READ, self)

    def listen(self, acceptor: Acceptor, listeners: List[Listener]) -> None:
        """Accept by itself, with `acceptor` dispatching to dispatch(), once START_ACCEPTING comes."""
        self._acceptor, self._listeners = acceptor, listeners

    def run(self) -> None:
        """Run the loop. A bug in a session ends that session; one outside any session is raised."""
        try:
            self.context.loop.run(until=lambda: self._draining and not self._has_sessions)
        except Exception as bug:
            self.context.report(bug)
            raise

    def close(self) -> None:
        """End the sessions that are left (after a bug outside any session), close the loop and this side of the inbox."""
        self._close_listeners()
        self._end_all(Ending.BUG)
        self.context.close()
        self._inbox.close()

    @property
    def _has_sessions(self) -> bool:
        return any(context.registry.sessions for context in self._routes.in_use())

    def _sessions(self) -> List[LiveSession]:
        """All that are open now."""
        return [session for context in self._routes.in_use() for session in context.registry.sessions.values()]

    # The inbox

    def readable(self) -> None:
        """Handle one message of the inbox."""
        message = self._inbox.pop()
        if message is None:
            return
        if message.command is Command.CLIENT:
            self.dispatch(message)
        else:
            self._handle_command(message)
        if self._inbox.has_more:
            self.context.loop.posted.put(NEW, self._inbox.fileno, READABLE, self.context.loop.now)

    def ready(self, mask: int) -> None:
        """Any other event of the inbox's descriptor: read it, too."""
        self.readable()

    def on_bug(self, bug: Exception) -> None:
        """A bug outside any session ends the worker."""
        raise bug

    def _handle_command(self, message: Message) -> None:
        command = message.command
        self._draining = self._draining or command in (Command.DRAIN, Command.KILL)
        if command is Command.START_ACCEPTING:
            self._start_accepting(message.upstreams)
        elif command in (Command.STOP_ACCEPTING, Command.DRAIN, Command.KILL):
            self._close_listeners()
        if command is Command.KILL:
            self._end_all(Ending.DRAIN)
        elif command is Command.POLICY_FAILED:
            self._on_policy_failed()
        elif command is Command.EVIDENCE:
            registries = [context.registry for context in self._routes.in_use()]
            self._retries = [(registry, connector) for registry in registries for connector in registry.waiting]
            self.on_deadline(self.context.loop.now)
        elif command is Command.ADD_ROUTE:
            self._routes.add(message.route, message.fd)
        elif command is Command.REMOVE_ROUTE:
            self._routes.remove(message.route)

    # Clients

    def dispatch(self, message: Message) -> bool:
        """Begin a session for a client, from the inbox or from a listener. Never refuses one: True."""
        context = self._routes.of(message.route)
        context.count_client(message.client_slot)
        context.count(Counter.BEGUN)
        if message.fd < 0:
            _client_lost(context, message)
            return True
        session = Session(context, message)
        try:
            session.start()
        except Exception as bug:
            session.on_bug(bug)
        return True

    # Listeners

    def _start_accepting(self, upstreams: bytes) -> None:
        for listener in self._listeners:
            self._acceptor.upstreams = upstreams
            listener.start_accepting()

    def _close_listeners(self) -> None:
        while self._listeners:
            self._listeners.pop().close()

    # Commands for all sessions

    def _on_policy_failed(self) -> None:
        for session in self._sessions():
            try:
                session.on_policy_failed()
            except Exception as bug:
                session.on_bug(bug)

    def on_deadline(self, now_ns: int) -> None:
        """Some waiting connectors ask the gate again; the others later, so that established sessions don't wait for all."""
        batch, self._retries = self._retries[:_RETRIES], self._retries[_RETRIES:]
        for registry, connector in batch:
            if connector in registry.waiting:
                try:
                    connector.on_deadline(now_ns)
                except Exception as bug:
                    connector.on_bug(bug)
        if self._retries:
            self.context.loop.timers.arm(self, now_ns + 1)

    def _end_all(self, ending: Ending) -> None:
        for session in self._sessions():
            try:
                session.end(ending)
            except Exception as bug:
                self.context.report(bug)


def _client_lost(context: RouteContext, message: Message) -> None:
    """recvmsg(2) had no descriptor for the client (SCM_RIGHTS, EMFILE): the kernel has closed it with a FIN."""
    context.count_client(message.client_slot, ended=True)
    context.count(Counter.ENDED)
    context.log_ratelimited("error", "no fd", "a client was lost: out of file descriptors: raise LimitNOFILE (ulimit -n)")
    if context.settings.log_connections:
        context.records.put(
            ConnectionRecord(
                worker=context.number,
                route=context.settings.route,
                connection_id=message.connection_id,
                closed_at_ns=time.time_ns(),
                client=message.client,
                duration_us=(time.monotonic_ns() - message.accepted_ns) // 1000,
                ending=Ending.NO_DESCRIPTORS,
                witness=context.gate.witness,
            )
        )
