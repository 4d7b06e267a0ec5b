"""A worker: one thread's loop over the descriptors of its connections.

Knows its inbox, its context and, if it is the only worker, its listeners. Knows nothing of other workers, of who may
connect, or of how it was started: plain numbers and shared memory go in, records and counters come out.
"""

from __future__ import annotations

import time
import traceback
from typing import Any, Callable, List, Optional

from _tsproxy.loop.poller import ENDED, READ, READABLE
from _tsproxy.loop.posted import BULK, ENDING, NEW
from _tsproxy.loop.timers import Timers
from _tsproxy.proxy.context import WorkerContext
from _tsproxy.proxy.inbox import ACCEPTED, DRAIN, DRIFTED, EVIDENCE, KILL, LEAVE, OPEN, Consumer, Message
from _tsproxy.proxy.listener import Listener
from _tsproxy.proxy.session import Session
from _tsproxy.stats.counters import LOOP_LAG, Counter, note
from _tsproxy.stats.endings import Ending
from _tsproxy.stats.records import ConnectionRecord

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

    def __init__(self, context: WorkerContext, inbox: Consumer, busy_poll_us: int = 0) -> None:
        """With `busy_poll_us` the loop spins that long after the last event before it sleeps."""
        self.context, self._inbox = context, inbox
        self._spin_ns = busy_poll_us * 1000
        self._draining = False
        self._sample = _Sample()
        self._retries: List[Session] = []  # those that wait to connect and have not been told that there is an answer
        self.listeners: List[Listener] = []
        self.upstreams = b""  # where clients that come in by a listener are to go
        context.watch(inbox.fileno, READ, self)

    def run(self) -> None:
        """The loop. What raises in a connection's handler is a bug: that connection is closed, the others go on."""
        context = self.context
        wait, handlers, clock = context.poller.wait, context.handlers, time.monotonic_ns
        posted, waiting = context.posted, context.posted.masks
        last_event, sample = clock(), self._sample
        while waiting or not (self._draining and not context.sessions):
            due = context.timers.next_ns()
            spinning = bool(waiting) or context.loop_now - last_event < self._spin_ns
            events = wait(0 if spinning else self._patience_s(due), _BATCH)
            loop_now = context.loop_now = clock()
            if events:
                last_event = loop_now
                if not sample.is_armed:
                    sample.arm(context.timers, loop_now)
            for fd, mask in events:
                try:
                    handler = handlers[fd]
                except KeyError:  # closed by an earlier event of this iteration, or here but not yet by who handed it over
                    continue
                try:
                    if mask == READABLE and not handler.lane:
                        handler.readable()
                    elif waiting or len(events) > 1:
                        posted.put(ENDING if mask & ENDED else handler.lane or BULK, fd, mask, loop_now)
                    else:  # it is alone: nobody waits for it
                        handler.ready(mask)
                except Exception as bug:
                    self._contain(handler, bug)
            if waiting:
                now = clock()
                posted.serve(self._handle, now, now - loop_now)
                context.loop_now = loop_now
            if due is not None and due <= loop_now:
                self._expire(due)
            if context.pending_close:
                context.close_pending()

    def _handle(self, fd: int, mask: int, since: int) -> None:
        """The turn of a posted event has come."""
        handler = self.context.handlers[fd]
        self.context.loop_now = since
        try:
            handler.ready(mask)
        except Exception as bug:
            self._contain(handler, bug)
        if self.context.pending_close:
            self.context.close_pending()

    def close(self) -> None:
        """End what there is (after a bug outside any connection, there may be some) and close the poller."""
        self._close_listeners()
        self._end_all(Ending.BUG)
        self.context.close()

    def _patience_s(self, due: Optional[int]) -> float:
        """How long to sleep at most; -1 is for ever."""
        return -1 if due is None else min(max(0, due - self.context.loop_now) / 1e9, _LONGEST_S)

    def _expire(self, due: int) -> None:
        """What was due; how late that is shows how long the loop was kept from it, by its own work or for want of a CPU."""
        note(self.context.counters, LOOP_LAG, time.monotonic_ns() - due)
        for session in self.context.timers.due(self.context.loop_now):
            self._expire_one(session)

    def _expire_one(self, owner: Any) -> None:
        self._guard(owner, lambda: owner.on_deadline(self.context.loop_now))

    def _guard(self, owner: Any, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as bug:
            self._contain(owner, bug)

    def readable(self) -> None:
        """The inbox has entries: take one."""
        message = self._inbox.take()
        if message is None:
            return
        if message.kind == ACCEPTED:
            self.begin(message)
        elif message.kind == OPEN:
            self._start_accepting(message.upstreams)
        else:
            self._handle_command(message.kind)
        if self._inbox.has_more:
            self.context.posted.put(NEW, self._inbox.fileno, READABLE, self.context.loop_now)

    def ready(self, mask: int) -> None:
        """Any other event of the inbox's descriptor: look, too."""
        self.readable()

    def _start_accepting(self, upstreams: bytes) -> None:
        self.upstreams = upstreams
        for listener in self.listeners:
            listener.open()

    def _close_listeners(self) -> None:
        while self.listeners:
            self.listeners.pop().close()

    def begin(self, message: Message) -> bool:
        """A client, from the inbox or by a listener: connect and relay. There is always room: True."""
        self.context.count_client(message.client_slot)
        self.context.count(Counter.BEGUN)
        if message.fd < 0:
            self._lose(message)
            return True
        session = Session(self.context, message)
        try:
            session.start()
        except Exception as bug:
            self._contain(session, bug)
        return True

    def _lose(self, message: Message) -> None:
        """The kernel could not give us the client's descriptor (SCM_RIGHTS, EMFILE), and has closed it with a FIN."""
        context = self.context
        context.count_client(message.client_slot, ended=True)
        context.count(Counter.ENDED)
        context.log_ratelimited("error", "no fd", "a client was lost: out of file descriptors: raise LimitNOFILE (ulimit -n)")
        if context.settings.log_connections:
            context.records.put(
                ConnectionRecord(
                    worker=context.index,
                    connection_id=message.connection_id,
                    closed_at_ns=time.time_ns(),
                    client=message.client,
                    upstream=None,
                    upstream_local=None,
                    duration_us=(time.monotonic_ns() - message.accepted_ns) // 1000,
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
                    witness=context.gate.witness,
                )
            )

    def _handle_command(self, command: int) -> None:
        """LEAVE: accept no more. DRAIN: and go when the last connection has ended. KILL: end them all now.

        DRIFTED: those end that would leak from now on. EVIDENCE: there are new answers for those that wait to connect.
        """
        self._draining = self._draining or command in (DRAIN, KILL)
        if command in (LEAVE, DRAIN, KILL):
            self._close_listeners()
        if command == KILL:
            self._end_all(Ending.DRAIN)
        elif command == DRIFTED:
            for session in [session for session in self.context.sessions.values() if session.has_drifted]:
                self._guard(session, session.on_drift)
        elif command == EVIDENCE:
            self._retries = list(self.context.waiting)
            self.on_deadline(self.context.loop_now)

    def on_deadline(self, now_ns: int) -> None:
        """Some of those that wait to connect may try; the others soon: who is established shall not wait for all of them."""
        batch, self._retries = self._retries[:_RETRIES], self._retries[_RETRIES:]
        for session in batch:
            if session in self.context.waiting:
                self._expire_one(session)
        if self._retries:
            self.context.timers.arm(self, now_ns + 1)

    def _end_all(self, ending: Ending) -> None:
        for session in list(self.context.sessions.values()):
            self._end(session, ending)

    def _end(self, session: Session, ending: Ending) -> None:
        """End it; a bug in that must not keep the others from their end."""
        try:
            session.end(ending)
        except Exception as bug:
            self._report(bug)

    def _contain(self, handler: Any, bug: Exception) -> None:
        """Say what happened, close that connection, and go on; a bug outside any connection ends the worker."""
        self._report(bug)
        owner = getattr(handler, "owner", handler)
        if owner is self:
            raise bug
        if isinstance(owner, Session):  # else it had ended already, and let go of what handled its events
            self._end(owner, Ending.BUG)

    def _report(self, bug: Exception) -> None:
        self.context.count(Counter.BUGS)
        self.context.log_ratelimited("error", "bug", "".join(traceback.format_exception(type(bug), bug, bug.__traceback__)))
