"""The routes that are served, and those that were until a reload and have sessions still.

Knows for each route its acceptor, listeners, resolver and counters, and sees to it that all parts of the process know of it.
Knows nothing of why one comes or goes.
"""

from __future__ import annotations

import itertools
from functools import partial
from socket import socket
from typing import Callable, Dict, Iterator, List, Optional, Sequence

from _tsproxy.loop.event_loop import EventLoop
from _tsproxy.policy import levers
from _tsproxy.proxy.acceptor import Acceptor
from _tsproxy.proxy.clients import Clients
from _tsproxy.proxy.listener import Listener
from _tsproxy.stats import metrics
from _tsproxy.stats.counters import ACCEPTOR_ROW, Counter, SharedCounters
from _tsproxy.stats.reporter import Reporter
from _tsproxy.supervisor import listening
from _tsproxy.supervisor.callbacks import CallTimer
from _tsproxy.supervisor.drain import PAUSE_S, ListenerDrain
from _tsproxy.supervisor.startup import PreparedRoute
from _tsproxy.supervisor.worker_pool import WorkerPool

_SECOND_S = 1.0

Call = Callable[..., None]
Log = Callable[[str, str, str, str], None]  # route, event, level, message


class ServedRoute:
    """One route until its options change."""

    def __init__(self, loop: EventLoop, prepared: PreparedRoute, acceptor: Acceptor, watches: bool) -> None:
        """`watches`: whether the main thread accepts, not a worker."""
        self.prepared, self.acceptor = prepared, acceptor
        self.listeners = [Listener(loop, acceptor, sock) for sock in prepared.listeners if watches]
        self._resting: List[Listener] = []  # that have made room for another one
        self.name, self.number = prepared.route.name, prepared.args.number
        self.ended: Optional[Callable[[], bool]] = None  # once no session is left: whether the workers have seen that
        self._failed_connects = 0

    def stop_listening(self, kept: Sequence[socket], drain: ListenerDrain) -> None:
        """Close its listeners, but for those in `kept`. Who is in a backlog is accepted; on a shared port `drain` sees to that.

        At once, not at the end of the iteration: another one may be to have their place, and the line that says so may be read.
        """
        for listener in self.listeners:
            listener.stop_accepting()
            if listener.socket not in kept and not drain.add_shared(listener.socket, self.acceptor):
                listener.accept_backlog()
                listener.socket.close()
        for listener in self._resting:
            listener.socket.close()
        self.listeners, self._resting = [], []

    def make_room(self) -> None:
        """Let another socket listen where its listeners do. Who is in a backlog is accepted."""
        for listener in self.listeners:
            listener.stop_accepting()
            listener.accept_backlog()
            listening.rest(listener.socket)
        self.listeners, self._resting = [], self.listeners

    def listen_again(self) -> None:
        """After make_room(). OSError if another program has taken the place meanwhile: then it has no listener."""
        self.listeners, self._resting = self._resting, []
        try:
            for listener in self.listeners:
                listening.listen_again(listener.socket)
                listener.start_accepting()
        except OSError:
            for listener in self.listeners:
                listener.close()
            self.listeners = []
            self.prepared.listeners.clear()
            raise

    @property
    def counters(self) -> SharedCounters:
        return self.prepared.counters

    @property
    def is_monitored(self) -> bool:
        """Whether a drift concerns it."""
        return self.prepared.proved.lever in levers.MONITORED

    def uses(self, family: int) -> bool:
        """Whether it has an upstream address of the family now."""
        return any(address.family == family for address in self.prepared.resolver.addresses)

    def note_failed_connects(self) -> None:
        """Have names resolved again if connects have failed since the last call."""
        failed = self.counters.total(Counter.CONNECT_FAIL) + self.counters.total(Counter.POLICY_REFUSED)
        if failed != self._failed_connects:
            self._failed_connects = failed
            self.prepared.resolver.refresh()


