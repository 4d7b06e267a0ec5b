"""Reads the file of routes again, and serves what it says: all of it or, if anything in it can't be had, nothing.

What may block (names, the policy) is done in a thread; then one step in the loop's thread swaps the listeners and the routes.
Knows the table of routes and the file. Knows nothing of signals, or of the sessions. It is imported at the start, if at all: a
user without rights (--user) may have none to read Python's own files.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import threading
import time
import traceback
from functools import partial
from socket import socket
from typing import Any, Callable, Iterator, List, Mapping, NamedTuple, Sequence, Tuple

from _tsproxy.cli import config as configuration
from _tsproxy.cli import routes as routes_file
from _tsproxy.cli.config import Config, Route, UsageError
from _tsproxy.cli.exits import Exit
from _tsproxy.linux import needs
from _tsproxy.linux.printable import printable
from _tsproxy.supervisor import listening, startup
from _tsproxy.supervisor.drain import ListenerDrain
from _tsproxy.supervisor.host_policy import HostPolicy
from _tsproxy.supervisor.resolver import resolve_all
from _tsproxy.supervisor.route_table import RouteTable, ServedRoute
from _tsproxy.supervisor.startup import PreparedRoute, ProvedRoute
from _tsproxy.supervisor.worker_pool import WorkerPool

Place = Tuple[str, int, str]  # bind, port and, of port 0, the route's name
_GOES_ON = "everything goes on as it was"
_SHOWN = 160  # characters of a problem in STATUS, which `systemctl status` shows in one line


class Plan(NamedTuple):
    """What is to be served: all routes of the file, and of those that are new or changed what was found out."""

    asked: Config
    proved: Sequence[ProvedRoute]


class Done(NamedTuple):
    """What came of a reload: why nothing, or how many routes were added, removed, changed and left alone."""

    problem: str = ""
    counts: Mapping[str, Any] = {}
    served: Sequence[ServedRoute] = ()  # those that are new or changed


class Reload:
    """See the module. One at a time: what is asked for meanwhile is done after it, once."""

    def __init__(
        self,
        config: Config,
        table: RouteTable,
        pool: WorkerPool,
        host: HostPolicy,
        handed: Mapping[str, List[socket]],
        nofile: int,
        drain: ListenerDrain,
        *,
        call_soon: Callable[[Callable[[], None]], None],
        on_done: Callable[[Done], None],
    ) -> None:
        """`handed`: sockets of the service manager, by name. `call_soon` runs a function in the loop's thread."""
        self._config, self._table, self._pool, self._host = config, table, pool, host
        self._handed, self._nofile, self._drain = handed, nofile, drain
        self._call_soon, self._on_done = call_soon, on_done
        self.refusal = ""  # when and why the last one was refused, in one printable line; "" if it was not
        self._numbers = len(config.routes)
        self._runs = self._is_asked = self._is_stopped = False

    def request(self) -> None:
        """Begin, or begin again when the one that runs is done."""
        if self._runs:
            self._is_asked = True
            return
        self._runs, self._is_asked = True, False
        now = {served.name: served.prepared.route for served in self._table if served.prepared.listeners}
        thread = threading.Thread(target=self._run, args=(now,), name="reload", daemon=True)
        try:
            needs.start_thread(thread, "to read the routes again")
        except OSError as problem:
            self._finish(Done(str(problem.strerror)))

    def stop(self) -> None:
        """The end has come: nothing is served any more by one that runs."""
        self._is_stopped = True

    def _run(self, now: Mapping[str, Route]) -> None:
        """In the thread."""
        try:
            then = partial(self._apply, self._plan(now))
        except (UsageError, Exit, OSError, MemoryError) as problem:
            then = partial(self._finish, Done(_told(problem)))
        except Exception:
            then = partial(self._finish, Done(traceback.format_exc()))
        self._call_soon(then)

    def _plan(self, now: Mapping[str, Route]) -> Plan:
        config = self._config
        found = routes_file.load(str(config.routes_file), config.defaults or configuration.Route(()), self._handed.keys())
        asked = config._replace(routes=found.routes, places=found.places)
        fresh = [route for route in asked.routes if now.get(route.name) != route]
        startup.require_limits(asked, asked.routes, self._nofile)
        resolvers = [startup.resolver_of(route) for route in fresh]
        resolve_all(resolvers)
        return Plan(asked, startup.prove(asked, fresh, resolvers, self._host) if fresh else ())

    # In the loop's thread

    def _apply(self, plan: Plan) -> None:
        if self._is_stopped:
            return
        try:
            done = self._swap(plan)
        except (Exit, OSError, MemoryError) as problem:
            done = Done(_told(problem))
        except Exception:  # a bug must not end the sessions of all routes
            done = Done(traceback.format_exc())
        self._finish(done)

    def _finish(self, done: Done) -> None:
        if self._is_stopped:
            return
        self._runs = False
        self.refusal = _refusal(done.problem) if done.problem else ""
        self._on_done(done._replace(problem=f"{done.problem.rstrip('.')}; {_GOES_ON}") if done.problem else done)
        if self._is_asked:
            self.request()

    def _swap(self, plan: Plan) -> Done:
        before = dict(self._table.served)
        names, fresh = {route.name for route in plan.asked.routes}, [of_route.route.name for of_route in plan.proved]
        going = [served for name, served in before.items() if name not in names or name in fresh]
        staying = [served for name, served in before.items() if served not in going]
        prepared = self._prepare(plan, going, staying)
        kept = [sock for of_route in prepared for sock in of_route.listeners]
        for served in going:
            self._table.remove(served, [*kept, *self._handed.get(served.name, ())])
        come = [self._begin(of_route) for of_route in prepared]
        counts = {
            "added": len(names - before.keys()),
            "removed": len(before.keys() - names),
            "changed": len(before.keys() & fresh),
            "unchanged": len(staying),
        }
        return Done(counts=counts, served=come)

    def _prepare(self, plan: Plan, going: Sequence[ServedRoute], staying: Sequence[ServedRoute]) -> List[PreparedRoute]:
        """All that can fail. Exit, or OSError without descriptors or memory, with everything put back."""
        if plan.proved:
            startup.require_room(plan.asked, self._table.count + len(plan.proved), self._table.active, self._nofile)
        with contextlib.ExitStack() as undo:
            counters = undo.enter_context(contextlib.ExitStack())
            counted = [self._counted(of_route, counters) for of_route in plan.proved]
            swap = ListenerSwap(plan.asked, going, self._handed, self._drain, undo, self._on_lost)
            found = swap.listeners(plan.proved)
            every = [*((served.prepared.proved, served.prepared.listeners) for served in staying), *zip(plan.proved, found)]
            startup.refuse_circles(plan.asked, *zip(*every))
            prepared = [of_route._replace(listeners=listeners) for of_route, listeners in zip(counted, found)]
            for of_route in prepared:
                with startup.naming(plan.asked, of_route.route):
                    listening.listen(of_route.listeners, plan.asked.reuse_port, starts=False)
            counters.pop_all()  # no descriptor is closed that workers may have been told of
            for of_route in prepared:
                self._pool.add_route(of_route.args, of_route.counters)
            undo.pop_all()
        for of_route in prepared:
            for sock in of_route.listeners:
                listening.reuse(sock, of_route.route)
        return prepared

    def _counted(self, proved: ProvedRoute, undo: contextlib.ExitStack) -> PreparedRoute:
        """With counters, and no listener so far. No number is used again."""
        number, self._numbers = self._numbers, self._numbers + 1
        prepared = startup.with_counters(proved, [], number, self._config.workers, pickle.dumps)
        undo.callback(prepared.counters.close)
        return prepared

    def _on_lost(self, served: ServedRoute, problem: OSError) -> None:
        self._table.log(served, "error", "error", f"{problem.strerror}: it listens no more; its connections go on")

    def _begin(self, prepared: PreparedRoute) -> ServedRoute:
        served = self._table.add(prepared)
        try:
            self._table.follow(served)
        except OSError as problem:  # no thread: too late to refuse the file
            self._table.log(served, "error", "error", f"{problem.strerror}; until the next reload the first answer counts")
        self._table.start_listening(served)
        return served


