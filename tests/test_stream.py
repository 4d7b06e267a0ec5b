"""Zero-copy: when a direction becomes a stream and when no more, and that a pipe keeps no byte for anybody else.

That nothing is lost, in any order of events, is tested with and without streams in test_conservation.
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import subprocess
import threading
from pathlib import Path
from typing import Any, Iterator, List, NamedTuple, Tuple

import pytest
from _tsproxy.linux.limits import PIPES_A_WORKER
from _tsproxy.proxy.context import WorkerContext
from _tsproxy.proxy.direction import FROM_DOWNSTREAM, FROM_UPSTREAM, Direction
from _tsproxy.proxy.pipes import HAS_SPLICE, SIZE, Pipes
from _tsproxy.proxy.splicer import Splicer
from _tsproxy.stats.counters import Counter
from harness import Exchange, Proxy, receive_exactly, reset, wait_until
from lone_context import lone_context
from unprivileged import BECOME, as_nobody

pytestmark = pytest.mark.skipif(not HAS_SPLICE, reason="os.splice came with Python 3.10")
BUFFER = 1024
MIB = 1 << 20


class Owner:
    """Remembers what a half tells."""

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


class Way(NamedTuple):
    """One direction between two real connections: what `near` sends comes out at `far`."""

    near: socket.socket
    far: socket.socket
    direction: Direction
    owner: Owner


@pytest.fixture
def context() -> Iterator[WorkerContext]:
    with lone_context(BUFFER) as context:
        yield context


@contextlib.contextmanager
def way(context: WorkerContext) -> Iterator[Way]:
    with contextlib.ExitStack() as stack:
        near, source = pair(stack)
        sink, far = pair(stack)
        owner = Owner()
        direction, back = Direction(owner, context, source, FROM_DOWNSTREAM), Direction(owner, context, sink, FROM_UPSTREAM)
        direction.reverse, direction.sink, back.reverse, back.sink = back, sink, direction, source
        context.watch(direction.fd, direction.interest, direction)
        yield Way(near, far, direction, owner)
        context.poller.unregister(direction.fd)
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


def test_a_sink_that_takes_a_part_counts_as_movement(context: WorkerContext) -> None:
    """A slow reader is not idle: what is left over may take longer than --idle-timeout."""
    with way(context) as one:
        one.direction.account(2, 0)
        one.direction.keep_pending(NeverGone())
        one.direction.last_active_ns = 0
        one.direction.drain()
        assert one.far.recv(1) == b"x"
        assert one.direction.last_active_ns > 0


def test_four_full_buffers_in_a_row_begin_a_stream_and_four_small_turns_end_it(context: WorkerContext) -> None:
    with way(context) as one:
        pass_on(one, 3 * BUFFER)
        assert one.direction.reader is one.direction
        pass_on(one, 4 * BUFFER)
        assert isinstance(one.direction.reader, Splicer)
        assert context.handlers[one.direction.fd] is one.direction.reader
        for _ in range(4):
            pass_on(one, 10)
        assert one.direction.reader is one.direction
        assert context.handlers[one.direction.fd] is one.direction  # not the stream, whose pipe may be another's by now
        assert context.counters[Counter.RECEIVED_DOWNSTREAM] == one.direction.received == 7 * BUFFER + 40
        assert one.direction.unsent == 0


def test_full_buffers_with_small_receives_between_them_begin_no_stream(context: WorkerContext) -> None:
    with way(context) as one:
        for _ in range(8):
            pass_on(one, 2 * BUFFER)
            pass_on(one, 10)
            assert one.direction.splicer is None


def test_a_stream_ends_with_its_direction_and_a_byte_left_in_a_pipe_is_nobody_elses(context: WorkerContext) -> None:
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


def test_a_sink_that_was_reset_is_told_and_what_was_in_the_pipe_counts_as_withheld(context: WorkerContext) -> None:
    with way(context) as one:
        pass_on(one, 8 * BUFFER)
        reset(one.far)
        one.near.sendall(bytes(100))

        def told() -> bool:
            one.direction.reader.readable()
            return any(what == "sink" for what, _ in one.owner.told)

        wait_until(told, "the owner is told")
        assert one.direction.unsent > 0


def test_eof_and_a_reset_of_the_source_are_seen_in_a_stream_too(context: WorkerContext) -> None:
    with way(context) as one:
        pass_on(one, 8 * BUFFER)
        one.near.shutdown(socket.SHUT_WR)
        wait_until(lambda: one.direction.reader.readable() or one.direction.flow.name == "SHUT", "the end of file is passed on")
        assert receive_exactly(one.far, 1) == b""
    with way(context) as one:
        pass_on(one, 8 * BUFFER)
        reset(one.near)
        wait_until(
            lambda: one.direction.reader.readable() or one.owner.told[-1] == ("source", ConnectionResetError), "the reset"
        )


def test_pipes_are_bounded_and_a_spare_one_is_used_again() -> None:
    pipes = Pipes(PIPES_A_WORKER)
    taken = [pipe for pipe in (pipes.take() for _ in range(PIPES_A_WORKER + 3)) if pipe]
    assert len(taken) == PIPES_A_WORKER
    for pipe in taken:
        pipes.give(pipe)
    again = pipes.take()
    assert again is not None
    assert again in taken
    pipes.give(again)
    pipes.close()


def test_without_a_descriptor_there_is_no_pipe_and_no_error() -> None:
    pipes = Pipes(PIPES_A_WORKER)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        assert pipes.take() is None
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert pipes.take() is None  # the kernel is not asked again at once


def push_through(proxy: Proxy, exchange: Exchange, mebibytes: int = 8) -> List[int]:
    """Send so much while the reader holds still at first; the pipes of the proxy before, meanwhile and afterwards."""
    client, server = proxy.connect(), exchange.accept()
    counts, data = [pipes_of(proxy)], os.urandom(MIB) * mebibytes
    pushing = threading.Thread(target=client.sendall, args=(data,))
    pushing.start()
    wait_until(lambda: proxy.metrics()["downstream_flow_control_paused_reading_total"], "backpressure")
    counts.append(pipes_of(proxy))
    assert receive_exactly(server, len(data)) == data
    pushing.join()
    for sock in (client, server):
        sock.close()
    line = proxy.line("connection")
    assert (line["rx_bytes"], line["discarded_bytes"]) == (len(data), 0)
    return [*counts, pipes_of(proxy)]


def pipes_of(proxy: Proxy) -> int:
    """Open ends of pipes."""
    return sum(is_pipe(link) for pid in proxy.family() for link in Path(f"/proc/{pid}/fd").iterdir())


def is_pipe(link: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):  # closed since it was listed
        return os.readlink(link).startswith("pipe:")
    return False


def test_a_long_transfer_takes_one_pipe_and_keeps_it_for_the_next(start: Any, exchange: Exchange) -> None:
    proxy = start(exchange, "--workers=1")
    assert "zero_copy=splice" in proxy.line("start")["knobs"]
    before, during, after = push_through(proxy, exchange)
    assert (during - before, after - before) == (2, 2)
    assert push_through(proxy, exchange) == [after, after, after]
    assert proxy.stop() == 0


def test_with_zero_copy_never_there_is_no_pipe(start: Any, exchange: Exchange) -> None:
    proxy = start(exchange, "--workers=1", "--zero-copy=never")
    assert not any("zero_copy" in knob for knob in proxy.line("start")["knobs"])
    assert len(set(push_through(proxy, exchange))) == 1
    assert proxy.stop() == 0


_HOARD = f"""
import fcntl, os, sys
pipes = []
try:
    while True:
        pipes.append(os.pipe())
        fcntl.fcntl(pipes[-1][1], 1031, {SIZE})
