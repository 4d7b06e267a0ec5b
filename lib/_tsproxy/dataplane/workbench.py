"""What all connections of one worker share: its buffer, poller, timers, counters, records and rules.

One thread owns it. Relays and halves work on it; it does nothing by itself.
"""

from __future__ import annotations

import itertools
import socket
import time
from collections import defaultdict
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple

from _tsproxy.dataplane.buffers import Buffers, Heads
from _tsproxy.dataplane.gate import Gate
from _tsproxy.dataplane.liveness import Liveness
from _tsproxy.dataplane.pipes import Pipes
from _tsproxy.dataplane.poller import Poller
from _tsproxy.dataplane.posted import Posted
from _tsproxy.dataplane.rounds import Rounds
from _tsproxy.dataplane.timers import Timers
from _tsproxy.host.addresses import Address
from _tsproxy.host.limits import PIPES_A_WORKER
from _tsproxy.host.sockets import Tuning
from _tsproxy.telemetry.counters import LONGEST_RELAY, Counter
from _tsproxy.telemetry.records import Connection, Notice, RecordWriter

_COMPLAINT_NS = 1_000_000_000
_COUNT_NS = 1_000_000_000  # how late the metrics may be about what peers have acknowledged


TsvalOf = Callable[[bytes], Optional[int]]  # the TSval in a client's saved SYN, if it offered one


class Rules(NamedTuple):
    """The part of the configuration that a connection needs; times in nanoseconds, 0 is off."""

    tuning: Tuning
    connect_timeout_ns: int
    idle_timeout_ns: int
    half_close_timeout_ns: int
    log_connections: bool
    log_debug: bool
    zero_copy: bool


class Workbench:
    """See the module. `woke` is when the event that is being handled came.

    `handlers` maps a descriptor to what takes its events. `heads` are the slices of `buffer`.
    """

    def __init__(
        self,
        index: int,
        rules: Rules,
        gate: Gate,
        tsval_of: TsvalOf,
        counters: memoryview,
        records: RecordWriter,
        sources: Sequence[Address],
        buffer_size: int,
    ) -> None:
        self.index, self.rules, self.gate = index, rules, gate
        self.tsval_of = tsval_of
        self.counters, self.records = counters, records
        self.buffers = Buffers(buffer_size)
        self.buffer = self.buffers.take()
        self.heads = Heads(self.buffer)
        self.full = buffer_size  # a receive of this size has not emptied the socket, and may be of a stream
        self.pipes = Pipes(PIPES_A_WORKER if rules.zero_copy else 0)
        self.poller = Poller()
        self.posted = Posted()
        self.timers = Timers()
        self.handlers: Dict[int, Any] = {}
        self.relays: Dict[int, Any] = {}  # connection id -> relay, all that are alive
        self.waiting: Set[Any] = set()  # those of them that wait for the gate to know
        self.liveness = Liveness(self.timers, self.relays, rules.tuning.user_timeout_ms)
        self._counts = Rounds(self.timers, self.relays, _COUNT_NS, lambda relay, _: relay.count_acknowledged())
        self.woke = time.monotonic_ns()
        self.longest_ns = counters[LONGEST_RELAY]  # as far as the hot path knows: an attribute is read faster
        self._sources = _by_family(sources)
        self.buried: List[socket.SocketType] = []
        self._closing: List[Connection] = []  # whose they were
        self._complained: Dict[str, int] = defaultdict(lambda: -_COMPLAINT_NS)

    def begin_rounds(self, now_ns: int) -> None:
        """There is a connection that relays."""
        self.liveness.begin(now_ns)
        self._counts.begin(now_ns)

    def watch(self, fd: int, events: int, handler: Any) -> None:
        """Hand these events of the descriptor to `handler` from now on."""
        self.poller.expect(fd, events)
        self.handlers[fd] = handler

    def bury(self, sock: socket.SocketType) -> None:
        """Stop watching a socket now and close it at the end of the turn: its number must not come back within it."""
        fd = sock.fileno()
        self.handlers.pop(fd, None)
        self.poller.forget(fd)
        self.posted.drop(fd)
        self.buried.append(sock)

    def record(self, ended: Connection) -> None:
        """Put its record once its sockets, which are buried, are closed: nothing is acknowledged any more behind the line."""
        self._closing.append(ended)

    def close_buried(self) -> None:
        """Close what was buried in this turn, then tell of it: to write to a pipe is to let its reader run first."""
        for sock in self.buried:
            sock.close()
        self.buried.clear()
        for ended in self._closing:
            self.records.put(ended)
        self._closing.clear()

    def swap_buffer(self) -> memoryview:
        """The buffer with the bytes just received, for a half to keep; the worker goes on with another."""
        kept, self.buffer = self.buffer, self.buffers.take()
        self.heads = Heads(self.buffer)
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

    def count_client(self, pair: int, ended: bool = False) -> None:
        """One more connection of a client has begun or ended; `pair` is where that is counted, 0 if it is not."""
        if pair:
            self.counters[pair + ended] += 1

    def complain(self, level: str, about: str, message: str) -> None:
        """Say something in the log, about the same thing once a second at most."""
        now = time.monotonic_ns()
        if now - self._complained[about] >= _COMPLAINT_NS:
            self._complained[about] = now
            self.records.put(Notice(self.index, time.time_ns(), level, message))

    def close(self) -> None:
        """Close what is buried, the pipes and the poller; let go of the handlers, which know the workbench."""
        self.close_buried()
        self.handlers.clear()
        self.pipes.close()
        self.poller.close()


def _by_family(sources: Sequence[Address]) -> Dict[int, Tuple[Iterator[Address], int]]:
    families = {source.family for source in sources}
    return {family: _ring([source for source in sources if source.family == family]) for family in families}


def _ring(sources: List[Address]) -> Tuple[Iterator[Address], int]:
    return itertools.cycle(sources), len(sources)