class RouteTable:
    """See the module."""

    def __init__(
        self,
        loop: EventLoop,
        pool: WorkerPool,
        reporter: Reporter,
        drain: ListenerDrain,
        log: Log,
        threadsafe: Callable[[Call], Call],
        room_beside: Callable[[int], int],
    ) -> None:
        """`threadsafe` makes a function one that other threads may call: it runs in the loop's.

        `room_beside`: for how many connections the descriptors suffice, beside so many routes.
        """
        self._room_beside, self._room, self._most_active = room_beside, 0, 0
        self._loop, self._pool, self._reporter, self._log, self._threadsafe = loop, pool, reporter, log, threadsafe
        self._drain = drain
        self.served: Dict[str, ServedRoute] = {}  # by name
        self._leaving: List[ServedRoute] = []
        self._ids = itertools.count(1)
        self._is_accepting = False
        self._timer = CallTimer(loop, self._each_second)
        self._drain_timer = CallTimer(loop, self._close_shared)
        self._ticks = False

    def __iter__(self) -> Iterator[ServedRoute]:
        return iter(self.served.values())

    @property
    def count(self) -> int:
        """Of those that are served, and those that have sessions still."""
        return len(self.served) + len(self._leaving)

    @property
    def active(self) -> int:
        """Open client connections of all routes."""
        return sum(metrics.active(served.counters) for served in (*self, *self._leaving))

    def log(self, served: ServedRoute, event: str, level: str, message: str) -> None:
        """A line about one route."""
        self._log(served.name, event, level, message)

    # Come

    def add(self, prepared: PreparedRoute) -> ServedRoute:
        """A route that the workers know already. Nothing is accepted before start_accepting()."""
        route, counters = prepared.route, prepared.counters
        self._reporter.add_route(prepared.args.number, route.name, counters, route.segments_warning)
        acceptor = self.acceptor_of(prepared, self._ids)
        served = ServedRoute(self._loop, prepared, acceptor, watches=not self._pool.accepts)
        self.served[route.name] = served
        self._count_routes()
        self._publish(served)
        return served

    def follow(self, served: ServedRoute) -> None:
        """Keep the addresses of its names fresh. Refused if there can be no thread for it."""
        resolver = served.prepared.resolver
        resolver.follow(self._threadsafe(partial(self._on_resolver, served)))
        if resolver.may_change:
            self._tick()

    def acceptor_of(self, prepared: PreparedRoute, ids: Iterator[int]) -> Acceptor:
        """What accepts its clients in this thread."""
        route, number = prepared.route, prepared.args.number
        before = partial(self._open_before, route.name)
        acceptor = Acceptor(
            route,
            prepared.counters.rows[ACCEPTOR_ROW],
            Clients(prepared.counters, prepared.proved.client_slots, route.max_connections_per_client, before),
            number=number,
            ids=ids,
            active=partial(self._active_of, route.name),
            dispatch=self._pool.dispatch,
            log_ratelimited=lambda level, why: self._log(route.name, level, level, why),
            has_room=self._has_room,
        )
        acceptor.upstreams = prepared.resolver.packed
        return acceptor

    def _count_routes(self) -> None:
        self._room = self._room_beside(self.count)

    def _has_room(self) -> bool:
        """Counted as Acceptor does with its limit: what is active now, or more."""
        self._most_active += 1
        if self._most_active > self._room:
            self._most_active = self.active + 1
        return self._most_active <= self._room

    def _active_of(self, name: str) -> int:
        """Also those from before a change: the limit is what the far end can bear."""
        return sum(metrics.active(one.counters) for one in (*self, *self._leaving) if one.name == name)

    def _open_before(self, name: str, client: bytes) -> int:
        """The same for one client address, where it was counted."""
        return sum(one.acceptor.clients.open_of(client) for one in self._leaving if one.name == name)

    def _on_resolver(self, served: ServedRoute, event: str, level: str, message: str) -> None:
        """Other addresses are in use before the line says so."""
        if self.served.get(served.name) is served:
            self._publish(served)
            self.log(served, event, level, message)

    def _publish(self, served: ServedRoute) -> None:
        served.acceptor.upstreams = served.prepared.resolver.packed
        if self._pool.accepts and self._is_accepting:
            self._pool.start_accepting(served.prepared.resolver.packed)

    # Accept

    def start_accepting(self) -> None:
        """All routes, here or in the worker."""
        self._is_accepting = True
        for served in self:
            self._publish(served)
            self.start_listening(served)

    def start_listening(self, served: ServedRoute) -> None:
        """One that was added since."""
        for listener in served.listeners if self._is_accepting else []:
            listener.start_accepting()

    def stop_accepting(self) -> None:
        """At once, and for good. Clients wait in the backlogs."""
        self._is_accepting = False
        for served in self:
            for listener in served.listeners:
                listener.stop_accepting()

    # Go

    def remove(self, served: ServedRoute, kept: Sequence[socket]) -> None:
        """Accept for it no more; its sessions go on. Of its listeners those in `kept` stay open, for another route."""
        served.prepared.resolver.stop()
        served.stop_listening(kept, self._drain)
        if self._drain.needs(served.acceptor):
            self._drain_timer.arm(PAUSE_S)
        if self.served.get(served.name) is served:
            del self.served[served.name]
        self._leaving.append(served)
        self._count_routes()
        self._tick()

    def _close_shared(self) -> None:
        """Those on a port that another instance has, too, take some looks to close without a loss."""
        if self._drain.step():
            self._drain_timer.arm(PAUSE_S)

    def _tick(self) -> None:
        """See to it that the second goes on: reloads in quick succession must not put it off."""
        if not self._ticks:
            self._ticks = True
            self._timer.arm(_SECOND_S)

    def _each_second(self) -> None:
        self._ticks = False
        for served in self:
            if served.prepared.resolver.may_change:
                served.note_failed_connects()
        for served in list(self._leaving):
            self._see_off(served)
        if self._leaving or any(served.prepared.resolver.may_change for served in self):
            self._tick()

    def _see_off(self, served: ServedRoute) -> None:
        """A second after its last session has ended there is no trace of it on its way, and all may forget it."""
        served.acceptor.redispatch()
        if metrics.active(served.counters) or self._drain.needs(served.acceptor):
            return
        if served.ended is None:
            served.ended = self._pool.consumption()
        elif served.ended():
            self._leaving.remove(served)
            self._count_routes()
            self._pool.remove_route(served.number)
            self._reporter.end_route(served.number)
