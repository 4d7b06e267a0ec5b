"""What the connections of a worker share: sockets that are closed late, buffers, timers, sources in turn."""

from __future__ import annotations

import os
import select
import socket
from typing import Any, Iterator, List

import pytest
from _tsproxy.linux.addresses import Address
from _tsproxy.loop.poller import READ, WRITE, Poller
from _tsproxy.loop.posted import NOW
from _tsproxy.loop.timers import NEVER_NS, TICK_NS, Timers
from _tsproxy.proxy.buffers import Buffers
from _tsproxy.proxy.context import RouteContext
from _tsproxy.proxy.states import Event, Flow, IllegalTransition, Phase, flow_after, phase_after
from hypothesis import given
from hypothesis import strategies as st
from lone_context import lone_context


@pytest.fixture
def context() -> Iterator[RouteContext]:
    with lone_context(4096, [Address(socket.AF_INET, f"127.0.0.{last}", 0) for last in (2, 3, 4)]) as context:
        yield context


class Idle:
    """A handler that nobody calls, and a timer."""

    lane = NOW

    def readable(self) -> None: ...

    def ready(self, mask: int) -> None: ...

    def on_deadline(self, now_ns: int) -> None: ...

    def on_bug(self, bug: Exception) -> None: ...


def test_deferred_close_keeps_the_fd_number_until_the_end_of_the_iteration(context: RouteContext) -> None:
    """Else an event of this turn that was meant for it would reach the connection that got its number."""
    one, other = socket.socketpair()
    number = one.fileno()
    context.loop.watch(number, READ, Idle())
    context.loop.close_later(one)
    assert number not in context.loop.handlers
    assert os.fstat(number)
    with socket.socket() as later:
        assert later.fileno() != number
    context.loop.close_pending()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)
    other.close()


def test_sources_are_tried_each_once_beginning_one_further_each_time(context: RouteContext) -> None:
    turns = [[source.ip[-1] for source in context.sources(socket.AF_INET) if source] for _ in range(4)]
    assert turns == [["2", "3", "4"], ["3", "4", "2"], ["4", "2", "3"], ["2", "3", "4"]]
    assert context.sources(socket.AF_INET6) == [None]


def test_a_pool_gives_buffers_of_its_size_and_keeps_only_a_few() -> None:
    pool = Buffers(8192)
    taken = [pool.acquire() for _ in range(100)]
    assert {len(buffer) for buffer in taken} == {8192}
    for buffer in taken:
        pool.release(buffer)
    assert len(pool._spare) <= 16


deadlines = st.lists(st.tuples(st.integers(0, 9), st.one_of(st.none(), st.integers(0, 10**9))), max_size=50)


@given(deadlines, st.lists(st.integers(0, 10**9), max_size=10))
def test_timers_fire_once_never_early_and_at_most_a_tick_late(script: List[Any], looks: List[int]) -> None:
    timers, armed, owners = Timers(), {}, [Idle() for _ in range(10)]
    for number, deadline in script:
        owner = owners[number]
        if deadline is None:
            timers.disarm(owner)
            armed.pop(owner, None)
        else:
            timers.arm(owner, deadline)
            armed[owner] = deadline
    for now in sorted(looks):
        due = list(timers.due(now))
        assert len(due) == len(set(due))
        for owner in due:
            assert armed.pop(owner) <= now
        assert all(deadline > now - TICK_NS for deadline in armed.values())
    assert (timers.next_ns == NEVER_NS) == (not armed)
    assert not armed or min(armed.values()) <= timers.next_ns < min(armed.values()) + TICK_NS


def test_zero_interest_reports_a_hang_up_once_and_does_not_spin() -> None:
    poller = Poller()
    listener = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(listener.getsockname())
    server, _ = listener.accept()
    poller.register(server.fileno(), 0)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.close()
    ((fd, mask),) = poller.wait(5, 16)
    assert fd == server.fileno()
    assert mask & select.EPOLLERR
    assert poller.wait(0, 16) == []
    poller.close()
    server.close()
    listener.close()


def test_the_poller_is_a_selector_too() -> None:
    one, other = socket.socketpair()
    with Poller() as poller, one, other:
        key = poller.register(one.fileno(), READ | WRITE, "data")
        assert poller.get_key(one.fileno()) == key
        assert poller.select(0) == [(key, WRITE)]
        other.send(b"x")
        assert [(key.data, events) for key, events in poller.select(0)] == [("data", READ | WRITE)]
        poller.modify(one.fileno(), READ, "other")
        assert [(key.data, events) for key, events in poller.select(0)] == [("other", READ)]
        with pytest.raises(KeyError):
            poller.register(one.fileno(), READ)
        poller.unregister(one.fileno())
        assert poller.select(0) == []


@given(st.sampled_from(list(Flow)), st.sampled_from(list(Phase)), st.sampled_from(list(Event)))
def test_a_transition_is_in_the_table_or_raises(flow: Flow, phase: Phase, event: Event) -> None:
    legal = {(Flow.OPEN, Event.EOF), (Flow.DRAINING, Event.FLUSHED)}
    if (flow, event) in legal:
        assert flow_after(flow, event) is not flow
    else:
        with pytest.raises(IllegalTransition):
            flow_after(flow, event)
    if event is Event.ENDED and phase is not Phase.CLOSED:
        assert phase_after(phase, event) is Phase.CLOSED
    elif (phase, event) != (Phase.CONNECTING, Event.CONNECTED):
        with pytest.raises(IllegalTransition):
            phase_after(phase, event)