except OSError:
    print(len(pipes), flush=True)
sys.stdin.read()
"""


def test_a_user_whose_pipe_quota_is_used_up_copies(bundle: Path, exchange: Exchange) -> None:
    """The quota is the user's (fs.pipe-user-pages-soft), so that another program of the same user can use it up."""
    with as_nobody(bundle) as command, hoarder(command[len(BECOME)]):
        proxy = Proxy(command, "-t", exchange.target, "-p0", "--workers=1", "--timestamps=preserve", "--metrics-interval=0")
        try:
            assert len(set(push_through(proxy, exchange))) == 1
            assert proxy.stop() == 0
        finally:
            proxy.close()


@contextlib.contextmanager
def hoarder(python: str) -> Iterator[None]:
    command = [*BECOME, python, "-I", "-S", "-c", _HOARD]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert int(process.stdout.readline()) > 1
        yield
        process.communicate()


@pytest.mark.parametrize("direction", ["to upstream", "to downstream"])
@pytest.mark.parametrize("then", ["more", "the end"])
def test_urgent_bytes_in_a_stream_arrive_in_line_and_so_do_those_behind_them(
    start: Any, exchange: Exchange, then: str, direction: str
) -> None:
    """splice(2) stops at the urgent mark for good, with EAGAIN, or with 0 once FIN is there: recv(2) must go on."""
    proxy = start(exchange, "--workers=1")
    client, server = proxy.connect(), exchange.accept()
    if direction == "to downstream":
        client, server = server, client
    data = os.urandom(MIB) * 8

    def send() -> None:
        for _ in range(3):
            client.sendall(data)
            client.send(b"!", socket.MSG_OOB)
        client.sendall(b"behind")
        if then == "the end":
            client.shutdown(socket.SHUT_WR)

    sending = threading.Thread(target=send)
    sending.start()
    expected = (data + b"!") * 3 + b"behind"
    assert receive_exactly(server, len(expected)) == expected
    sending.join()
    for sock in (client, server):
        sock.close()
    assert proxy.line("connection")["reason"] == "closed"
    assert proxy.stop() == 0
