"""A worker: one thread's loop over the descriptors of its connections.

Knows its inbox, its workbench and, if it is the only worker, its doors. Knows nothing of other workers, of who may come
in, or of how it was started: plain numbers and shared memory go in, records and counters come out.
"""

from __future__ import annotations

import time
import traceback
from typing import Any, Callable, List, Optional

from _tsproxy.dataplane.door import Door
from _tsproxy.dataplane.inbox import (
    ACCEPTED,
    DRAIN,
    DRIFTED,
    EVIDENCE,
    KILL,
    LEAVE,
    OPEN,
    Consumer,
    Entry,
)
from _tsproxy.dataplane.poller import ENDED, READ, READABLE
from _tsproxy.dataplane.posted import BULK, ENDING, NEW
from _tsproxy.dataplane.relay import Relay
from _tsproxy.dataplane.timers import Timers
from _tsproxy.dataplane.workbench import Workbench
from _tsproxy.telemetry.counters import LOOP_LAG, Counter, note
from _tsproxy.telemetry.endings import Ending
from _tsproxy.telemetry.records import Connection

_BATCH = 256
_SAMPLE_NS = 100_000_000
_RETRIES = 16  # of those that wait for evidence, at a time: each may cost a connect(2)
_LONGEST_S = 86400.0  # epoll_wait(2) takes milliseconds as an int: 24.8 days would be too long


class _Sample:
    """A timer that does nothing but be late, once in 100 ms while there are events: an idle loop need not wake for it."""

    is_armed = False

    def arm(self, timers: Timers, now_ns: int) -> None:
        """Events come."""
        self.is_armed = True
        timers.arm(self, now_ns + _SAMPLE_NS)

    def on_deadline(self, now_ns: int) -> None:
        """The next event arms it again."""
        self.is_armed = False


