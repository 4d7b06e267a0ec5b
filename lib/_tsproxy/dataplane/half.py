"""One direction of a connection: bytes from a source to a sink, in order, none lost, none kept longer than needed.

Knows two sockets and the worker's buffer. Knows nothing of how the connection came to be or why it ends: that it
tells its owner. Both directions run this same code. A source that keeps filling the buffer is handed to a Stream.
"""

from __future__ import annotations

import socket
from time import monotonic_ns
from typing import NamedTuple, Optional, Protocol, Union

from _tsproxy.dataplane.held import Held, InBuffer
from _tsproxy.dataplane.liveness import Doubt, dispel
from _tsproxy.dataplane.poller import READ, READ_EDGES, WRITE
from _tsproxy.dataplane.posted import BULK, NEW, NOW
from _tsproxy.dataplane.states import DRAINING, EOF, FLUSHED, OPEN, SHUT, flow_after
from _tsproxy.dataplane.stream import Stream
from _tsproxy.dataplane.workbench import Workbench
from _tsproxy.host import linux
from _tsproxy.telemetry.counters import RELAY, Counter, note
from _tsproxy.telemetry.histogram import LINEAR_NS, STEP_NS, slot


class Tally(NamedTuple):
    """Which counters a direction adds to."""

    received: int
    acknowledged: int
    paused: int


_STREAM_AFTER = 4  # full buffers in a row
_REST_NS = 100_000_000

FROM_DOWNSTREAM = Tally(Counter.RECEIVED_DOWNSTREAM, Counter.ACKNOWLEDGED_UPSTREAM, Counter.PAUSED_DOWNSTREAM)
FROM_UPSTREAM = Tally(Counter.RECEIVED_UPSTREAM, Counter.ACKNOWLEDGED_DOWNSTREAM, Counter.PAUSED_UPSTREAM)


class Owner(Protocol):
    """What a half tells."""

    def on_event(self, half: Half, mask: int) -> None:
        """An event that is not plain data of a relayed connection."""

    def on_broken_source(self, half: Half, error: OSError) -> None:
        """The source failed; nothing more can be received from it."""

    def on_broken_sink(self, half: Half, error: OSError) -> None:
        """The sink failed; nothing more can be sent to it."""

    def on_flow(self) -> None:
        """A half's state or its backlog changed: what to wait for may have, too."""


