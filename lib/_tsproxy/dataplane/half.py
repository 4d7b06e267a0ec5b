"""One direction of a connection: bytes from a source to a sink, in order, none lost, none kept longer than needed.

Knows two sockets and the worker's buffer. Knows nothing of how the connection came to be or why it ends: that it
tells its owner. Both directions run this same code.
"""

from __future__ import annotations

import socket
from time import monotonic_ns
from typing import NamedTuple, Optional, Protocol

from _tsproxy.dataplane.poller import READ, WRITE
from _tsproxy.dataplane.states import Event, Flow, flow_after
from _tsproxy.dataplane.workbench import Workbench
from _tsproxy.host import linux
from _tsproxy.telemetry.counters import RELAY, Counter
from _tsproxy.telemetry.histogram import LINEAR_NS, STEP_NS, slot


class Tally(NamedTuple):
    """Which counters a direction adds to."""

    received: int
    withheld: int
    paused: int


FROM_DOWNSTREAM = Tally(Counter.RECEIVED_DOWNSTREAM, Counter.WITHHELD_DOWNSTREAM, Counter.PAUSED_DOWNSTREAM)
FROM_UPSTREAM = Tally(Counter.RECEIVED_UPSTREAM, Counter.WITHHELD_UPSTREAM, Counter.PAUSED_UPSTREAM)


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
    rest is held in the buffer it arrived in, and the source is not read until the rest is gone (backpressure): one
    buffer is the most a direction ever holds. An error of either socket goes to the owner, which resets both.
    """

    __slots__ = (
        "bench",
        "flow",
        "held",
        "moved_at",
        "owner",
        "received",
        "sink",
        "source",
        "tally",
        "twin",
        "unsent",
        "withheld",
        "woke",
    )
    twin: Half
    sink: socket.socket
    unsent: memoryview
    woke: int

    def __init__(self, owner: Owner, bench: Workbench, source: socket.socket, tally: Tally) -> None:
        """`sink` and `twin` are set once the other side is there."""
        self.owner, self.bench, self.source, self.tally = owner, bench, source, tally
        self.flow = Flow.OPEN
        self.received = 0
        self.withheld = 0  # received but not sent: held now, or discarded in the end
        self.held: Optional[memoryview] = None  # the whole buffer; `unsent` is the part of it to send
        self.moved_at = 0

    def readable(self) -> None:
        """One receive, one send: the whole life of a small order. Everything else is the exception."""
        bench = self.bench
        try:
            received = self.source.recv_into(bench.buffer)
        except OSError as error:
            self._receive_failed(error)
            return
        if not received:
            self._end_of_file()
            return
        try:
            sent = self.sink.send(bench.buffer[:received])
        except OSError as error:
            self._send_failed(received, error)
            return
        if sent != received:
            self._hold(received, sent)
            return
        self.received += received
        counters = bench.counters
        counters[self.tally[0]] += received
        self.moved_at = now = monotonic_ns()
        took = now - bench.woke
        if took < LINEAR_NS:
            counters[RELAY + took // STEP_NS] += 1
        else:
            counters[RELAY + slot(took)] += 1

    def ready(self, mask: int) -> None:
        """Any event of the source's descriptor that is not just "readable"."""
        self.owner.on_event(self, mask)

    def _receive_failed(self, error: OSError) -> None:
        if error.errno not in linux.RETRY:
            self.owner.on_broken_source(self, error)

    def _send_failed(self, received: int, error: OSError) -> None:
        """Nothing of what was received could be sent: hold it if the sink is only full, else it is lost."""
        if error.errno in linux.RETRY:
            self._hold(received, 0)
            return
        self._account(received, 0)
        self.owner.on_broken_sink(self, error)

    def _account(self, received: int, sent: int) -> None:
        """Count what came and what of it is withheld. Withheld first: a reader of the counters never sees too much sent."""
        self.withheld += received - sent
        self.bench.counters[self.tally.withheld] += received - sent
        self.received += received
        self.bench.counters[self.tally.received] += received

    def _hold(self, received: int, sent: int) -> None:
        """Keep what the sink did not take, with its buffer, and pause the source."""
        self._account(received, sent)
        self.bench.counters[self.tally.paused] += 1
        self.held = self.bench.swap_buffer()
        self.unsent = self.held[sent:received]
        self.woke = self.bench.woke
        self.moved_at = monotonic_ns()
        self.owner.on_flow()

    def drain(self) -> None:
        """The sink has room: send what is held; when it is gone, resume the source, or pass on the FIN that came behind it."""
        try:
            sent = self.sink.send(self.unsent)
        except OSError as error:
            if error.errno not in linux.RETRY:
                self.owner.on_broken_sink(self, error)
            return
        self._withheld_less(sent)
        self.moved_at = monotonic_ns()
        self.unsent = self.unsent[sent:]
        if not self.unsent:
            self.bench.counters[RELAY + slot(self.moved_at - self.woke)] += 1
            self.release()
            self._shut_if_drained()

    def deliver_last_words(self) -> None:
        """The source is broken: send on what it had said before, as far as the sink takes it now. No FIN: it sent none."""
        buffer = self.bench.buffer
        try:
            while self.is_reading and (received := self.source.recv_into(buffer)):
                self._account(received, 0)
                self._withheld_less(self.sink.send(buffer[:received]))
        except OSError:
            pass  # nothing more was said, or it can't be sent: what is left over has been counted as withheld

    def _withheld_less(self, sent: int) -> None:
        self.withheld -= sent
        self.bench.counters[self.tally.withheld] -= sent

    def release(self) -> None:
        """Give the held buffer back; what was in it is sent, or lost for good."""
        if self.held is not None:
            del self.unsent
            self.bench.buffers.give(self.held)
            self.held = None

    def _end_of_file(self) -> None:
        self.flow = flow_after(self.flow, Event.EOF)
        self.moved_at = monotonic_ns()
        self._shut_if_drained()

    def _shut_if_drained(self) -> None:
        """Half-close: FIN goes on only after the bytes before it. The second one is left to the close() that follows."""
        if self.flow is Flow.DRAINING:
            try:
                if self.twin.flow is not Flow.SHUT:
                    self.sink.shutdown(socket.SHUT_WR)
            except OSError as error:
                self.owner.on_broken_sink(self, error)
                return
            self.flow = flow_after(self.flow, Event.FLUSHED)
        self.owner.on_flow()

    @property
    def is_reading(self) -> bool:
        """Whether the source is to be read now."""
        return self.flow is Flow.OPEN and self.held is None

    @property
    def interest(self) -> int:
        """What to wait for on the source's descriptor: derived, never toggled. It is the twin's sink, hence WRITE."""
        return (READ if self.is_reading else 0) | (WRITE if self.twin.held is not None else 0)

    def detach(self) -> None:
        """Let go of everything: the garbage collector is off in a worker, so no cycle may be left."""
        self.release()
        del self.owner
        if hasattr(self, "twin"):
            del self.twin, self.sink
