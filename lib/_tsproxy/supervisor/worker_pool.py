"""All workers: spawned, reaped and replaced by the main thread, which dispatches clients and commands to their inboxes.

Knows slots, the loop and the counters. Knows nothing of what its observer does about an exit.
"""

from __future__ import annotations

import functools
import socket
from typing import Callable, Iterator, List, Mapping, NamedTuple, Optional, Protocol, Sequence, Tuple

from _tsproxy.linux.needs import needing
from _tsproxy.loop.event_loop import EventLoop
from _tsproxy.loop.poller import READ
from _tsproxy.proxy import inbox
from _tsproxy.proxy.inbox import Command, Message
from _tsproxy.stats.counters import ACCEPTOR_ROW, Counter, SharedCounters
from _tsproxy.supervisor.callbacks import CallTimer, OnReadable
from _tsproxy.supervisor.fork_server import ForkServer
from _tsproxy.supervisor.runners import InterpreterRunner, ProcessRunner, ThreadRunner
from _tsproxy.supervisor.worker_args import RouteArgs, WorkerArgs, WorkerShared
from _tsproxy.supervisor.worker_slot import WorkerSlot

_PENDING_S = 0.005  # until an inbox that was full is tried again


class Replacement(NamedTuple):
    """What came of the try to start one."""

    obstacle: str = ""  # why there will be none; "" if there is one, or may be later
    delay: str = ""  # why there is none yet; "" if there is


class WorkerExit(NamedTuple):
    """A worker that exited, though it was sent neither DRAIN nor KILL, or though it had connections left."""

    number: int
    exit_status: str
    connections: int  # that it had
    replacement: Optional[Replacement]  # None: it was to end


class PoolObserver(Protocol):
    """What the pool reports, in the loop's thread."""

    def on_worker_exit(self, worker_exit: WorkerExit) -> None:
        """Its replacement has been tried, if it is to have one."""
        ...

    def on_restart(self, number: int, replacement: Replacement) -> None:
        """A replacement that could not be started before was tried again."""
        ...

    def on_fork_server_exit(self, exit_status: str) -> None:
        """No process can be started any more. Called once, and before on_worker_exit() of workers that exited later."""
        ...


