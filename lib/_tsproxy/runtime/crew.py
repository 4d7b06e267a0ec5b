"""All workers, as the main thread sees them: a round-robin of inboxes, orders for all, and a successor for each that dies."""

from __future__ import annotations

import socket
import time
from typing import Dict, List, NamedTuple, Optional, Sequence, Set, Tuple

from _tsproxy.dataplane import inbox
from _tsproxy.host import wakeup
from _tsproxy.runtime.seats import InterpreterSeat, ProcessSeat, Seat, ThreadSeat
from _tsproxy.runtime.spec import Plan, Spec
from _tsproxy.runtime.zygote import Zygote
from _tsproxy.telemetry.counters import ACCEPTOR_ROW, Counter, Ledger

_QUICK_S = 1.0  # a worker that lives no longer than this ...
_TRIES = 3  # ... so often in a row will not live at all


_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0  # before a successor is tried again: doubled each time


class Death(NamedTuple):
    """A worker that ended without being told to."""

    number: int
    fate: str
    connections: int  # that it had
    obstacle: str  # why there will be no successor; "" if there is one, or may be later
    delay: str  # why there is none yet; "" if there is


class Retry(NamedTuple):
    """One more try to start a successor where there was none yet."""

    number: int
    obstacle: str  # as above
    delay: str


class _Absence(NamedTuple):
    """A seat that waits for a successor."""

    until: float
    pause_s: float