class Half:
    """source -> sink.

    On EOF of the source, FIN is passed on after the bytes before it. When the sink takes less than it is given, the
    rest is held where it arrived, and the source is not read until the rest is gone (backpressure): one buffer, or one
    pipe, is the most a direction ever holds. An error of either socket goes to the owner, which resets both.
    """

    __slots__ = (
        "acknowledged",
        "acknowledged_before",
        "bench",
        "doubt",
        "fd",
        "filled_at",
        "fills",
        "flow",
        "held",
        "lane",
        "moved_at",
        "owner",
        "received",
        "received_slot",
        "rests",
        "sink",
        "source",
        "stream",
        "tally",
        "twin",
        "withheld",
        "woke",
    )
    twin: Half
    sink: socket.SocketType
    woke: int

    def __init__(self, owner: Owner, bench: Workbench, source: socket.SocketType, tally: Tally) -> None:
        """`sink` and `twin` are set once the other side is there."""
        self.owner, self.bench, self.source, self.tally = owner, bench, source, tally
        self.fd = source.fileno()
        self.received_slot = int(tally.received)  # a plain number: this is done for each message
        self.flow = OPEN
        self.lane = NEW  # when its events are handled; NOW once it relays
        self.received = 0
        self.withheld = 0  # received and not given to the sink's kernel: held now, or discarded in the end
        self.acknowledged = 0  # by the sink's peer, as of the last look
        self.acknowledged_before = 0  # what tcpi_bytes_acked of the sink said before any byte: 1 if the SYN was ours
        self.held: Optional[Held] = None
        self.stream: Optional[Stream] = None
        self.fills = self.filled_at = 0  # full buffers in a row, and `received` as of the last one
        self.moved_at = 0
        self.rests = False
        self.doubt: Optional[Doubt] = None  # whether the sink's peer still lives

    def readable(self) -> None:
        """One receive, one send: the whole life of a small order. Everything else is the exception."""
        bench = self.bench
        try:
            received = self.source.recv_into(bench.buffer)
        except OSError as error:
            self.receive_failed(error)
            return
        if not received:
            self._end_of_file()
            return
        try:
            sent = self.sink.send(bench.heads[received])
        except OSError as error:
            self._send_failed(received, error)
            return
        if sent != received or received == bench.full:
            self._moved_much(received, sent)
            return
        self.received += received
        counters = bench.counters
        counters[self.received_slot] += received
        self.moved_at = now = monotonic_ns()
        took = now - bench.woke
        if took > bench.longest_ns:
            bench.relay_took_longest(took)
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
        if error.errno in linux.CAPACITY:
            self.rest()
        elif error.errno not in linux.RETRY:
            self.owner.on_broken_source(self, error)

    def _send_failed(self, received: int, error: OSError) -> None:
        """Nothing of what was received could be sent: hold it if the sink is only full, else it is lost."""
        if self.is_full(error):
            self._moved_much(received, 0)
        else:
            self.lose(received, error)

    def is_full(self, error: OSError) -> bool:
        """Whether the sink takes nothing just now: it has no room, or the kernel no memory (send(2), ENOBUFS and ENOMEM)."""
        if error.errno in linux.CAPACITY:
            self.twin.rest()
            return True
        return error.errno in linux.RETRY

    def rest(self) -> None:
        """The source's descriptor is short of what the kernel lacks: leave it alone for a while, by the clock."""
        if not self.rests:
            self.rests = True
            self.bench.timers.arm(_Rest(self), self.bench.woke + _REST_NS)
            self.owner.on_flow()

    def lose(self, received: int, error: OSError) -> None:
        """The sink failed with all of this unsent: count it, and tell the owner."""
        self.account(received, 0)
        self.owner.on_broken_sink(self, error)

    def _moved_much(self, received: int, sent: int) -> None:
        """The buffer was full, or the sink is."""
        self.account(received, sent)
        if received == self.bench.full:
            self._filled()
        if sent != received:
            self.hold(InBuffer(self.bench.buffers, self.bench.swap_buffer(), sent, received))
        else:
            self.delivered(self.bench.woke)
            self.bench.poller.again(self.fd)  # a short receive has emptied the socket; this one has not

    def _filled(self) -> None:
        """One more full buffer: begin a stream when there were several in a row and a pipe is to be had."""
        in_a_row = self.received - self.filled_at == self.bench.full
        self.fills = self.fills + 1 if in_a_row else 1
        self.filled_at = self.received
        self.lane = BULK  # for its next event
        pipe = self.bench.pipes.take() if self.fills >= _STREAM_AFTER else None
        if pipe:
            self.stream = Stream(self, pipe)
            self.bench.handlers[self.fd] = self.stream

    def end_stream(self) -> None:
        """Back to copying."""
        self._drop_stream()
        self.bench.handlers[self.fd] = self

    def _drop_stream(self) -> None:
        if self.stream:
            self.stream.close()
            self.stream = None

    @property
    def reader(self) -> Union[Half, Stream]:
        """What reads the source now."""
        return self.stream or self

    def account(self, received: int, sent: int) -> None:
        """Count what came and what of it is withheld."""
        self.withheld += received - sent
        self.received += received
        self.bench.counters[self.tally.received] += received

    def hold(self, held: Held) -> None:
        """Keep what the sink did not take, and pause the source."""
        self.bench.counters[self.tally.paused] += 1
        self.held = held
        self.woke = self.bench.woke
        self.moved_at = monotonic_ns()
        self.owner.on_flow()

    def drain(self) -> None:
        """The sink has room: send what is held; when it is gone, resume the source, or pass on the FIN that came behind it."""
        held = self.held
        if held is None:
            return
        try:
            sent = held.send(self.sink)
        except OSError as error:
            if not self.is_full(error):
                self.owner.on_broken_sink(self, error)
            return
        self.withheld -= sent
        if held.left:
            self.moved_at = monotonic_ns()
        else:
            self.delivered(self.woke)
            self.release()
            self._shut_if_drained()

    def delivered(self, since_ns: int) -> None:
        """All that was received at `since_ns` is sent now."""
        self.moved_at = now = monotonic_ns()
        note(self.bench.counters, RELAY, now - since_ns)

    def deliver_last_words(self) -> None:
        """The source is broken: send on what it had said before, as far as the sink takes it now. No FIN: it sent none."""
        buffer = self.bench.buffer
        try:
            while self.is_reading and (received := self.source.recv_into(buffer)):
                self.account(received, 0)
                sent = self.sink.send(buffer[:received])
                self.withheld -= sent
                if sent < received:
                    return  # what comes behind the rest must not be sent without it
        except OSError:
            pass  # nothing more was said, or it can't be sent: what is left over has been counted as withheld

    @property
    def unacknowledged(self) -> int:
        """What the sink's kernel was given and its peer had not acknowledged at the last look."""
        return self.received - self.withheld - self.acknowledged

    def count_acknowledged(self, total: int) -> None:
        """`total` is tcpi_bytes_acked of the sink, which counts our SYN and our FIN, too; a FIN comes behind all bytes."""
        more = min(total - self.acknowledged_before - self.acknowledged, self.unacknowledged)
        self.acknowledged += more
        self.bench.counters[self.tally.acknowledged] += more

    def release(self) -> None:
        """Give the room of what was held back; it is sent, or lost for good."""
        if self.held is not None:
            self.held.release()
            self.held = None

    def _end_of_file(self) -> None:
        """FIN came: pass it on when all before it is sent."""
        self.flow = flow_after(self.flow, EOF)
        self.moved_at = monotonic_ns()
        self._shut_if_drained()

    def _shut_if_drained(self) -> None:
        """Half-close: FIN goes on only after the bytes before it. The second one is left to the owner's end."""
        if self.flow is DRAINING:
            try:
                if self.twin.flow is not SHUT:
                    self.sink.shutdown(socket.SHUT_WR)
            except OSError as error:
                self.owner.on_broken_sink(self, error)
                return
            self.flow = flow_after(self.flow, FLUSHED)
        self.owner.on_flow()

    @property
    def is_reading(self) -> bool:
        """Whether the source is to be read now."""
        return self.flow is OPEN and self.held is None

    @property
    def interest(self) -> int:
        """What to wait for on the source's descriptor: derived, never toggled. It is the twin's sink, hence WRITE."""
        if self.rests:
            return 0
        if self.twin.held is not None:
            return READ | WRITE if self.is_reading else WRITE
        return READ_EDGES if self.held is None else 0  # after FIN nothing more comes but a hang-up, which is an edge too

    def detach(self) -> None:
        """Let go of everything: the garbage collector is off in a worker, so no cycle may be left."""
        if self.held is not None:
            self.release()
        if self.stream is not None:
            self._drop_stream()
        del self.owner
        if hasattr(self, "twin"):
            dispel(self)
            del self.twin, self.sink


class _Rest:
    """A half's way into the timers, beside its relay's."""

    __slots__ = ("_half",)

    def __init__(self, half: Half) -> None:
        self._half = half

    @property
    def owner(self) -> Owner:
        """The half's, while it has one."""
        return self._half.owner

    def on_deadline(self, now_ns: int) -> None:
        """Look again, unless the connection has ended."""
        self._half.rests = False
        if hasattr(self._half, "owner"):
            self._half.owner.on_flow()
