"""One direction of a session: bytes from a source to a sink, in order, none lost, none kept longer than needed.

- Fast path: one recv_into(2), one send(2), through the worker's buffer. Partial sends, full buffers, EOF and errors leave it.
- Bytes that send(2) does not accept are pending: they stay where they arrived, and the source is not read until they are sent
  (backpressure). A direction keeps at most one buffer, or one pipe.
- FIN is passed on after the bytes before it. An error of either socket is reported to the session, which resets both.
- A source that keeps filling the buffer is spliced: its bytes go through a pipe by splice(2) while that is faster.

Knows two sockets and the worker's context. Knows nothing of how the session began or why it ends: it reports events to the
session. Both directions run this same code.
"""

from __future__ import annotations

import errno
import socket
from time import monotonic_ns
from typing import NamedTuple, Optional, Protocol, Tuple, Union

from _tsproxy.linux import uapi
from _tsproxy.loop.poller import READ, READ_EDGES, WRITE
from _tsproxy.loop.posted import BULK, NOW
from _tsproxy.proxy.context import RouteContext
from _tsproxy.proxy.liveness import Stall
from _tsproxy.proxy.pending import Pending, PendingBuffer
from _tsproxy.proxy.pipes import Pipe
from _tsproxy.proxy.states import EOF, FLUSHED, OPEN, SHUT, flow_after
from _tsproxy.stats.counters import RELAY, Counter, observe
from _tsproxy.stats.histogram import LINEAR_NS, STEP_NS, bucket


class DirectionCounters(NamedTuple):
    """Which counters a direction adds to."""

    received: int
    acknowledged: int
    paused: int


_SPLICE_AFTER = 4  # full buffers in a row
_SMALL = 16384  # bytes a splice that copying moves as fast ...
_UNSPLICE_AFTER = 4  # ... and how many such in a row end it
_BACK_OFF_NS = 100_000_000

TO_UPSTREAM = DirectionCounters(Counter.RECEIVED_DOWNSTREAM, Counter.ACKNOWLEDGED_UPSTREAM, Counter.PAUSED_DOWNSTREAM)
TO_DOWNSTREAM = DirectionCounters(Counter.RECEIVED_UPSTREAM, Counter.ACKNOWLEDGED_DOWNSTREAM, Counter.PAUSED_UPSTREAM)


class SessionEvents(Protocol):
    """What a direction reports to its session."""

    def on_event(self, direction: Direction, mask: int) -> None:
        """An event of the source's descriptor that is not plain EPOLLIN, or that was posted."""
        ...

    def on_broken_source(self, direction: Direction, error: OSError) -> None:
        """The source failed; nothing more can be received from it."""
        ...

    def on_broken_sink(self, direction: Direction, error: OSError) -> None:
        """The sink failed; nothing more can be sent to it."""
        ...

    def on_flow(self) -> None:
        """A direction's state or its pending bytes changed: so may the events and deadline to wait for."""
        ...

    def on_shut(self, direction: Direction) -> None:
        """A direction has passed on the FIN of its source, and had nothing pending."""
        ...

    def on_bug(self, bug: Exception) -> None:
        """A handler or timer of a direction raised."""
        ...


def make_directions(
    session: SessionEvents, context: RouteContext, client: socket.SocketType, upstream: socket.SocketType
) -> Tuple[Direction, Direction]:
    """to_upstream and to_downstream, each the other's reverse. detach() both when the session ends."""
    to_upstream = Direction(session, context, client, upstream, TO_UPSTREAM)
    to_downstream = Direction(session, context, upstream, client, TO_DOWNSTREAM)
    to_upstream.reverse, to_downstream.reverse = to_downstream, to_upstream
    return to_upstream, to_downstream