class Crew:
    """Make it before any thread is started: under `processes` it forks."""

    def __init__(self, plan: Plan, ledger: Ledger, records_fd: int, listeners: Sequence[socket.socket] = ()) -> None:
        """A worker that is the only one accepts by itself, if it is given the listeners; the order OPEN lets it."""
        self.gone = wakeup.create()
        self._ledger = ledger
        self._next = 0
        shared = {ledger.fd, records_fd, plan.evidence_fd, *(fd for asked in plan.asked.values() for fd in asked)}
        self._zygote = Zygote(shared, self.gone) if plan.config.runtime == "processes" else None
        self.accepts = bool(listeners)
        self._seats = _seats(plan, ledger, records_fd, self.gone, self._zygote, tuple(sock.fileno() for sock in listeners))
        self._vacant: Set[int] = set()  # seats that nobody will sit on any more
        self._absent: Dict[int, _Absence] = {}  # number -> when to try again
        self._started = [0.0] * len(self._seats)
        self._quick = [0] * len(self._seats)
        self._asked = [0] * len(self._seats)  # the last entry of each inbox at the last ping
        self._notices: Dict[Tuple[int, int], int] = {}  # seat's number and kind -> the last such entry in its inbox
        self._ending = False
        self._owed: List[Tuple[Seat, inbox.Entry]] = []  # in order

    def start(self) -> None:
        """Start them all. OSError if one can't be."""
        for number, seat in enumerate(self._seats):
            self._started[number] = time.monotonic()
            seat.start()

    @property
    def watched(self) -> List[int]:
        """Descriptors that become readable when replace_the_dead() or loss() may have something to tell."""
        return [self.gone.reader] if self._zygote is None else [self.gone.reader, self._zygote.fileno()]

    @property
    def children(self) -> List[int]:
        """The processes that somebody here waits for."""
        return self._zygote.pids if self._zygote else []

    def hand(self, entry: inbox.Entry) -> bool:
        """Give an entry to the next worker that is there and has room; False if none has."""
        for _ in self._seats:
            turn, self._next = self._next, (self._next + 1) % len(self._seats)
            if turn not in self._vacant and turn not in self._absent and self._seats[turn].box.put(entry):
                return True
        return False

    def order(self, kind: int, upstreams: bytes = b"") -> None:
        """Send an order to all; OPEN goes with addresses. After DRAIN or KILL a worker that ends has done as it was told."""
        self._ending = self._ending or kind in (inbox.DRAIN, inbox.KILL)
        self._owed += [(seat, inbox.Entry(kind, upstreams=upstreams)) for seat in self._seats]
        self.deliver()

    def notify(self, kind: int) -> None:
        """Have all look again at something. Not again while one of that kind waits; without room it is left out."""
        for number, seat in enumerate(self._seats):
            if seat.box.has_taken(self._notices.get((number, kind), 0)) and seat.box.put(inbox.Entry(kind)):
                self._notices[number, kind] = seat.box.put_last

    def deliver(self) -> None:
        """Put the orders that an inbox had no room for, in their order. Call it again and again while `owes`."""
        full: Set[Seat] = set()
        owed, self._owed = self._owed, []
        for seat, order in owed:
            if seat in full or not seat.box.put(order):
                full.add(seat)
                self._owed.append((seat, order))

    @property
    def owes(self) -> bool:
        """Whether an order waits for room."""
        return bool(self._owed)

    @property
    def has_obeyed(self) -> bool:
        """Whether each worker has emptied its inbox, and so taken each order that was given."""
        return not self._owed and all(seat.box.is_empty for seat in self._seats)

    def ping(self) -> None:
        """See to it that each inbox has had something to take, for all_answered() to ask about: a do-nothing order at least."""
        for seat in self._seats:
            if seat.box.is_empty:
                seat.box.put(inbox.Entry(inbox.PING))
        self._asked = [seat.box.put_last for seat in self._seats]

    def all_answered(self) -> bool:
        """Whether each worker has taken what was in its inbox at the last ping, however much has come since.

        One that has ended owes no answer: it has done as it was told, or is to be replaced.
        """
        return all(seat.box.has_taken(asked) or not seat.is_alive for seat, asked in zip(self._seats, self._asked))

    def replace_the_dead(self) -> List[Death]:
        """After `gone` was rung: a successor for each worker that should still be there. Its inbox and row go on."""
        self.gone.collect()
        if self._ending:
            return []
        missed = self._vacant | self._absent.keys()
        seats = [(number, seat) for number, seat in enumerate(self._seats) if number not in missed]
        return [self._replace(number, seat) for number, seat in seats if not seat.is_alive]

    @property
    def retry_s(self) -> Optional[float]:
        """Seconds until try_again() has something to do; None if nobody is absent."""
        if self._ending or not self._absent:
            return None
        return max(0.0, min(absence.until for absence in self._absent.values()) - time.monotonic())

    def try_again(self) -> List[Retry]:
        """Try to start the successors whose time has come. Their inboxes and rows have waited."""
        now = time.monotonic()
        due = [] if self._ending else [number for number, absence in self._absent.items() if absence.until <= now]
        return [Retry(number, *self._fill(number, self._seats[number])) for number in due]

    def loss(self) -> str:
        """How the process that starts workers ended: told once; "" while it is there, or where none is needed."""
        return self._zygote.loss() if self._zygote else ""

    def _replace(self, number: int, seat: Seat) -> Death:
        fate, lost = seat.fate, self._ledger.write_off(number)
        self._ledger.rows[ACCEPTOR_ROW][Counter.LOST_WITH_WORKER] += lost
        now = time.monotonic()
        self._quick[number] = self._quick[number] + 1 if now - self._started[number] < _QUICK_S else 0
        return Death(number, fate, lost, *self._fill(number, seat))

    def _fill(self, number: int, seat: Seat) -> Tuple[str, str]:
        """Start a successor; (why there will be none, why there is none yet)."""
        before, obstacle = self._absent.pop(number, None), self._obstacle(number, seat)
        if obstacle:
            self._vacant.add(number)
            return obstacle, ""
        try:
            seat.box.offer_again()
            seat.start()
        except OSError as problem:  # of tasks, memory or descriptors
            pause_s = min(2 * before.pause_s, _LONGEST_PAUSE_S) if before else _PAUSE_S
            self._absent[number] = _Absence(time.monotonic() + pause_s, pause_s)
            return "", str(problem.strerror)
        self._started[number] = time.monotonic()
        self._ledger.rows[ACCEPTOR_ROW][Counter.WORKER_RESTARTS] += 1
        return "", ""

    def _obstacle(self, number: int, seat: Seat) -> str:
        if self._quick[number] >= _TRIES:
            return "its successors die at once"
        return "" if seat.can_start else "nobody can start a successor"

    @property
    def alive(self) -> bool:
        """Whether any worker still runs."""
        return any(seat.is_alive for seat in self._seats)


def _seats(
    plan: Plan,
    ledger: Ledger,
    records_fd: int,
    gone: wakeup.Wakeup,
    zygote: Optional[Zygote],
    listeners: Tuple[int, ...],
) -> List[Seat]:
    numbers = range(plan.config.workers)
    if zygote:
        channels = [inbox.ChannelProducer(ledger.worker(number)) for number in numbers]
        nowhere = inbox.Channel(-1)  # the zygote puts the number in under which it got the worker's end
        return [
            ProcessSeat(Spec(number, *plan, ledger.fd, nowhere, records_fd, gone, listeners), channels[number], zygote)
            for number in numbers
        ]
    kind = InterpreterSeat if plan.config.runtime == "interpreters" else ThreadSeat
    rings = [inbox.create_ring() for _ in numbers]
    boxes = [inbox.RingProducer(ring, ledger.worker(number)) for number, ring in enumerate(rings)]
    return [
        kind(Spec(number, *plan, ledger.fd, rings[number], records_fd, gone, listeners), boxes[number]) for number in numbers
    ]