class Worker:
    """Runs until it was told to drain and its last connection has ended, or was told to end now."""

    lane = NEW

    def __init__(self, bench: Workbench, inbox: Consumer, busy_poll_us: int = 0) -> None:
        """With `busy_poll_us` the loop spins that long after the last event before it sleeps."""
        self.bench, self._inbox = bench, inbox
        self._spin_ns = busy_poll_us * 1000
        self._draining = False
        self._sample = _Sample()
        self._retries: List[Relay] = []  # those that wait to connect and have not been told that there is an answer
        self.doors: List[Door] = []
        self.upstreams = b""  # where clients that come in by a door are to go
        bench.watch(inbox.fileno, READ, self)

    def run(self) -> None:
        """The loop. What raises in a connection's handler is a bug: that connection is closed, the others go on."""
        bench = self.bench
        wait, handlers, clock = bench.poller.wait, bench.handlers, time.monotonic_ns
        posted, waiting = bench.posted, bench.posted.masks
        last_event, sample = clock(), self._sample
        while waiting or not (self._draining and not bench.relays):
            due = bench.timers.next_ns()
            spinning = bool(waiting) or bench.woke - last_event < self._spin_ns
            events = wait(0 if spinning else self._patience_s(due), _BATCH)
            woke = bench.woke = clock()
            if events:
                last_event = woke
                if not sample.is_armed:
                    sample.arm(bench.timers, woke)
            for fd, mask in events:
                try:
                    handler = handlers[fd]
                except KeyError:  # closed by an earlier event of this turn, or here but not yet by who handed it over
                    continue
                try:
                    if mask == READABLE and not handler.lane:
                        handler.readable()
                    elif waiting or len(events) > 1:
                        posted.put(ENDING if mask & ENDED else handler.lane or BULK, fd, mask, woke)
                    else:  # it is alone: nobody waits for it
                        handler.ready(mask)
                except Exception as bug:
                    self._contain(handler, bug)
            if waiting:
                now = clock()
                posted.serve(self._handle, now, now - woke)
                bench.woke = woke
            if due is not None and due <= woke:
                self._expire(due)
            if bench.buried:
                bench.close_buried()

    def _handle(self, fd: int, mask: int, since: int) -> None:
        """The turn of a posted event has come."""
        handler = self.bench.handlers[fd]
        self.bench.woke = since
        try:
            handler.ready(mask)
        except Exception as bug:
            self._contain(handler, bug)
        if self.bench.buried:
            self.bench.close_buried()

    def close(self) -> None:
        """End what there is (after a bug outside any connection, there may be some) and close the poller."""
        self._shut_doors()
        self._end_all(Ending.BUG)
        self.bench.close()

    def _patience_s(self, due: Optional[int]) -> float:
        """How long to sleep at most; -1 is for ever."""
        return -1 if due is None else min(max(0, due - self.bench.woke) / 1e9, _LONGEST_S)

    def _expire(self, due: int) -> None:
        """What was due; how late that is shows how long the loop was kept from it, by its own work or for want of a CPU."""
        note(self.bench.counters, LOOP_LAG, time.monotonic_ns() - due)
        for relay in self.bench.timers.due(self.bench.woke):
            self._expire_one(relay)

    def _expire_one(self, owner: Any) -> None:
        self._guard(owner, lambda: owner.on_deadline(self.bench.woke))

    def _guard(self, owner: Any, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as bug:
            self._contain(owner, bug)

    def readable(self) -> None:
        """The inbox has entries: take one."""
        entry = self._inbox.take()
        if entry is None:
            return
        if entry.kind == ACCEPTED:
            self.begin(entry)
        elif entry.kind == OPEN:
            self._open_doors(entry.upstreams)
        else:
            self._obey(entry.kind)
        if self._inbox.has_more:
            self.bench.posted.put(NEW, self._inbox.fileno, READABLE, self.bench.woke)

    def ready(self, mask: int) -> None:
        """Any other event of the inbox's descriptor: look, too."""
        self.readable()

    def _open_doors(self, upstreams: bytes) -> None:
        self.upstreams = upstreams
        for door in self.doors:
            door.open()

    def _shut_doors(self) -> None:
        while self.doors:
            self.doors.pop().close()

    def begin(self, entry: Entry) -> bool:
        """A client, from the inbox or by a door: connect and relay. There is always room: True."""
        self.bench.count_client(entry.pair)
        self.bench.count(Counter.BEGUN)
        if entry.fd < 0:
            self._lose(entry)
            return True
        relay = Relay(self.bench, entry)
        try:
            relay.start()
        except Exception as bug:
            self._contain(relay, bug)
        return True

    def _lose(self, entry: Entry) -> None:
        """The kernel could not give us the client's descriptor (SCM_RIGHTS, EMFILE), and has closed it with a FIN."""
        bench = self.bench
        bench.count_client(entry.pair, ended=True)
        bench.count(Counter.ENDED)
        bench.complain("error", "no fd", "a client was lost: out of file descriptors: raise LimitNOFILE (ulimit -n)")
        if bench.rules.log_connections:
            bench.records.put(
                Connection(
                    worker=bench.index,
                    connection_id=entry.connection_id,
                    closed_at_ns=time.time_ns(),
                    client=entry.client,
                    upstream=None,
                    upstream_local=None,
                    duration_us=(time.monotonic_ns() - entry.accepted_ns) // 1000,
                    connect_us=None,
                    rx_bytes=0,
                    tx_bytes=0,
                    upstream_tx_bytes=0,
                    discarded_bytes=0,
                    unacknowledged_bytes=0,
                    client_timestamps=None,
                    upstream_timestamps=None,
                    client_syn_tsval=None,
                    upstream_rtt_us=None,
                    upstream_retransmits=None,
                    ending=Ending.NO_DESCRIPTORS,
                    witness=bench.gate.witness,
                )
            )

    def _obey(self, order: int) -> None:
        """LEAVE: accept no more. DRAIN: and go when the last connection has ended. KILL: end them all now.

        DRIFTED: those end that would leak from now on. EVIDENCE: there are new answers for those that wait to connect.
        """
        self._draining = self._draining or order in (DRAIN, KILL)
        if order in (LEAVE, DRAIN, KILL):
            self._shut_doors()
        if order == KILL:
            self._end_all(Ending.DRAIN)
        elif order == DRIFTED:
            for relay in [relay for relay in self.bench.relays.values() if relay.has_drifted]:
                self._guard(relay, relay.on_drift)
        elif order == EVIDENCE:
            self._retries = list(self.bench.waiting)
            self.on_deadline(self.bench.woke)

    def on_deadline(self, now_ns: int) -> None:
        """Some of those that wait to connect may try; the others soon: who is established shall not wait for all of them."""
        batch, self._retries = self._retries[:_RETRIES], self._retries[_RETRIES:]
        for relay in batch:
            if relay in self.bench.waiting:
                self._expire_one(relay)
        if self._retries:
            self.bench.timers.arm(self, now_ns + 1)

    def _end_all(self, ending: Ending) -> None:
        for relay in list(self.bench.relays.values()):
            self._end(relay, ending)

    def _end(self, relay: Relay, ending: Ending) -> None:
        """End it; a bug in that must not keep the others from their end."""
        try:
            relay.end(ending)
        except Exception as bug:
            self._report(bug)

    def _contain(self, handler: Any, bug: Exception) -> None:
        """Say what happened, close that connection, and go on; a bug outside any connection ends the worker."""
        self._report(bug)
        owner = getattr(handler, "owner", handler)
        if owner is self:
            raise bug
        if isinstance(owner, Relay):  # else it had ended already, and let go of what handled its events
            self._end(owner, Ending.BUG)

    def _report(self, bug: Exception) -> None:
        self.bench.count(Counter.BUGS)
        self.bench.complain("error", "bug", "".join(traceback.format_exception(type(bug), bug, bug.__traceback__)))
