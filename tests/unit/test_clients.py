"""The share of each client address: right whatever order connections end in, whoever dies, and in bounded memory."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import socket
from collections import deque
from typing import Any, Deque, Iterator, List, Tuple

import pytest
from _tsproxy.cli import config
from _tsproxy.cli.config import MOST_UPSTREAMS
from _tsproxy.linux.addresses import pack, without_port
from _tsproxy.linux.sockets import bind_accept4
from _tsproxy.proxy.acceptor import Acceptor
from _tsproxy.proxy.clients import Clients, slots_for
from _tsproxy.proxy.inbox import _SLOT, Command, Message
from _tsproxy.stats import metrics
from _tsproxy.stats.counters import ACCEPTOR_ROW, Counter, SharedCounters, slot_offset
from harness import PATIENCE, examples
from hypothesis import given, settings
from hypothesis import strategies as st

WORKERS, LIMIT, MOST = 3, 2, 4
V4, V6 = socket.AF_INET, socket.AF_INET6


def four(number: int, port: int = 1) -> bytes:
    return pack(V4, (f"192.0.2.{number}", port))


class Model:
    """The acceptor and its workers, as the limit sees them, beside a plain account of what should be open."""

    def __init__(self, most: int = MOST, limit: int = LIMIT) -> None:
        slots = slots_for(most, limit)
        self.shared_counters = SharedCounters.create(WORKERS, slots)
        self.rows = [
            SharedCounters(self.shared_counters.fd).worker(worker) for worker in range(WORKERS)
        ]  # as a worker maps its own
        self.clients = Clients(self.shared_counters, slots, limit)
        self.most, self.limit = most, limit
        self.waiting: List[Deque[Tuple[int, int]]] = [deque() for _ in range(WORKERS)]  # (client, pair) in an inbox
        self.begun: List[Deque[Tuple[int, int]]] = [deque() for _ in range(WORKERS)]
        self.peak = 0

    def open(self, client: int) -> int:
        return sum(owner == client for worker in (*self.waiting, *self.begun) for owner, _ in worker)

    def arrive(self, client: int, worker: int) -> None:
        """A client comes, as far as --max-connections lets it; it gets in exactly if its share is not used up."""
        if sum(map(len, (*self.waiting, *self.begun))) == self.most:
            return
        client_slot = self.clients.enter(four(client, 1000 + worker))
        assert (client_slot is not None) == (self.open(client) < self.limit)
        if client_slot is not None:
            self.waiting[worker].append((client, client_slot))

    def nobody_takes(self, client: int) -> None:
        """As above, but every inbox is full."""
        before = self.open(client)
        if before < self.limit and sum(map(len, (*self.waiting, *self.begun))) < self.most:
            assert self.clients.enter(four(client)) is not None
            self.clients.leave(four(client))

    def take(self, worker: int) -> None:
        if self.waiting[worker]:
            client, client_slot = self.waiting[worker].popleft()
            self.rows[worker][client_slot] += 1
            self.begun[worker].append((client, client_slot))

    def end(self, worker: int, which: int) -> None:
        if self.begun[worker]:
            self.begun[worker].rotate(which)
            self.rows[worker][self.begun[worker].popleft()[1] + 1] += 1

    def die(self, worker: int) -> None:
        """What it had begun is closed; what waits in its inbox is its replacement's."""
        self.shared_counters.count_lost(worker)
        self.begun[worker].clear()

    def close(self) -> None:
        fd = self.shared_counters.fd
        self.rows.clear()
        vars(self.shared_counters).clear()
        os.close(fd)


@contextlib.contextmanager
def model(**sizes: int) -> Iterator[Model]:
    made = Model(**sizes)
    try:
        yield made
    finally:
        made.close()


CLIENT = st.one_of(st.integers(0, 1), st.integers(0, 9))  # two that come often, and more than there are slots
WORKER = st.integers(0, WORKERS - 1)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("arrive"), CLIENT, WORKER),
        st.tuples(st.just("nobody_takes"), CLIENT),
        st.tuples(st.just("take"), WORKER),
        st.tuples(st.just("end"), WORKER, st.integers(0, 3)),
        st.tuples(st.just("die"), WORKER),
    ),
    min_size=50,
    max_size=200,
)


@settings(deadline=None, max_examples=examples(100))
@given(STEPS)
def test_a_client_gets_in_exactly_while_it_has_less_than_its_share(steps: List[Tuple[Any, ...]]) -> None:
    """Many more clients than slots, in any order of opens, ends and deaths of workers."""
    with model() as world:
        for step, *arguments in steps:
            getattr(world, step)(*arguments)


def test_a_client_that_comes_back_after_another_got_its_slot_has_a_slot_of_its_own() -> None:
    with model(limit=1) as world:
        for client in range(slots_for(MOST, 1) + 1):  # the last one takes over the first vacant slot
            world.arrive(client, 0)
            world.take(0)
            if client < slots_for(MOST, 1):
                world.end(0, 0)
        last = slots_for(MOST, 1)
        for client in range(3):
            world.arrive(client, 1)
        assert world.clients.enter(four(last)) is None
        assert [world.open(client) for client in (0, 1, 2, last)] == [1, 1, 1, 1]


