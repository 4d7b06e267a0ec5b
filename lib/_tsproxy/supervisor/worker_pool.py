"""All workers, as the main thread sees them: a round-robin of inboxes, orders for all, and a replacement for each that dies."""

from __future__ import annotations

import socket
import time
from typing import Dict, List, NamedTuple, Optional, Sequence, Set, Tuple

from _tsproxy.linux import wakeup
from _tsproxy.proxy import inbox
from _tsproxy.stats.counters import ACCEPTOR_ROW, Counter, SharedCounters
from _tsproxy.supervisor.fork_server import ForkServer
from _tsproxy.supervisor.worker_args import WorkerArgs, WorkerShared
from _tsproxy.supervisor.worker_slots import InterpreterSlot, ProcessSlot, ThreadSlot, WorkerSlot

_QUICK_S = 1.0  # a worker that lives no longer than this ...
_TRIES = 3  # ... so often in a row will not live at all


_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0  # before a replacement is tried again: doubled each time


class WorkerExit(NamedTuple):
    """A worker that ended without being told to."""

    number: int
    exit_status: str
    connections: int  # that it had
    obstacle: str  # why there will be no replacement; "" if there is one, or may be later
    delay: str  # why there is none yet; "" if there is


class Retry(NamedTuple):
    """One more try to start a replacement where there was none yet."""

    number: int
    obstacle: str  # as above
    delay: str


class _Backoff(NamedTuple):
    """A slot that waits for a replacement."""

    until: float
    pause_s: float


