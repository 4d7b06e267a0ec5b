"""The worker pool: exits and replacements, backoff, round-robin dispatch, and commands that find an inbox full."""

from __future__ import annotations

import contextlib
import os
from typing import Any, Iterator, List, Tuple

import pytest
from _tsproxy.cli.config import Config, Route
from _tsproxy.linux import wakeup
from _tsproxy.loop.event_loop import EventLoop
from _tsproxy.policy.levers import Lever, Policy
from _tsproxy.proxy.inbox import RING_SLOTS, Command, Message, RingConsumer
from _tsproxy.stats.counters import ACCEPTOR_ROW, Counter, SharedCounters
from _tsproxy.supervisor import worker_slot
from _tsproxy.supervisor.worker_args import RouteArgs, WorkerShared
from _tsproxy.supervisor.worker_pool import Replacement, WorkerExit, WorkerPool

SECOND = 1_000_000_000
PING = Message(Command.PING)


class ScriptedRunner:
    """A runner without a worker: the test says when it exits, and which start() fails."""

    can_start = True
    exit_status = "exit code 1"

    def __init__(self) -> None:
        self.is_alive = False
        self.failures: List[OSError] = []

    def start(self) -> None:
        if self.failures:
            raise self.failures.pop()
        self.is_alive = True


class Stand:
    """A pool of workers that are not there, its loop, and what it reports."""

    def __init__(self, workers: int, accepts: bool) -> None:
        self.events: List[Any] = []
        self.backoffs: List[float] = []
        self.loop, self.exited, self.counters = EventLoop(), wakeup.create(), SharedCounters.create(workers)
        config = Config(routes=(), workers=workers, runtime="threads")
        shared = WorkerShared(config, {}, -1, {}, self.counters.fd, -1, self.exited)
        self.pool = WorkerPool(self.loop, self, shared, self.counters, {0: self.counters})
        self.pool.accepts = accepts
        self.rings = [slot.runner._args.inbox for slot in self.pool._slots]  # type: ignore[attr-defined]
        self.consumers = [RingConsumer(ring, self.counters.worker(number)) for number, ring in enumerate(self.rings)]
        self.runners = [ScriptedRunner() for _ in range(workers)]
        for slot, runner in zip(self.pool._slots, self.runners):
            slot.runner = runner
        self.pool.start()

    def on_worker_exit(self, worker_exit: WorkerExit) -> None:
        self._note(worker_exit)

    def on_restart(self, number: int, replacement: Replacement) -> None:
        self._note((number, replacement))

    def on_fork_server_exit(self, exit_status: str) -> None:
        self._note(exit_status)

    def _note(self, event: Any) -> None:
        self.events.append(event)
        self.backoffs.append(self.pool._slots[0].backoff_s)

    def exit(self, number: int) -> None:
        """The worker exits, and the pool sees it."""
        self.runners[number].is_alive = False
        self.exited.wake()
        self.run_until(len(self.events) + 1)

    def run_until(self, events: int) -> None:
        self.loop.run_for(10 * SECOND, lambda: len(self.events) >= events)

    def consume(self, number: int) -> List[Command]:
        """All that is in the inbox."""
        found = []
        while True:
            message = self.consumers[number].pop()
            if message is None:
                return found
            found.append(message.command)

    def close(self) -> None:
        self.loop.close()
        for ring in self.rings:
            os.close(ring.memory)
            ring.wakeup.close()
        self.exited.close()
        os.close(self.counters.fd)
        for consumer in self.consumers:
            vars(consumer).clear()
        vars(self).clear()


@pytest.fixture
def stand(request: pytest.FixtureRequest) -> Iterator[Stand]:
    workers, accepts = getattr(request, "param", (2, False))
    with contextlib.closing(Stand(workers, accepts)) as made:
        yield made


one_that_accepts = pytest.mark.parametrize("stand", [(1, True)], indirect=True)


def test_a_worker_that_exits_is_replaced_and_its_connections_are_written_off(stand: Stand) -> None:
    row = stand.counters.worker(1)
    row[Counter.BEGUN], row[Counter.ENDED] = 5, 2
    stand.exit(1)
    assert stand.events == [WorkerExit(1, "exit code 1", 3, Replacement())]
    assert stand.runners[1].is_alive
    ours = stand.counters.rows[ACCEPTOR_ROW]
    assert (ours[Counter.LOST_WITH_WORKER], ours[Counter.WORKER_RESTARTS]) == (3, 1)


def test_a_replacement_that_can_not_be_started_is_tried_again_after_a_backoff_that_doubles(stand: Stand) -> None:
    stand.runners[0].failures = [OSError(11, "no room")] * 3
    stand.exit(0)
    stand.run_until(4)
    replacements = [stand.events[0].replacement, *(replacement for _, replacement in stand.events[1:])]
    assert replacements == [Replacement(delay="no room")] * 3 + [Replacement()]
    assert stand.backoffs == [0.1, 0.2, 0.4, 0.0]
    assert stand.counters.rows[ACCEPTOR_ROW][Counter.WORKER_RESTARTS] == 1