class WorkerPool:
    """See the module. Make it before any thread is started: with --runtime=processes it calls fork(2)."""

    def __init__(
        self,
        loop: EventLoop,
        observer: PoolObserver,
        shared: WorkerShared,
        counters: SharedCounters,
        of_routes: Mapping[int, SharedCounters],
        listeners: Sequence[socket.socket] = (),
    ) -> None:
        """`counters` are the process's, `of_routes` those of `shared.routes`, by number.

        With `listeners` the only worker accepts by itself, from start_accepting() on.
        """
        self._loop, self._observer, self._shared, self._counters = loop, observer, shared, counters
        self._of_routes = dict(of_routes)
        self._fork_server = ForkServer(shared) if shared.config.runtime == "processes" else None
        self.accepts = bool(listeners)
        fds = tuple(sock.fileno() for sock in listeners)
        self._slots = [self._make_slot(number, fds) for number in range(shared.config.workers)]
        self._next = 0  # slot
        self._upstreams = b""  # of workers that accept
        self._is_ending = False
        self._pending_timer = CallTimer(loop, self._send_pending)
        self._restart_timers = [CallTimer(loop, functools.partial(self._restart, slot)) for slot in self._slots]

    def _make_slot(self, number: int, listeners: Tuple[int, ...]) -> WorkerSlot:
        row = self._counters.worker(number)
        if self._fork_server:
            channel = inbox.ChannelProducer(row)
            # The fork server sets the number that it gets for the worker's end.
            args = WorkerArgs(number, self._shared, inbox.Channel(-1), listeners)
            return WorkerSlot(number, channel, ProcessRunner(args, channel, self._fork_server))
        ring = inbox.create_ring()
        kind = InterpreterRunner if self._shared.config.runtime == "interpreters" else ThreadRunner
        return WorkerSlot(number, inbox.RingProducer(ring, row), kind(WorkerArgs(number, self._shared, ring, listeners)))

    # Spawn

    def start(self) -> None:
        """Start them all, and watch for their exits. OSError if one can't be started."""
        with needing("epoll_ctl(2)", "to wait for events"):
            for fd in self._exit_fds:
                self._loop.watch(fd, READ, OnReadable(self.reap))
        for slot in self._slots:
            slot.start()

    @property
    def _exit_fds(self) -> List[int]:
        fork_server = [self._fork_server.fileno()] if self._fork_server else []
        return [self._shared.exited.reader, *fork_server]

    @property
    def children(self) -> List[int]:
        """Process ids that are waited for here, and by nobody else."""
        return self._fork_server.pids if self._fork_server else []

    @property
    def is_alive(self) -> bool:
        """Whether any worker still runs."""
        if self._fork_server:
            return self._fork_server.has_workers
        return any(slot.runner.is_alive for slot in self._slots)

    # Reap

    def reap(self) -> None:
        """Report who has exited, the fork server or a worker. Inbox and row of a worker are its replacement's."""
        self._shared.exited.collect()
        exit_status = self._fork_server.own_exit() if self._fork_server else ""
        if exit_status:
            self._observer.on_fork_server_exit(exit_status)
        for slot in self._slots:
            if not slot.is_vacant and not slot.runner.is_alive:
                self._reap_worker(slot, slot.runner.exit_status, sum(self._count_lost(slot.number)))

    def reap_all(self) -> None:
        """The same for all that have exited until now, also those whose exit is not reported yet. See ForkServer."""
        if self._fork_server:
            self._fork_server.await_reports()
        self.reap()

    def _reap_worker(self, slot: WorkerSlot, exit_status: str, lost: int) -> None:
        if self._is_ending:
            slot.is_abandoned = True
            if lost:
                self._observer.on_worker_exit(WorkerExit(slot.number, exit_status, lost, None))
            return
        slot.note_exit()
        self._observer.on_worker_exit(WorkerExit(slot.number, exit_status, lost, self._fill(slot)))
        if self._upstreams:
            self._send(Message(Command.START_ACCEPTING, upstreams=self._upstreams))

    def _count_lost(self, worker: int) -> Iterator[int]:
        """The sessions of each route that a worker had when it exited."""
        for counters in self._of_routes.values():
            lost = counters.count_lost(worker)
            counters.rows[ACCEPTOR_ROW][Counter.LOST_WITH_WORKER] += lost
            yield lost

    def _restart(self, slot: WorkerSlot) -> None:
        if not self._is_ending:
            self._observer.on_restart(slot.number, self._fill(slot))

    def _fill(self, slot: WorkerSlot) -> Replacement:
        if slot.obstacle:
            slot.is_abandoned = True
            return Replacement(obstacle=slot.obstacle)
        slot.inbox.redispatch()
        try:
            slot.start()
        except OSError as problem:  # EAGAIN, ENOMEM, EMFILE: too many tasks, no memory, no descriptors
            self._restart_timers[slot.number].arm(slot.backoff_s)
            return Replacement(delay=str(problem.strerror))
        self._counters.rows[ACCEPTOR_ROW][Counter.WORKER_RESTARTS] += 1
        return Replacement()

    # Manage

    def add_route(self, args: RouteArgs, counters: SharedCounters) -> None:
        """Have all workers serve a route as well: clients of it may be dispatched. Its counters have its arguments as note."""
        self._shared.routes[args.number], self._of_routes[args.number] = args, counters
        if self._fork_server:
            self._fork_server.add_route(args.number, counters.fd)
        self._send(Message(Command.ADD_ROUTE, counters.fd, route=args.number))

    def remove_route(self, number: int) -> None:
        """The opposite, for a route whose last session has ended."""
        del self._shared.routes[number], self._of_routes[number]
        if self._fork_server:
            self._fork_server.remove_route(number)
        self._send(Message(Command.REMOVE_ROUTE, route=number))

    def consumption(self) -> Callable[[], bool]:
        """What tells whether the workers have consumed all that they were sent until now."""
        marks = [(slot.inbox, slot.last_sent) for slot in self._slots]
        return lambda: all(inbox.has_consumed(mark) for inbox, mark in marks)

    def dispatch(self, message: Message) -> bool:
        """Put a message into the inbox of the next worker that runs and has room; False if none has."""
        for _ in self._slots:
            slot, self._next = self._slots[self._next], (self._next + 1) % len(self._slots)
            if not slot.is_vacant and slot.put(message):
                return True
        return False

    def start_accepting(self, upstreams: bytes) -> None:
        """Have the only worker accept by itself, and connect to these addresses; its replacements too."""
        if upstreams != self._upstreams:
            self._upstreams = upstreams
            self._send(Message(Command.START_ACCEPTING, upstreams=upstreams))

    def stop_accepting(self) -> None:
        """Have it accept no more; has_consumed_all tells when it does not."""
        self._send(Message(Command.STOP_ACCEPTING))

    def drain(self) -> None:
        """Have each worker exit when its last connection has ended. From now on one that exits has no replacement."""
        self._is_ending = True
        self._send(Message(Command.DRAIN))

    def kill(self) -> None:
        """Have each worker end its connections and exit."""
        self._is_ending = True
        self._send(Message(Command.KILL))

    def end(self) -> None:
        """Leave no process behind. Blocks for two seconds at most; call it last."""
        if self._fork_server:
            self._fork_server.end()
        for slot in self._slots:
            slot.inbox.close()

    def _send(self, message: Message) -> None:
        for slot in self._slots:
            slot.pending.append(message)
        self._send_pending()

    def _send_pending(self) -> None:
        full = [slot for slot in self._slots if not slot.send_pending()]
        if full:
            self._pending_timer.arm(_PENDING_S)

    @property
    def has_consumed_all(self) -> bool:
        """Whether each worker has consumed all that it was sent."""
        return all(slot.has_consumed_all for slot in self._slots)

    def notify(self, command: Command) -> None:
        """Have all workers look at something again; left out where one such command, or no room, is in the inbox."""
        for slot in self._slots:
            slot.notify(command)

    def ping(self) -> None:
        """See all_answered()."""
        for slot in self._slots:
            slot.ping()

    def all_answered(self) -> bool:
        """Whether each worker has consumed what its inbox held at the last ping()."""
        return all(slot.has_answered for slot in self._slots)
