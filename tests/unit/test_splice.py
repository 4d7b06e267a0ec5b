"""Zero-copy: when a direction becomes a stream and when no more, and that a pipe keeps no byte for anybody else.

That nothing is lost, in any order of events, is tested with and without streams in test_conservation.
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
from pipes import MIB
from typing import Any, Iterator, List, NamedTuple, Tuple

import pytest
from _tsproxy.linux.limits import PIPES_A_WORKER
from _tsproxy.proxy.context import RouteContext
from _tsproxy.proxy.direction import Direction, Splicer, make_directions
from _tsproxy.proxy.pipes import HAS_SPLICE, Pipes
from _tsproxy.stats.counters import Counter
from harness import PATIENCE, receive_exactly, reset, wait_until
from lone_context import lone_context

pytestmark = [
    pytest.mark.skipif(not HAS_SPLICE, reason="os.splice came with Python 3.10"),
    pytest.mark.usefixtures("no_cycles"),
]
BUFFER = 1024


class Events:
    """Remembers what a direction tells its session."""

    def __init__(self) -> None:
        self.told: List[Tuple[str, Any]] = []

    def on_event(self, direction: Direction, mask: int) -> None:
        self.told.append(("event", mask))

    def on_broken_source(self, direction: Direction, error: OSError) -> None:
        self.told.append(("source", type(error)))

    def on_broken_sink(self, direction: Direction, error: OSError) -> None:
        self.told.append(("sink", type(error)))

    def on_flow(self) -> None:
        self.told.append(("flow", None))

    def on_shut(self, direction: Direction) -> None:
        self.told.append(("shut", None))

    def on_bug(self, bug: Exception) -> None:
        raise bug


class Way(NamedTuple):
    """One direction between two real connections: what `near` sends comes out at `far`."""

    near: socket.socket
    far: socket.socket
    direction: Direction
    events: Events


@pytest.fixture
def context() -> Iterator[RouteContext]:
    with lone_context(BUFFER) as context:
        yield context


@contextlib.contextmanager
def way(context: RouteContext) -> Iterator[Way]:
    with contextlib.ExitStack() as stack:
        near, source = pair(stack)
        sink, far = pair(stack)
        events = Events()
        direction, back = make_directions(events, context, source, sink)
        context.loop.watch(direction.fd, direction.interest, direction)
        yield Way(near, far, direction, events)
        context.loop.unwatch(direction.fd)
        direction.detach()
        back.detach()


def pair(stack: contextlib.ExitStack) -> Tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = stack.enter_context(socket.create_connection(listener.getsockname()))
        other = stack.enter_context(listener.accept()[0])
    other.setblocking(False)
    one.settimeout(10)
    return one, other


def pass_on(way: Way, count: int) -> bytes:
    """Send `count` bytes in and read until they have arrived."""
    data = os.urandom(count)
    way.near.sendall(data)
    way.far.setblocking(False)
    arrived = b""

    def all_there() -> bool:
        nonlocal arrived
        way.direction.drain() if way.direction.pending else way.direction.reader.readable()
        with contextlib.suppress(BlockingIOError):
            arrived += way.far.recv(MIB)
        return len(arrived) >= count

    wait_until(all_there, "the bytes arrive")
    assert arrived == data
    return arrived


class NeverGone:
    """Held bytes of which the sink takes one at a time."""

    left = 2

    def send(self, sink: socket.SocketType) -> int:
        return sink.send(b"x")

    def release(self) -> None:
        """Nothing to give back."""


def test_a_sink_that_takes_a_part_counts_as_movement(context: RouteContext) -> None:
    """A slow reader is not idle: what is left over may take longer than --idle-timeout."""
    with way(context) as one:
        one.direction.account(2, 0)
        one.direction.keep_pending(NeverGone())
        one.direction.last_active_ns = 0
        one.direction.drain()
        one.far.settimeout(PATIENCE)  # what was sent has not come yet, where another thread of the kernel takes it over
        assert one.far.recv(1) == b"x"
        assert one.direction.last_active_ns > 0


def test_four_full_buffers_in_a_row_begin_splicing_and_four_small_iterations_end_it(context: RouteContext) -> None:
    with way(context) as one:
        pass_on(one, 3 * BUFFER)
        assert one.direction.reader is one.direction
        pass_on(one, 4 * BUFFER)
        assert isinstance(one.direction.reader, Splicer)
        assert context.loop.handlers[one.direction.fd] is one.direction.reader
        for _ in range(4):
            pass_on(one, 10)
        assert one.direction.reader is one.direction
        assert context.loop.handlers[one.direction.fd] is one.direction  # not the splicer, whose pipe may be another's by now
        assert context.counters[Counter.RECEIVED_DOWNSTREAM] == one.direction.received == 7 * BUFFER + 40
        assert one.direction.unsent == 0


def test_full_buffers_with_small_receives_between_them_begin_no_splicing(context: RouteContext) -> None:
    with way(context) as one:
        for _ in range(8):
            pass_on(one, 2 * BUFFER)
            pass_on(one, 10)
            assert one.direction.splicer is None


def test_splicing_ends_with_its_direction_and_a_byte_left_in_a_pipe_is_no_others(context: RouteContext) -> None:
    """Else the next stream would begin with a stranger's orders."""
    with way(context) as one:
        pass_on(one, 8 * BUFFER)
        one.near.setblocking(False)
        wait_until(lambda: choke(one), "the sink is full")
        pending = one.direction.pending
        assert pending is not None
        assert pending.left == one.direction.unsent > 0
    with way(context) as other:
        pass_on(other, 8 * BUFFER)
        assert other.direction.splicer is not None
        pass_on(other, 64 * BUFFER)