class WorkerPool:
    """Make it before any thread is started: under `processes` it forks."""

    def __init__(
        self, shared: WorkerShared, shared_counters: SharedCounters, records_fd: int, listeners: Sequence[socket.socket] = ()
    ) -> None:
        """A worker that is the only one accepts by itself, if it is given the listeners; the order OPEN lets it."""
        self.exited = wakeup.create()
        self._counters_of_all = shared_counters
        self._next = 0
        kept = {shared_counters.fd, records_fd, shared.evidence_fd, *(fd for asked in shared.asked.values() for fd in asked)}
        self._fork_server = ForkServer(kept, self.exited) if shared.config.runtime == "processes" else None
        self.accepts = bool(listeners)
        self._slots = _slots(
            shared, shared_counters, records_fd, self.exited, self._fork_server, tuple(sock.fileno() for sock in listeners)
        )
        self._abandoned: Set[int] = set()  # slots that nobody will sit on any more
        self._restart_after: Dict[int, _Backoff] = {}  # number -> when to try again
        self._started = [0.0] * len(self._slots)
        self._quick = [0] * len(self._slots)
        self._asked = [0] * len(self._slots)  # the last entry of each inbox at the last ping
        self._notices: Dict[Tuple[int, int], int] = {}  # slot's number and kind -> the last such entry in its inbox
        self._ending = False
        self._pending_commands: List[Tuple[WorkerSlot, inbox.Message]] = []  # in order

    def start(self) -> None:
        """Start them all. OSError if one can't be."""
        for number, slot in enumerate(self._slots):
            self._started[number] = time.monotonic()
            slot.start()

    @property
    def watched(self) -> List[int]:
        """Descriptors that become readable when replace_the_dead() or loss() may have something to tell."""
        return [self.exited.reader] if self._fork_server is None else [self.exited.reader, self._fork_server.fileno()]

    @property
    def children(self) -> List[int]:
        """The processes that somebody here waits for."""
        return self._fork_server.pids if self._fork_server else []

    def dispatch(self, message: inbox.Message) -> bool:
        """Give an entry to the next worker that is there and has room; False if none has."""
        for _ in self._slots:
            turn, self._next = self._next, (self._next + 1) % len(self._slots)
            if turn not in self._abandoned and turn not in self._restart_after and self._slots[turn].box.put(message):
                return True
        return False

    def send_command(self, kind: int, upstreams: bytes = b"") -> None:
        """Send an order to all; OPEN goes with addresses. After DRAIN or KILL a worker that ends has done as it was told."""
        self._ending = self._ending or kind in (inbox.DRAIN, inbox.KILL)
        self._pending_commands += [(slot, inbox.Message(kind, upstreams=upstreams)) for slot in self._slots]
        self.send_pending_commands()

    def notify(self, kind: int) -> None:
        """Have all look again at something. Not again while one of that kind waits; without room it is left out."""
        for number, slot in enumerate(self._slots):
            if slot.box.has_consumed(self._notices.get((number, kind), 0)) and slot.box.put(inbox.Message(kind)):
                self._notices[number, kind] = slot.box.last_put

    def send_pending_commands(self) -> None:
        """Put the orders that an inbox had no room for, in their order. Call it again and again while `owes`."""
        full: Set[WorkerSlot] = set()
        pending, self._pending_commands = self._pending_commands, []
        for slot, send_command in pending:
            if slot in full or not slot.box.put(send_command):
                full.add(slot)
                self._pending_commands.append((slot, send_command))

    @property
    def has_pending_commands(self) -> bool:
        """Whether an order waits for room."""
        return bool(self._pending_commands)

    @property
    def has_handled_all(self) -> bool:
        """Whether each worker has emptied its inbox, and so taken each order that was given."""
        return not self._pending_commands and all(slot.box.is_empty for slot in self._slots)

    def ping(self) -> None:
        """See to it that each inbox has had something to take, for all_answered() to ask about: a do-nothing order at least."""
        for slot in self._slots:
            if slot.box.is_empty:
                slot.box.put(inbox.Message(inbox.PING))
        self._asked = [slot.box.last_put for slot in self._slots]

    def all_answered(self) -> bool:
        """Whether each worker has taken what was in its inbox at the last ping, however much has come since.

        One that has ended owes no answer: it has done as it was told, or is to be replaced.
        """
        return all(slot.box.has_consumed(asked) or not slot.is_alive for slot, asked in zip(self._slots, self._asked))

    def replace_exited(self) -> List[WorkerExit]:
        """After `gone` was rung: a replacement for each worker that should still be there. Its inbox and row go on."""
        self.exited.collect()
        if self._ending:
            return []
        missed = self._abandoned | self._restart_after.keys()
        slots = [(number, slot) for number, slot in enumerate(self._slots) if number not in missed]
        return [self._replace(number, slot) for number, slot in slots if not slot.is_alive]

    @property
    def retry_s(self) -> Optional[float]:
        """Seconds until try_again() has something to do; None if nobody is absent."""
        if self._ending or not self._restart_after:
            return None
        return max(0.0, min(backoff.until for backoff in self._restart_after.values()) - time.monotonic())

    def try_again(self) -> List[Retry]:
        """Try to start the replacements whose time has come. Their inboxes and rows have waited."""
        now = time.monotonic()
        due = [] if self._ending else [number for number, backoff in self._restart_after.items() if backoff.until <= now]
        return [Retry(number, *self._fill(number, self._slots[number])) for number in due]

    def fork_server_exit(self) -> str:
        """How the process that starts workers ended: told once; "" while it is there, or where none is needed."""
        return self._fork_server.own_exit() if self._fork_server else ""

    def _replace(self, number: int, slot: WorkerSlot) -> WorkerExit:
        exit_status, lost = slot.exit_status, self._counters_of_all.write_off(number)
        self._counters_of_all.rows[ACCEPTOR_ROW][Counter.LOST_WITH_WORKER] += lost
        now = time.monotonic()
        self._quick[number] = self._quick[number] + 1 if now - self._started[number] < _QUICK_S else 0
        return WorkerExit(number, exit_status, lost, *self._fill(number, slot))

    def _fill(self, number: int, slot: WorkerSlot) -> Tuple[str, str]:
        """Start a replacement; (why there will be none, why there is none yet)."""
        before, obstacle = self._restart_after.pop(number, None), self._obstacle(number, slot)
        if obstacle:
            self._abandoned.add(number)
            return obstacle, ""
        try:
            slot.box.redispatch()
            slot.start()
        except OSError as problem:  # of tasks, memory or descriptors
            pause_s = min(2 * before.pause_s, _LONGEST_PAUSE_S) if before else _PAUSE_S
            self._restart_after[number] = _Backoff(time.monotonic() + pause_s, pause_s)
            return "", str(problem.strerror)
        self._started[number] = time.monotonic()
        self._counters_of_all.rows[ACCEPTOR_ROW][Counter.WORKER_RESTARTS] += 1
        return "", ""

    def _obstacle(self, number: int, slot: WorkerSlot) -> str:
        if self._quick[number] >= _TRIES:
            return "its successors die at once"
        return "" if slot.can_start else "nobody can start a successor"

    @property
    def alive(self) -> bool:
        """Whether any worker still runs."""
        return any(slot.is_alive for slot in self._slots)


def _slots(
    shared: WorkerShared,
    shared_counters: SharedCounters,
    records_fd: int,
    exited: wakeup.Wakeup,
    fork_server: Optional[ForkServer],
    listeners: Tuple[int, ...],
) -> List[WorkerSlot]:
    numbers = range(shared.config.workers)
    if fork_server:
        channels = [inbox.ChannelProducer(shared_counters.worker(number)) for number in numbers]
        nowhere = inbox.Channel(-1)  # the fork server puts the number in under which it got the worker's end
        return [
            ProcessSlot(
                WorkerArgs(number, *shared, shared_counters.fd, nowhere, records_fd, exited, listeners),
                channels[number],
                fork_server,
            )
            for number in numbers
        ]
    kind = InterpreterSlot if shared.config.runtime == "interpreters" else ThreadSlot
    rings = [inbox.create_ring() for _ in numbers]
    boxes = [inbox.RingProducer(ring, shared_counters.worker(number)) for number, ring in enumerate(rings)]
    return [
        kind(WorkerArgs(number, *shared, shared_counters.fd, rings[number], records_fd, exited, listeners), boxes[number])
        for number in numbers
    ]
