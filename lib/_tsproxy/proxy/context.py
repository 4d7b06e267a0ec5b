"""What all connections of one worker share: its buffer, poller, timers, counters, records and rules.

One thread owns it. Relays and directions work on it; it does nothing by itself.
"""

from __future__ import annotations

import itertools
import socket
import time
from collections import defaultdict
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple

from _tsproxy.linux.addresses import Address
from _tsproxy.linux.limits import PIPES_A_WORKER
from _tsproxy.linux.sockets import Tuning
from _tsproxy.loop.poller import Poller
from _tsproxy.loop.posted import Posted
from _tsproxy.loop.timers import Timers
from _tsproxy.proxy.buffers import Buffers, PrefixViews
from _tsproxy.proxy.gate import Gate
from _tsproxy.proxy.liveness import Liveness
from _tsproxy.proxy.pipes import Pipes
from _tsproxy.proxy.sweep import SessionSweep
from _tsproxy.stats.counters import LONGEST_RELAY, Counter
from _tsproxy.stats.records import ConnectionRecord, Notice, RecordWriter

_COMPLAINT_NS = 1_000_000_000
_COUNT_NS = 1_000_000_000  # how late the metrics may be about what peers have acknowledged


TsvalOf = Callable[[bytes], Optional[int]]  # the TSval in a client's saved SYN, if it offered one


class SessionSettings(NamedTuple):
    """The part of the configuration that a connection needs; times in nanoseconds, 0 is off."""

    tuning: Tuning
    connect_timeout_ns: int
    idle_timeout_ns: int
    half_close_timeout_ns: int
    log_connections: bool
    log_debug: bool
    zero_copy: bool


class WorkerContext:
    """See the module. `woke` is when the event that is being handled came.

    `handlers` maps a descriptor to what takes its events. `heads` are the slices of `buffer`.
    """

    def __init__(
        self,
        index: int,
        settings: SessionSettings,
        gate: Gate,
        tsval_of: TsvalOf,
        counters: memoryview,
        records: RecordWriter,
        sources: Sequence[Address],
        buffer_size: int,
    ) -> None:
        self.index, self.settings, self.gate = index, settings, gate
        self.tsval_of = tsval_of
        self.counters, self.records = counters, records
        self.buffers = Buffers(buffer_size)
        self.buffer = self.buffers.take()
        self.prefixes = PrefixViews(self.buffer)
        self.buffer_size = buffer_size  # a receive of this size has not emptied the socket, and may be of a stream
        self.pipes = Pipes(PIPES_A_WORKER if settings.zero_copy else 0)
        self.poller = Poller()
        self.posted = Posted()
        self.timers = Timers()
        self.handlers: Dict[int, Any] = {}
        self.sessions: Dict[int, Any] = {}  # connection id -> relay, all that are alive
        self.waiting: Set[Any] = set()  # those of them that wait for the gate to know
        self.liveness = Liveness(self.timers, self.sessions, settings.tuning.user_timeout_ms)
        self._counts = SessionSweep(self.timers, self.sessions, _COUNT_NS, lambda session, _: session.count_acknowledged())
        self.loop_now = time.monotonic_ns()
        self.longest_ns = counters[LONGEST_RELAY]  # as far as the hot path knows: an attribute is read faster
        self._sources = _by_family(sources)
        self.pending_close: List[socket.SocketType] = []
        self._closing: List[ConnectionRecord] = []  # whose they were
        self._complained: Dict[str, int] = defaultdict(lambda: -_COMPLAINT_NS)

    def begin_sweeps(self, now_ns: int) -> None:
        """There is a connection that relays."""
        self.liveness.begin(now_ns)
        self._counts.begin(now_ns)

    def watch(self, fd: int, events: int, handler: Any) -> None:
        """Hand these events of the descriptor to `handler` from now on."""
        self.poller.expect(fd, events)
        self.handlers[fd] = handler

    def close_later(self, sock: socket.SocketType) -> None:
        """Stop watching a socket now and close it at the end of the iteration: its number must not come back within it."""
        fd = sock.fileno()
        self.handlers.pop(fd, None)
        self.poller.forget(fd)
        self.posted.drop(fd)
        self.pending_close.append(sock)

    def record(self, ended: ConnectionRecord) -> None:
        """Write the record once its sockets are closed: no byte is acknowledged after the line."""
        self._closing.append(ended)

    def close_pending(self) -> None:
        """Close(2) what close_later() was given, then write the records: a write to a pipe lets its reader run first."""
        for sock in self.pending_close:
            sock.close()
        self.pending_close.clear()
        for ended in self._closing:
            self.records.put(ended)
        self._closing.clear()

    def swap_buffer(self) -> memoryview:
        """The buffer with the bytes just received, for a direction to keep; the worker goes on with another."""
        kept, self.buffer = self.buffer, self.buffers.take()
        self.prefixes = PrefixViews(self.buffer)
        return kept

    def sources(self, family: int) -> List[Optional[Address]]:
        """The local addresses to try for one connect, each once, beginning one further each time; [None] if any will do."""
        if family not in self._sources:
            return [None]
        ring, count = self._sources[family]
        tries: List[Optional[Address]] = list(itertools.islice(ring, count + 1))
        return tries[:count]

    def count(self, counter: Counter, by: int = 1) -> None:
        """Add to one of this worker's counters."""
        self.counters[counter] += by

    def relay_took_longest(self, took_ns: int) -> None:
        """Note a time to relay that is longer than any before."""
        self.longest_ns = max(took_ns, self.counters[LONGEST_RELAY])
        self.counters[LONGEST_RELAY] = self.longest_ns

    def count_client(self, client_slot: int, ended: bool = False) -> None:
        """One more connection of a client has begun or ended; `pair` is where that is counted, 0 if it is not."""
        if client_slot:
            self.counters[client_slot + ended] += 1

    def log_ratelimited(self, level: str, about: str, message: str) -> None:
        """Say something in the log, about the same thing once a second at most."""
        now = time.monotonic_ns()
        if now - self._complained[about] >= _COMPLAINT_NS:
            self._complained[about] = now
            self.records.put(Notice(self.index, time.time_ns(), level, message))

    def close(self) -> None:
        """Close what is pending close, the pipes and the poller; let go of the handlers, which know the worker's context."""
        self.close_pending()
        self.handlers.clear()
        self.pipes.close()
        self.poller.close()


def _by_family(sources: Sequence[Address]) -> Dict[int, Tuple[Iterator[Address], int]]:
    families = {source.family for source in sources}
    return {family: _ring([source for source in sources if source.family == family]) for family in families}


def _ring(sources: List[Address]) -> Tuple[Iterator[Address], int]:
    return itertools.cycle(sources), len(sources)