def test_one_whose_replacements_die_at_once_is_given_up_and_no_client_is_dispatched_to_it(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_slot, "_QUICK_S", 1e9)
    for _ in range(3):
        stand.exit(0)
    assert [event.replacement.obstacle for event in stand.events] == ["", "", "its replacements die at once"]
    stand.exited.wake()
    stand.loop.run_for(SECOND // 50)
    assert len(stand.events) == 3, "reported once"
    assert all(stand.pool.dispatch(PING) for _ in range(4))
    assert [len(stand.consume(number)) for number in (0, 1)] == [0, 4]


def test_where_nothing_can_start_a_worker_any_more_there_is_no_replacement(stand: Stand) -> None:
    stand.runners[0].can_start = False
    stand.exit(0)
    assert stand.events[0].replacement == Replacement(obstacle="nobody can start a replacement")


@pytest.mark.parametrize("end", ["drain", "kill"])
def test_exits_after_drain_or_kill_are_expected(stand: Stand, end: str) -> None:
    stand.runners[0].failures = [OSError(11, "no room")] * 9
    stand.exit(0)
    getattr(stand.pool, end)()
    stand.runners[1].is_alive = False
    stand.exited.wake()
    stand.loop.run_for(SECOND // 5)  # longer than the backoff
    assert len(stand.events) == 1
    assert not stand.pool.is_alive


def test_clients_are_dispatched_in_turn_and_past_an_inbox_that_is_full(stand: Stand) -> None:
    for _ in range(RING_SLOTS):
        assert stand.pool.dispatch(PING)
        assert stand.pool.dispatch(PING)
    assert not stand.pool.dispatch(PING)
    assert len(stand.consume(1)) == RING_SLOTS
    assert stand.pool.dispatch(PING)
    assert stand.pool.dispatch(PING)
    assert (len(stand.consume(0)), len(stand.consume(1))) == (RING_SLOTS, 2)


def test_commands_that_find_an_inbox_full_arrive_in_their_order_once_there_is_room(stand: Stand) -> None:
    while stand.pool._slots[0].inbox.put(PING):
        pass
    stand.pool.stop_accepting()
    stand.pool.drain()
    assert stand.consume(1) == [Command.STOP_ACCEPTING, Command.DRAIN], "the other one does not wait"
    assert not stand.pool.has_consumed_all
    assert set(stand.consume(0)) == {Command.PING}
    assert not stand.pool.has_consumed_all
    stand.loop.run_for(10 * SECOND, lambda: not stand.pool._slots[0].pending)
    assert stand.consume(0) == [Command.STOP_ACCEPTING, Command.DRAIN]
    assert stand.pool.has_consumed_all


def test_a_client_does_not_overtake_its_route(stand: Stand) -> None:
    """Nor does a notice or a ping: what was sent until now is known by its number in the inbox."""
    args: Any = RouteArgs(1, Route(()), (), Policy("preserve"), Lever.NONE, False)
    while stand.pool._slots[0].inbox.put(PING):
        pass
    stand.pool.add_route(args, stand.counters)
    consumed = stand.pool.consumption()
    assert set(stand.consume(0)) == {Command.PING}
    for _ in range(2):  # there is room again, but the command that waits comes first
        assert stand.pool.dispatch(Message(Command.CLIENT, route=1))
    stand.pool.notify(Command.EVIDENCE)
    stand.pool.ping()
    assert stand.consume(0) == []
    assert stand.consume(1) == [Command.ADD_ROUTE, Command.CLIENT, Command.CLIENT, Command.EVIDENCE]
    assert not consumed()
    stand.loop.run_for(10 * SECOND, lambda: not stand.pool._slots[0].pending)
    assert not consumed()
    assert stand.consume(0) == [Command.ADD_ROUTE]
    assert consumed()
    assert stand.pool.dispatch(Message(Command.CLIENT, route=1)) and stand.pool.dispatch(Message(Command.CLIENT, route=1))
    assert stand.consume(0) == [Command.CLIENT]


def test_a_notice_is_put_once_until_it_is_consumed_and_not_into_a_full_inbox(stand: Stand) -> None:
    for _ in range(3):
        stand.pool.notify(Command.EVIDENCE)
        stand.pool.notify(Command.POLICY_FAILED)
    assert stand.consume(0) == [Command.EVIDENCE, Command.POLICY_FAILED]
    stand.pool.notify(Command.EVIDENCE)
    assert stand.consume(0) == [Command.EVIDENCE]
    while stand.pool._slots[0].inbox.put(PING):
        pass
    stand.pool.notify(Command.EVIDENCE)
    assert Command.EVIDENCE not in stand.consume(0)


def test_a_ping_is_answered_by_whoever_consumes_it_or_has_exited(stand: Stand) -> None:
    assert stand.pool._slots[0].inbox.put(Message(Command.EVIDENCE))
    stand.pool.ping()
    assert stand.consume(0) == [Command.EVIDENCE], "there was something to consume"
    assert not stand.pool.all_answered()
    stand.runners[1].is_alive = False
    assert stand.pool.all_answered()
    stand.runners[1].is_alive = True
    assert stand.consume(1) == [Command.PING]
    assert stand.pool.all_answered()


@one_that_accepts
def test_the_replacement_of_a_worker_that_accepts_is_sent_the_upstreams(stand: Stand) -> None:
    for upstreams in (b"one", b"one", b"two"):
        stand.pool.start_accepting(upstreams)
    assert stand.consume(0) == [Command.START_ACCEPTING] * 2, "once for each change"
    stand.exit(0)
    sent: List[Tuple[Command, bytes]] = [
        (message.command, message.upstreams) for message in [stand.consumers[0].pop()] if message
    ]
    assert sent == [(Command.START_ACCEPTING, b"two")]