def choke(one: Way) -> bool:
    """Send without reading until the half holds something in its pipe."""
    with contextlib.suppress(BlockingIOError):
        one.near.send(bytes(MIB))
    if one.direction.pending is None:
        one.direction.reader.readable()
    return one.direction.pending is not None


def test_a_reset_sink_is_reported_and_bytes_in_the_pipe_count_as_unsent(context: RouteContext) -> None:
    with way(context) as one:
        pass_on(one, 8 * BUFFER)
        reset(one.far)
        one.near.sendall(bytes(100))

        def told() -> bool:
            one.direction.reader.readable()
            return any(what == "sink" for what, _ in one.events.told)

        wait_until(told, "the owner is told")
        assert one.direction.unsent > 0


def test_eof_and_a_reset_of_the_source_are_seen_while_splicing_too(context: RouteContext) -> None:
    with way(context) as one:
        pass_on(one, 8 * BUFFER)
        one.near.shutdown(socket.SHUT_WR)
        wait_until(lambda: one.direction.reader.readable() or one.direction.flow.name == "SHUT", "the end of file is passed on")
        one.far.settimeout(PATIENCE)
        assert receive_exactly(one.far, 1) == b""
    with way(context) as one:
        pass_on(one, 8 * BUFFER)
        reset(one.near)
        wait_until(
            lambda: one.direction.reader.readable() or one.events.told[-1] == ("source", ConnectionResetError), "the reset"
        )


def test_pipes_are_bounded_and_a_spare_one_is_used_again() -> None:
    pipes = Pipes(PIPES_A_WORKER)
    taken = [pipe for pipe in (pipes.acquire() for _ in range(PIPES_A_WORKER + 3)) if pipe]
    assert len(taken) == PIPES_A_WORKER
    for pipe in taken:
        pipes.release(pipe)
    again = pipes.acquire()
    assert again is not None
    assert again in taken
    pipes.release(again)
    pipes.close()


def test_without_a_descriptor_there_is_no_pipe_and_no_error() -> None:
    pipes = Pipes(PIPES_A_WORKER)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        assert pipes.acquire() is None
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert pipes.acquire() is None  # the kernel is not asked again at once