class Direction:
    """source -> sink: a handler of the source's descriptor, and the timer of its own back-off."""

    __slots__ = (
        "acknowledged",
        "acknowledged_before",
        "backing_off",
        "context",
        "counter_ids",
        "fd",
        "filled_at",
        "fills",
        "flow",
        "lane",
        "last_active_ns",
        "pending",
        "pending_since",
        "received",
        "received_slot",
        "reverse",
        "session",
        "sink",
        "source",
        "splicer",
        "stall",
        "unsent",
    )
    reverse: Direction

    def __init__(
        self,
        session: SessionEvents,
        context: RouteContext,
        source: socket.SocketType,
        sink: socket.SocketType,
        counter_ids: DirectionCounters,
    ) -> None:
        """Reads nothing before the loop calls readable()."""
        self.session, self.context, self.source, self.sink, self.counter_ids = session, context, source, sink, counter_ids
        self.fd = source.fileno()
        self.received_slot = int(counter_ids.received)  # a plain int: indexing with an IntEnum takes longer
        self.flow = OPEN
        self.lane = NOW  # BULK for the event after a full buffer
        self.received = 0
        self.unsent = 0  # received and not accepted by the sink's kernel: pending now, or discarded at the end
        self.acknowledged = 0  # by the sink's peer, as of the last TCP_INFO
        self.acknowledged_before = 0  # tcpi_bytes_acked of the sink before any byte: 1 if the SYN was ours
        self.pending: Optional[Pending] = None
        self.pending_since = 0
        self.splicer: Optional[Splicer] = None
        self.fills = self.filled_at = 0  # full buffers in a row, and `received` as of the last one
        self.last_active_ns = monotonic_ns()
        self.backing_off = False
        self.stall: Optional[Stall] = None  # what the last liveness check of the sink's peer found

    # Receiving and sending

    def readable(self) -> None:
        """Fast path: one receive, one send. Everything else leaves it."""
        context = self.context
        try:
            received = self.source.recv_into(context.buffer)
        except OSError as error:
            self.receive_failed(error)
            return
        if not received:
            self._end_of_file()
            return
        try:
            sent = self.sink.send(context.prefixes[received])
        except OSError as error:
            self._send_failed(received, error)
            return
        if sent != received or received == context.buffer_size:
            self._moved_much(received, sent)
            return
        self.received += received
        counters = context.counters
        counters[self.received_slot] += received
        self.last_active_ns = now = monotonic_ns()
        took = now - context.loop.now
        if took > context.longest_ns:
            context.relay_took_longest(took)
        if took < LINEAR_NS:
            counters[RELAY + took // STEP_NS] += 1
        else:
            counters[RELAY + bucket(took)] += 1

    def ready(self, mask: int) -> None:
        """Any event of the source's descriptor that is not plain EPOLLIN, or that was posted."""
        if self.lane == BULK:
            self.lane = NOW
        self.session.on_event(self, mask)

    def receive_failed(self, error: OSError) -> None:
        """recv(2) failed: spurious readiness, out of kernel memory, or the source is broken."""
        if error.errno in uapi.CAPACITY:
            self._back_off()
        elif error.errno not in uapi.RETRY:
            self.session.on_broken_source(self, error)

    def _send_failed(self, received: int, error: OSError) -> None:
        """send(2) failed: the bytes are pending if the sink is only full, else discarded."""
        if self.is_full(error):
            self._moved_much(received, 0)
        else:
            self.discard(received, error)

    def is_full(self, error: OSError) -> bool:
        """Whether the errno is temporary: EAGAIN, or no kernel memory (send(2), ENOBUFS and ENOMEM)."""
        if error.errno in uapi.CAPACITY:
            self.reverse._back_off()
            return True
        return error.errno in uapi.RETRY

    def discard(self, received: int, error: OSError) -> None:
        """The sink failed: count the received bytes as unsent, and report it to the session."""
        self.account(received, 0)
        self.session.on_broken_sink(self, error)

    def _moved_much(self, received: int, sent: int) -> None:
        """The receive filled the buffer, or the send was partial."""
        context = self.context
        self.account(received, sent)
        if received == context.buffer_size:
            self._filled()
        if sent != received:
            self.keep_pending(PendingBuffer(context.buffers, context.swap_buffer(), sent, received))
        else:
            self.note_relayed(context.loop.now)
            context.loop.poller.rearm(self.fd)  # a short receive has emptied the socket; this one has not

    def account(self, received: int, sent: int) -> None:
        """Count received bytes, and those of them that are unsent."""
        self.unsent += received - sent
        self.received += received
        self.context.counters[self.counter_ids.received] += received

    def note_relayed(self, since_ns: int) -> None:
        """The bytes received at `since_ns` are all sent now."""
        self.last_active_ns = now = monotonic_ns()
        observe(self.context.counters, RELAY, now - since_ns)

    # Backpressure

    def keep_pending(self, pending: Pending) -> None:
        """Keep the unsent bytes, and stop reading the source."""
        self.context.counters[self.counter_ids.paused] += 1
        self.pending, self.pending_since = pending, self.context.loop.now
        self.last_active_ns = monotonic_ns()
        self.session.on_flow()

    def drain(self) -> None:
        """EPOLLOUT of the sink: send pending bytes. When all are sent, read the source again, or pass on the FIN after them."""
        pending = self.pending
        if pending is None:
            return
        try:
            sent = pending.send(self.sink)
        except OSError as error:
            if not self.is_full(error):
                self.session.on_broken_sink(self, error)
            return
        self.unsent -= sent
        if pending.left:
            self.last_active_ns = monotonic_ns()
        else:
            self.note_relayed(self.pending_since)
            self._release_pending()
            if self.flow is OPEN or self._pass_on_fin():
                self.session.on_flow()

    def _release_pending(self) -> None:
        """Release the buffer of pending bytes; they are sent, or discarded."""
        if self.pending is not None:
            self.pending.release()
            self.pending = None

    def flush_before_reset(self) -> None:
        """The source failed: relay what is in its receive queue, as far as send(2) accepts it now, and no FIN."""
        buffer = self.context.buffer
        try:
            while self.is_reading and (received := self.source.recv_into(buffer)):
                self.account(received, 0)
                sent = self.sink.send(buffer[:received])
                self.unsent -= sent
                if sent < received:
                    return  # later bytes must not be sent without these
        except OSError:
            pass  # EAGAIN: the queue is empty; or the sink failed: the bytes are counted as unsent

    def _back_off(self) -> None:
        """The kernel has no memory for the source's socket: watch its descriptor for nothing until a timer fires."""
        if not self.backing_off:
            self.backing_off = True
            self.context.loop.timers.arm(self, self.context.loop.now + _BACK_OFF_NS)
            self.session.on_flow()

    def on_deadline(self, now_ns: int) -> None:
        """The back-off is over."""
        self.backing_off = False
        self.session.on_flow()

    def on_bug(self, bug: Exception) -> None:
        """A bug here is a bug of the session."""
        self.session.on_bug(bug)

    # Acknowledged by the sink's peer

    @property
    def unacknowledged(self) -> int:
        """Bytes that the sink's kernel has accepted and its peer had not acknowledged at the last TCP_INFO."""
        return self.received - self.unsent - self.acknowledged

    def count_acknowledged(self, total: int) -> None:
        """`total` is tcpi_bytes_acked of the sink. It counts our SYN too, and our FIN, which comes after all bytes."""
        acknowledged = self.acknowledged
        more = min(total - self.acknowledged_before, self.received - self.unsent) - acknowledged
        if more:
            self.acknowledged = acknowledged + more
            self.context.counters[self.counter_ids.acknowledged] += more

    # Half-close

    def _end_of_file(self) -> None:
        """EOF. Nothing is pending, since only then the source is read: pass on the FIN at once."""
        self.flow = flow_after(self.flow, EOF)
        self.last_active_ns = monotonic_ns()
        if self._pass_on_fin():
            self.session.on_shut(self)

    def _pass_on_fin(self) -> bool:
        """After EOF, with no bytes pending: shutdown(2) of the sink. The second direction leaves its FIN to close(2)."""
        try:
            if self.reverse.flow is not SHUT:
                self.sink.shutdown(socket.SHUT_WR)
        except OSError as error:
            self.session.on_broken_sink(self, error)
            return False
        self.flow = flow_after(self.flow, FLUSHED)
        return True

    # What to wait for

    @property
    def is_reading(self) -> bool:
        """Whether the source is to be read now."""
        return self.flow is OPEN and self.pending is None

    @property
    def interest(self) -> int:
        """Events of the source's descriptor, derived from state. It is the sink of `reverse`, hence WRITE."""
        if self.backing_off:
            return 0
        if self.reverse.pending is not None:
            return READ | WRITE if self.is_reading else WRITE
        return READ_EDGES if self.pending is None else 0  # after EOF only EPOLLHUP comes, which is an edge too

    # Splicing

    @property
    def reader(self) -> Union[Direction, Splicer]:
        """What reads the source now."""
        return self.splicer or self

    def _filled(self) -> None:
        """One more full buffer: splice if there were several in a row and a pipe is free."""
        in_a_row = self.received - self.filled_at == self.context.buffer_size
        self.fills = self.fills + 1 if in_a_row else 1
        self.filled_at = self.received
        self.lane = BULK  # for its next event
        pipe = self.context.pipes.acquire() if self.fills >= _SPLICE_AFTER else None
        if pipe:
            self.splicer = self.context.loop.handlers[self.fd] = Splicer(self, pipe)

    def stop_splicing(self) -> None:
        """Return to recv(2) and send(2)."""
        self._drop_splicer()
        self.context.loop.handlers[self.fd] = self

    def _drop_splicer(self) -> None:
        if self.splicer:
            self.splicer.close()
            self.splicer = None

    def detach(self) -> None:
        """The session has ended: release everything. The garbage collector is off, so no cycle may be left."""
        if self.pending is not None:
            self._release_pending()
        if self.splicer is not None:
            self._drop_splicer()
        if self.backing_off:
            self.context.loop.timers.disarm(self)
        if self.stall is not None:
            self.stall.clear(self.sink)
        del self.reverse


class Splicer:
    """Handles the source's descriptor instead of its direction: splice(2) into a pipe, and out of it. The rest is the same."""

    lane = BULK
    __slots__ = ("_direction", "_pipe", "_small")

    def __init__(self, direction: Direction, pipe: Pipe) -> None:
        """`pipe` is empty, and is released by close()."""
        self._direction, self._pipe = direction, pipe
        self._small = 0  # small splices in a row

    def ready(self, mask: int) -> None:
        """Any event of the source's descriptor."""
        self._direction.ready(mask)

    def on_bug(self, bug: Exception) -> None:
        """A bug here is a bug of the session."""
        self._direction.on_bug(bug)

    def readable(self) -> None:
        """One splice(2) into the pipe, one out of it. Bytes that the sink does not accept stay in the pipe, pending."""
        direction = self._direction
        try:
            received = 0 if self._pipe.refused else self._pipe.fill(direction.source)
        except OSError as error:
            if error.errno not in uapi.RETRY:
                direction.receive_failed(error)
                return
            received = 0
        if not received:  # EOF, urgent data (splice(2) never passes its mark), or a refusal: recv(2) shows which
            self._log_refusal()
            direction.stop_splicing()
            direction.readable()
            return
        try:
            sent = self._pipe.send(direction.sink)
        except OSError as error:
            if not direction.is_full(error):
                direction.discard(received, error)
                return
            sent = 0
        self._moved(received, sent)

    def _log_refusal(self) -> None:
        code = self._pipe.refused
        if code:
            text = f"splice(2) is refused: {errno.errorcode[code]}; long streams are copied instead"
            self._direction.context.log_ratelimited("warning", "splice", text)

    def _moved(self, received: int, sent: int) -> None:
        direction, loop = self._direction, self._direction.context.loop
        direction.account(received, sent)
        self._small = 0 if received >= _SMALL else self._small + 1
        if sent != received:
            direction.keep_pending(self._pipe)
            return
        direction.note_relayed(loop.now)
        loop.poller.rearm(direction.fd)  # the length of a splice(2) does not show whether there is more
        if self._small >= _UNSPLICE_AFTER:
            direction.stop_splicing()

    def close(self) -> None:
        """Release the pipe. Bytes in it are discarded."""
        self._direction.context.pipes.release(self._pipe)