def _told(problem: Exception) -> str:
    if isinstance(problem, MemoryError):  # RLIMIT_AS, mostly: the text of it is empty
        return os.strerror(errno.ENOMEM)
    return str(problem.strerror or problem) if isinstance(problem, OSError) else str(problem)


def _refusal(problem: str) -> str:
    """Its first line, or the last one of a bug's traceback, which names it. In local time, as the journal has it."""
    lines = problem.strip().splitlines()
    text = printable(lines[-1] if lines[0].startswith("Traceback") else lines[0])
    shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    return f"reload refused at {time.strftime('%b %d %H:%M:%S')}: {shown}"


class ListenerSwap:
    """Finds the listeners of new and changed routes: those of routes that go, where the place is the same, or new ones."""

    def __init__(
        self,
        config: Config,
        going: Sequence[ServedRoute],
        handed: Mapping[str, List[socket]],
        drain: ListenerDrain,
        undo: contextlib.ExitStack,
        on_lost: Callable[[ServedRoute, OSError], None],
    ) -> None:
        """What has to be undone if anything fails later is pushed on `undo`. `on_lost`: a listener that can't be had again."""
        self._config, self._handed, self._drain, self._undo, self._on_lost = config, handed, drain, undo, on_lost
        self._free = {served.name: served for served in going if served.name not in handed}
        self._at = {place: served for served in self._free.values() for place in _places(served)}

    def listeners(self, proved: Sequence[ProvedRoute]) -> List[List[socket]]:
        """Those of each route. Exit if one can't be had."""
        found = {of_route.route.name: self._kept(of_route.route) for of_route in proved}
        missing = [of_route for of_route in proved if not found[of_route.route.name]]
        for of_route in sorted(missing, key=lambda one: len(self._in_the_way(one.route))):
            found[of_route.route.name] = self._new(of_route)
        return [found[of_route.route.name] for of_route in proved]

    def _kept(self, route: Route) -> List[socket]:
        """Handed over; or one that listens there already: of any route that goes, or that went a moment ago."""
        if route.name in self._handed:
            return self._handed[route.name]
        there = self._at.get(_place(route))
        if there and there.name in self._free:
            return self._free.pop(there.name).prepared.listeners
        return self._drain.take_back(route.bind, route.port, self._undo)

    def _in_the_way(self, route: Route) -> List[ServedRoute]:
        """Those that go, and listen where this one could not meanwhile."""
        ports = [served for served in self._free.values() if served.prepared.route.port == route.port != 0]
        return [served for served in ports if _may_overlap(served.prepared.route.bind, route.bind)]

    def _new(self, of_route: ProvedRoute) -> List[socket]:
        for served in self._in_the_way(of_route.route):
            self._free.pop(served.name).make_room()
            self._undo.callback(self._put_back, served)
        with startup.naming(self._config, of_route.route):
            made = listening.listeners(of_route.route, self._config.reuse_port, of_route.ends, starts=False)
        for sock in made:
            self._undo.callback(sock.close)
        return made

    def _put_back(self, served: ServedRoute) -> None:
        try:
            served.listen_again()
        except OSError as problem:
            self._on_lost(served, problem)


def _may_overlap(bind: str, other: str) -> bool:
    """As routes_file.overlap(), and :: may take IPv4 too: to make room where there is no need costs no client."""
    return routes_file.overlap(bind, other) or "::" in (bind, other)


def _place(route: Route) -> Place:
    """Where it listens, as its options say: with port 0 where it listens already, but no other route does."""
    return route.bind, route.port, "" if route.port else route.name


def _places(served: ServedRoute) -> Iterator[Place]:
    """Where it listens: as its options say, and with the port that was chosen for port 0."""
    route = served.prepared.route
    yield _place(route)
    yield from ((route.bind, sock.getsockname()[1], "") for sock in served.prepared.listeners)
