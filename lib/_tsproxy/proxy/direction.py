"""One direction of a connection: bytes from a source to a sink, in order, none lost, none kept longer than needed.

Knows two sockets and the worker's buffer. Knows nothing of how the connection came to be or why it ends: that it
tells its owner. Both directions run this same code. A source that keeps filling the buffer is handed to a Splicer.
"""

from __future__ import annotations

import socket
from time import monotonic_ns
from typing import NamedTuple, Optional, Protocol, Union

from _tsproxy.linux import uapi
from _tsproxy.loop.poller import READ, READ_EDGES, WRITE
from _tsproxy.loop.posted import BULK, NEW, NOW
from _tsproxy.proxy.context import WorkerContext
from _tsproxy.proxy.liveness import Stall, clear_stall
from _tsproxy.proxy.pending import Pending, PendingBuffer
from _tsproxy.proxy.splicer import Splicer
from _tsproxy.proxy.states import DRAINING, EOF, FLUSHED, OPEN, SHUT, flow_after
from _tsproxy.stats.counters import RELAY, Counter, note
from _tsproxy.stats.histogram import LINEAR_NS, STEP_NS, slot


class DirectionCounters(NamedTuple):
    """Which counters a direction adds to."""

    received: int
    acknowledged: int
    paused: int


_SPLICE_AFTER = 4  # full buffers in a row
_REST_NS = 100_000_000

FROM_DOWNSTREAM = DirectionCounters(Counter.RECEIVED_DOWNSTREAM, Counter.ACKNOWLEDGED_UPSTREAM, Counter.PAUSED_DOWNSTREAM)
FROM_UPSTREAM = DirectionCounters(Counter.RECEIVED_UPSTREAM, Counter.ACKNOWLEDGED_DOWNSTREAM, Counter.PAUSED_UPSTREAM)


class Owner(Protocol):
    """What a direction tells."""

    def on_event(self, direction: Direction, mask: int) -> None:
        """An event that is not plain data of a relayed connection."""

    def on_broken_source(self, direction: Direction, error: OSError) -> None:
        """The source failed; nothing more can be received from it."""

    def on_broken_sink(self, direction: Direction, error: OSError) -> None:
        """The sink failed; nothing more can be sent to it."""

    def on_flow(self) -> None:
        """A direction's state or its backlog changed: what to wait for may have, too."""


