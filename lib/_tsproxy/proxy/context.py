"""What sessions share: of one worker its loop, pipes and records; of one route in it buffer, counters, policy gate, settings.

Only the worker's thread uses it. Knows no session. Does nothing by itself.
"""

from __future__ import annotations

import functools
import itertools
import time
import traceback
from collections import defaultdict
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from _tsproxy.linux.addresses import Address, unpack
from _tsproxy.linux.limits import PIPES_A_WORKER
from _tsproxy.linux.sockets import Egress, Tuning
from _tsproxy.loop.event_loop import EventLoop
from _tsproxy.proxy.buffers import Buffers, PrefixViews
from _tsproxy.proxy.gate import PolicyGate
from _tsproxy.proxy.liveness import Liveness
from _tsproxy.proxy.pipes import Pipes
from _tsproxy.proxy.registry import Registry
from _tsproxy.stats.counters import LONGEST_RELAY, LOOP_LAG, Counter, observe
from _tsproxy.stats.records import ConnectionRecord, Notice, RecordWriter

_LOG_NS = 1_000_000_000
_MOST_ADDRESSES = 256

TsvalOf = Callable[[bytes], Optional[int]]  # the TSval in a client's saved SYN, if it offered one


class SessionSettings(NamedTuple):
    """The part of the configuration that a session needs; times in nanoseconds, 0 is off."""

    tuning: Tuning
    connect_timeout_ns: int
    idle_timeout_ns: int
    half_close_timeout_ns: int
    log_connections: bool
    log_debug: bool
    zero_copy: bool
    egress: Egress = Egress()
    route: int = 0  # its number


class WorkerContext:
    """What the sessions of all routes share in one worker."""

    def __init__(self, number: int, counters: memoryview, records: RecordWriter, spin_ns: int = 0) -> None:
        """`counters` is the worker's row of those of the process."""
        self.number, self.counters, self.records = number, counters, records
        self.loop = EventLoop(spin_ns=spin_ns, on_lag=functools.partial(observe, counters, LOOP_LAG))
        self.pipes = Pipes(PIPES_A_WORKER)
        self._buffers: Dict[int, Buffers] = {}  # by size

    def buffers_of(self, size: int) -> Buffers:
        """The pool for all routes with this buffer size: what one has spare, another may take."""
        if size not in self._buffers:
            self._buffers[size] = Buffers(size)
        return self._buffers[size]

    def report(self, bug: Exception) -> None:
        """Count a bug outside any session, and log its traceback."""
        self.counters[Counter.BUGS] += 1
        self.records.put(Notice(self.number, time.time_ns(), "error", _traceback(bug)))

    def close(self) -> None:
        """Close the loop and the pipes."""
        self.loop.close()
        self.pipes.close()


class RouteContext:
    """What the sessions of one route share in one worker. `prefixes` are the slices of `buffer`, of `buffer_size` bytes."""

    def __init__(
        self,
        worker: WorkerContext,
        settings: SessionSettings,
        gate: PolicyGate,
        tsval_of: TsvalOf,
        counters: memoryview,
        sources: Sequence[Address],
        buffer_size: int,
    ) -> None:
        """`counters` is the worker's row of those of the route."""
        self.number, self.loop, self.records = worker.number, worker.loop, worker.records
        self.settings, self.gate, self.tsval_of, self.counters = settings, gate, tsval_of, counters
        self.buffers = worker.buffers_of(buffer_size)
        self.buffer = self.buffers.acquire()
        self.prefixes = PrefixViews(self.buffer)
        self.buffer_size = buffer_size  # a receive of this size has not emptied the socket, and may be of a long stream
        self.pipes = worker.pipes if settings.zero_copy else Pipes(0)
        self.liveness = Liveness(settings.tuning.user_timeout_ms)
        self.registry = Registry(self.loop.timers, self.liveness.step_ns)
        self.longest_ns = counters[LONGEST_RELAY]  # a copy for the hot path: an attribute is read faster
        self._sources = _by_family(sources)
        self._addresses: Dict[bytes, Address] = {}
        self._logged: Dict[str, int] = defaultdict(lambda: -_LOG_NS)

    def record(self, ended: ConnectionRecord) -> None:
        """Write the record after close(2) of its sockets, given to close_later(): no byte is acknowledged after the line.

        And write(2) to a pipe wakes the reporter, which may run before this thread goes on.
        """
        self.loop.after_close(functools.partial(self.records.put, ended))

    def swap_buffer(self) -> memoryview:
        """The buffer with the bytes just received, for a direction to keep; the worker receives into another from now on."""
        kept, self.buffer = self.buffer, self.buffers.acquire()
        self.prefixes = PrefixViews(self.buffer)
        return kept

    def sources(self, family: int) -> List[Optional[Address]]:
        """Source addresses to try, rotated by one per call; [None] without --source, so that the kernel chooses."""
        if family not in self._sources:
            return [None]
        ring, count = self._sources[family]
        tries: List[Optional[Address]] = list(itertools.islice(ring, count + 1))
        return tries[:count]

    def address_of(self, packed: bytes) -> Address:
        """The Address of packed upstream one. There are few, and each connection needs one, so they are kept."""
        address = self._addresses.get(packed)
        if address is None:
            if len(self._addresses) >= _MOST_ADDRESSES:  # a name whose addresses change for months
                self._addresses.clear()
            address = self._addresses[packed] = unpack(packed)
        return address

    def count(self, counter: Counter, by: int = 1) -> None:
        """Add to one of the route's counters."""
        self.counters[counter] += by

    def relay_took_longest(self, took_ns: int) -> None:
        """Store a new maximum of the time to relay."""
        self.longest_ns = max(took_ns, self.counters[LONGEST_RELAY])
        self.counters[LONGEST_RELAY] = self.longest_ns

    def count_client(self, client_slot: int, ended: bool = False) -> None:
        """Count one more session of a client as begun or ended; `client_slot` is its index in the row, 0: not counted."""
        if client_slot:
            self.counters[client_slot + ended] += 1

    def log_ratelimited(self, level: str, about: str, message: str) -> None:
        """Log a line; about the same thing once a second at most."""
        now = time.monotonic_ns()
        if now - self._logged[about] >= _LOG_NS:
            self._logged[about] = now
            self.records.put(Notice(self.number, time.time_ns(), level, message, self.settings.route))

    def report(self, bug: Exception) -> None:
        """Count a bug and log its traceback."""
        self.count(Counter.BUGS)
        self.log_ratelimited("error", "bug", _traceback(bug))


def _traceback(bug: Exception) -> str:
    return "".join(traceback.format_exception(type(bug), bug, bug.__traceback__))


def _by_family(sources: Sequence[Address]) -> Dict[int, Tuple[Iterator[Address], int]]:
    families = {source.family for source in sources}
    return {family: _ring([source for source in sources if source.family == family]) for family in families}


def _ring(sources: List[Address]) -> Tuple[Iterator[Address], int]:
    return itertools.cycle(sources), len(sources)