def test_a_thousand_clients_one_after_the_other_need_no_more_slots_than_the_table_has() -> None:
    with model() as world:
        for client in range(1000):
            client_slot = world.clients.enter(pack(V4, (f"10.0.{client // 250}.{client % 250}", 1)))
            assert client_slot is not None
            assert slot_offset(0) <= client_slot < slot_offset(slots_for(MOST, LIMIT))
            world.rows[client % WORKERS][client_slot] += 1
            world.rows[client % WORKERS][client_slot + 1] += 1


def test_where_every_slot_has_connections_a_new_client_is_refused_not_miscounted() -> None:
    with model(most=2) as world:
        slots = slots_for(2, LIMIT)
        assert all(world.clients.enter(four(number)) is not None for number in range(slots))
        assert world.clients.enter(four(slots)) is None
        assert world.clients.enter(four(0)) is not None


def test_without_a_limit_nothing_is_counted_and_no_memory_is_set_aside() -> None:
    assert slots_for(1_000_000, 0) == 0
    with model(limit=0) as world:
        assert [world.clients.enter(four(1)) for _ in range(50)] == [0] * 50
        world.clients.leave(four(1))
        assert len(world.rows[0]) == slot_offset(0)


def test_a_mapped_address_is_the_ipv4_client_and_ports_do_not_matter() -> None:
    assert without_port(pack(V6, ("::ffff:192.0.2.7", 5, 0, 0))) == without_port(four(7, 6))
    assert without_port(pack(V6, ("2001:db8::1", 5, 0, 0))) == without_port(pack(V6, ("2001:db8::1", 6, 0, 0)))


@pytest.mark.parametrize("other", [("2001:db8::2", 5, 0, 0), ("fe80::1", 5, 0, 2)])
def test_another_address_or_another_zone_is_another_client(other: Any) -> None:
    ours = ("fe80::1", 5, 0, 1) if other[0] == "fe80::1" else ("2001:db8::1", 5, 0, 0)
    assert without_port(pack(V6, ours)) != without_port(pack(V6, other))


def test_a_write_off_touches_the_dead_workers_row_alone() -> None:
    with model() as world:
        for row in world.rows:
            row[Counter.BEGUN], row[slot_offset(1)] = 5, 5
            row[Counter.ENDED], row[slot_offset(1) + 1] = 2, 2
        assert world.shared_counters.count_lost(1) == 3
        assert [row[slot_offset(1) + 1] for row in world.rows] == [2, 5, 2]
        assert world.shared_counters.client_ended(slot_offset(1)) == 9


@given(st.integers(0, 2**32 - 1), st.integers(0, MOST_UPSTREAMS))
def test_the_pair_goes_over_to_the_worker(client_slot: int, upstreams: int) -> None:
    message = Message(Command.CLIENT, 5, 7, 9, four(1), bytes(24) * upstreams, client_slot)
    encoded = message.encode()
    assert Message.decode(encoded) == message
    assert len(encoded) <= _SLOT


class FullPool:
    """Workers whose inboxes take nothing while `full`, and keep what they take."""

    def __init__(self) -> None:
        self.full, self.taken = True, []  # type: ignore[var-annotated]

    def dispatch(self, message: Message) -> bool:
        if not self.full:
            self.taken.append(socket.socket(fileno=message.fd))
        return not self.full


def acceptor_of(wanted: config.Route, world: Any, pool: Any) -> Acceptor:
    row = world.shared_counters.rows[ACCEPTOR_ROW]
    say: Any = lambda *_: None  # noqa: E731
    active = functools.partial(metrics.active, world.shared_counters)
    quiet: Any = {"number": 0, "ids": itertools.count(1), "active": active, "log_ratelimited": say}
    return Acceptor(wanted, row, world.clients, dispatch=pool.dispatch, **quiet)


def test_a_client_that_no_worker_takes_keeps_its_share() -> None:
    """It waits for room in an inbox; reset at last, it has used up nothing."""
    pool: Any = FullPool()
    wanted = config.Route(targets=(), max_connections_per_client=1)
    with model(limit=1) as world, socket.create_server(("127.0.0.1", 0)) as listener:
        acceptor = acceptor_of(wanted, world, pool)
        for pool.full in (True, True, False):
            with socket.create_connection(listener.getsockname(), PATIENCE) as client:
                assert acceptor.accept(bind_accept4(listener))
                acceptor.give_up()
                if pool.full:
                    with pytest.raises(ConnectionResetError):
                        client.recv(1)
        assert len(pool.taken) == 1
        pool.taken.pop().close()
        del acceptor


def test_with_queue_nobody_is_taken_beyond_the_limit_though_a_listener_is_ready() -> None:
    """Of two that are ready in one turn, the first may have used up the room."""
    pool: Any = FullPool()
    wanted = config.Route(targets=(), max_connections=1, on_full="queue")
    with model(limit=0) as world, socket.create_server(("127.0.0.1", 0)) as listener:
        acceptor = acceptor_of(wanted, world, pool)
        world.shared_counters.worker(0)[Counter.ACCEPTED] = 1
        with socket.create_connection(listener.getsockname(), PATIENCE) as client:
            client.sendall(b"x")
            assert not acceptor.accept(bind_accept4(listener))
            world.shared_counters.worker(0)[Counter.ENDED] = 1
            pool.full = False
            assert acceptor.accept(bind_accept4(listener))
            assert pool.taken[0].recv(1) == b"x"
        pool.taken.pop().close()
        del acceptor


# From outside, under each runtime