class Direction:
    """source -> sink.

    On EOF of the source, FIN is passed on after the bytes before it. When the sink takes less than it is given, the
    rest is held where it arrived, and the source is not read until the rest is gone (backpressure): one buffer, or one
    pipe, is the most a direction ever holds. An error of either socket goes to the owner, which resets both.
    """

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
        "loop_now",
        "owner",
        "pending",
        "received",
        "received_slot",
        "reverse",
        "sink",
        "source",
        "splicer",
        "stall",
        "unsent",
    )
    reverse: Direction
    sink: socket.SocketType
    loop_now: int

    def __init__(self, owner: Owner, context: WorkerContext, source: socket.SocketType, counter_ids: DirectionCounters) -> None:
        """`sink` and `twin` are set once the other side is there."""
        self.owner, self.context, self.source, self.counter_ids = owner, context, source, counter_ids
        self.fd = source.fileno()
        self.received_slot = int(counter_ids.received)  # a plain number: this is done for each message
        self.flow = OPEN
        self.lane = NEW  # when its events are handled; NOW once it relays
        self.received = 0
        self.unsent = 0  # received and not given to the sink's kernel: held now, or discarded in the end
        self.acknowledged = 0  # by the sink's peer, as of the last look
        self.acknowledged_before = 0  # what tcpi_bytes_acked of the sink said before any byte: 1 if the SYN was ours
        self.pending: Optional[Pending] = None
        self.splicer: Optional[Splicer] = None
        self.fills = self.filled_at = 0  # full buffers in a row, and `received` as of the last one
        self.last_active_ns = 0
        self.backing_off = False
        self.stall: Optional[Stall] = None  # whether the sink's peer still lives

    def readable(self) -> None:
        """One receive, one send: the whole life of a small order. Everything else is the exception."""
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
        took = now - context.loop_now
        if took > context.longest_ns:
            context.relay_took_longest(took)
        if took < LINEAR_NS:
            counters[RELAY + took // STEP_NS] += 1
        else:
            counters[RELAY + slot(took)] += 1

    def ready(self, mask: int) -> None:
        """Any event of the source's descriptor that is not just "readable", or that was posted."""
        if self.lane == BULK:
            self.lane = NOW
        self.owner.on_event(self, mask)

    def receive_failed(self, error: OSError) -> None:
        """Nothing was there after all, or the kernel has no memory for it now, or nothing will be there again."""
        if error.errno in uapi.CAPACITY:
            self.rest()
        elif error.errno not in uapi.RETRY:
            self.owner.on_broken_source(self, error)

    def _send_failed(self, received: int, error: OSError) -> None:
        """Nothing of what was received could be sent: hold it if the sink is only full, else it is lost."""
        if self.is_full(error):
            self._moved_much(received, 0)
        else:
            self.lose(received, error)

    def is_full(self, error: OSError) -> bool:
        """Whether the sink takes nothing just now: it has no room, or the kernel no memory (send(2), ENOBUFS and ENOMEM)."""
        if error.errno in uapi.CAPACITY:
            self.reverse.rest()
            return True
        return error.errno in uapi.RETRY

    def rest(self) -> None:
        """The source's descriptor is short of what the kernel lacks: leave it alone for a while, by the clock."""
        if not self.backing_off:
            self.backing_off = True
            self.context.timers.arm(_Rest(self), self.context.loop_now + _REST_NS)
            self.owner.on_flow()

    def lose(self, received: int, error: OSError) -> None:
        """The sink failed with all of this unsent: count it, and tell the owner."""
        self.account(received, 0)
        self.owner.on_broken_sink(self, error)

    def _moved_much(self, received: int, sent: int) -> None:
        """The buffer was full, or the sink is."""
        self.account(received, sent)
        if received == self.context.buffer_size:
            self._filled()
        if sent != received:
            self.keep_pending(PendingBuffer(self.context.buffers, self.context.swap_buffer(), sent, received))
        else:
            self.note_relayed(self.context.loop_now)
            self.context.poller.again(self.fd)  # a short receive has emptied the socket; this one has not

    def _filled(self) -> None:
        """One more full buffer: begin a stream when there were several in a row and a pipe is to be had."""
        in_a_row = self.received - self.filled_at == self.context.buffer_size
        self.fills = self.fills + 1 if in_a_row else 1
        self.filled_at = self.received
        self.lane = BULK  # for its next event
        pipe = self.context.pipes.take() if self.fills >= _SPLICE_AFTER else None
        if pipe:
            self.splicer = Splicer(self, pipe)
            self.context.handlers[self.fd] = self.splicer

    def stop_splicing(self) -> None:
        """Back to copying."""
        self._drop_splicer()
        self.context.handlers[self.fd] = self

    def _drop_splicer(self) -> None:
        if self.splicer:
            self.splicer.close()
            self.splicer = None

    @property
    def reader(self) -> Union[Direction, Splicer]:
        """What reads the source now."""
        return self.splicer or self

    def account(self, received: int, sent: int) -> None:
        """Count what came and what of it is withheld."""
        self.unsent += received - sent
        self.received += received
        self.context.counters[self.counter_ids.received] += received

    def keep_pending(self, pending: Pending) -> None:
        """Keep what the sink did not take, and pause the source."""
        self.context.counters[self.counter_ids.paused] += 1
        self.pending = pending
        self.loop_now = self.context.loop_now
        self.last_active_ns = monotonic_ns()
        self.owner.on_flow()

    def drain(self) -> None:
        """The sink has room: send what is held; when it is gone, resume the source, or pass on the FIN that came behind it."""
        pending = self.pending
        if pending is None:
            return
        try:
            sent = pending.send(self.sink)
        except OSError as error:
            if not self.is_full(error):
                self.owner.on_broken_sink(self, error)
            return
        self.unsent -= sent
        if pending.left:
            self.last_active_ns = monotonic_ns()
        else:
            self.note_relayed(self.loop_now)
            self.release()
            self._shut_if_drained()

    def note_relayed(self, since_ns: int) -> None:
        """All that was received at `since_ns` is sent now."""
        self.last_active_ns = now = monotonic_ns()
        note(self.context.counters, RELAY, now - since_ns)

    def flush_before_reset(self) -> None:
        """The source is broken: send on what it had said before, as far as the sink takes it now. No FIN: it sent none."""
        buffer = self.context.buffer
        try:
            while self.is_reading and (received := self.source.recv_into(buffer)):
                self.account(received, 0)
                sent = self.sink.send(buffer[:received])
                self.unsent -= sent
                if sent < received:
                    return  # what comes behind the rest must not be sent without it
        except OSError:
            pass  # nothing more was said, or it can't be sent: what is left over has been counted as withheld

    @property
    def unacknowledged(self) -> int:
        """What the sink's kernel was given and its peer had not acknowledged at the last look."""
        return self.received - self.unsent - self.acknowledged

    def count_acknowledged(self, total: int) -> None:
        """`total` is tcpi_bytes_acked of the sink, which counts our SYN and our FIN, too; a FIN comes behind all bytes."""
        more = min(total - self.acknowledged_before - self.acknowledged, self.unacknowledged)
        self.acknowledged += more
        self.context.counters[self.counter_ids.acknowledged] += more

    def release(self) -> None:
        """Give the room of what was held back; it is sent, or lost for good."""
        if self.pending is not None:
            self.pending.release()
            self.pending = None

    def _end_of_file(self) -> None:
        """FIN came: pass it on when all before it is sent."""
        self.flow = flow_after(self.flow, EOF)
        self.last_active_ns = monotonic_ns()
        self._shut_if_drained()

    def _shut_if_drained(self) -> None:
        """Half-close: FIN goes on only after the bytes before it. The second one is left to the owner's end."""
        if self.flow is DRAINING:
            try:
                if self.reverse.flow is not SHUT:
                    self.sink.shutdown(socket.SHUT_WR)
            except OSError as error:
                self.owner.on_broken_sink(self, error)
                return
            self.flow = flow_after(self.flow, FLUSHED)
        self.owner.on_flow()

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
        return READ_EDGES if self.pending is None else 0  # after FIN nothing more comes but a hang-up, which is an edge too

    def detach(self) -> None:
        """Let go of everything: the garbage collector is off in a worker, so no cycle may be left."""
        if self.pending is not None:
            self.release()
        if self.splicer is not None:
            self._drop_splicer()
        del self.owner
        if hasattr(self, "twin"):
            clear_stall(self)
            del self.reverse, self.sink


class _Rest:
    """A direction's way into the timers, beside its relay's."""

    __slots__ = ("_direction",)

    def __init__(self, direction: Direction) -> None:
        self._direction = direction

    @property
    def owner(self) -> Owner:
        """The direction's, while it has one."""
        return self._direction.owner

    def on_deadline(self, now_ns: int) -> None:
        """Look again, unless the connection has ended."""
        self._direction.backing_off = False
        if hasattr(self._direction, "owner"):
            self._direction.owner.on_flow()
