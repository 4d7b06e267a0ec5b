"""A bug in what a worker calls: it costs one connection, or the worker, and it is said; nobody else notices."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from typing import Any, Callable, Iterator, List, NamedTuple, Optional, Tuple

import pytest
from _tsproxy.linux.addresses import pack
from _tsproxy.loop import posted
from _tsproxy.loop.poller import BROKEN, READ, READ_EDGES, READABLE, WRITE
from _tsproxy.loop.posted import BULK, ENDING, NEW, NOW
from _tsproxy.loop.timers import TICK_NS
from _tsproxy.policy.gates import Preserve
from _tsproxy.proxy.context import RouteContext
from _tsproxy.proxy.direction import Direction, make_directions
from _tsproxy.proxy.inbox import Command, Message, RingConsumer, RingProducer, create_ring
from _tsproxy.proxy.listener import Listener
from _tsproxy.proxy.liveness import Liveness, Stall, Verdict
from _tsproxy.proxy.registry import Registry
from _tsproxy.proxy.states import CONNECTING
from _tsproxy.proxy.worker import Worker
from _tsproxy.stats.counters import Counter
from _tsproxy.stats.endings import Ending
from _tsproxy.stats.records import Notice, decode
from harness import Exchange, wait_until
from lone_context import OneRoute, lone_worker

PATIENCE = 10


class Gate(Preserve):
    """May have a bug."""

    def __init__(self) -> None:
        super().__init__()
        self.bugs = 0

    def may_connect(self, family: int) -> bool:
        if self.bugs:
            self.bugs -= 1
            raise ValueError("a bug")
        return True


class BrokenAcceptor:
    """Has a bug."""

    pause_s = 0.0

    def accept(self, listener: socket.socket) -> bool:
        raise ValueError("a bug")


class Stand(NamedTuple):
    """A worker, what feeds it, and where its records arrive."""

    worker: Worker
    context: RouteContext
    inbox: RingProducer
    gate: Gate
    records: int

    def run(self) -> threading.Thread:
        thread = threading.Thread(target=self.worker.run)
        thread.start()
        return thread

    def said(self) -> List[str]:
        found, _ = decode(os.read(self.records, 65536))
        return [record.message for record in found if isinstance(record, Notice)]


@pytest.fixture
def stand() -> Iterator[Stand]:
    reader, writer = os.pipe()
    ring, gate = create_ring(), Gate()
    with lone_worker(4096, gate=gate, records=writer) as (of_worker, context):
        consumer, producer = RingConsumer(ring, context.counters), RingProducer(ring, context.counters)
        worker = Worker(of_worker, OneRoute(context), consumer)
        yield Stand(worker, context, producer, gate, reader)
        worker.close()
        vars(consumer).clear()
        vars(producer).clear()
        vars(worker).clear()
    ring.wakeup.close()
    for fd in (reader, writer, ring.memory):
        os.close(fd)


def client_of(stand: Stand, listener: socket.socket, number: int, upstreams: bytes) -> socket.socket:
    client = socket.create_connection(listener.getsockname(), PATIENCE)
    accepted, address = listener.accept()
    packed = pack(socket.AF_INET, address)
    assert stand.inbox.put(Message(Command.CLIENT, accepted.detach(), number, 0, packed, upstreams))
    return client


@pytest.mark.usefixtures("no_cycles")
def test_a_bug_costs_the_connection_it_happened_in(stand: Stand, echoing: Exchange) -> None:
    upstreams = pack(socket.AF_INET, ("127.0.0.1", echoing.port))
    stand.gate.bugs = 1
    thread = stand.run()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with client_of(stand, listener, 1, upstreams) as unlucky, pytest.raises(ConnectionResetError):
            unlucky.recv(1)
        with client_of(stand, listener, 2, upstreams) as client:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
    assert stand.inbox.put(Message(Command.DRAIN))
    thread.join(PATIENCE)
    counters = stand.worker.context.counters
    assert (counters[Counter.BUGS], counters[Counter.BEGUN], counters[Counter.ENDED]) == (1, 2, 2)
    (said,) = stand.said()
    assert said.startswith("Traceback") and said.endswith("ValueError: a bug\n")


def test_a_bug_in_accepting_ends_the_worker(stand: Stand) -> None:
    """It is outside any connection: a replacement starts anew, and one that dies at once again and again is the end."""
    broken: Any = BrokenAcceptor()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        stand.worker.listen(broken, [Listener(stand.worker.context.loop, broken, listener.dup())])
        assert stand.inbox.put(Message(Command.START_ACCEPTING))
        with socket.create_connection(listener.getsockname(), PATIENCE), pytest.raises(ValueError, match="a bug"):
            stand.worker.run()
    assert stand.said()[0].endswith("ValueError: a bug\n")


def test_a_closed_listener_wakes_no_worker_though_the_main_process_has_it_open(stand: Stand) -> None:
    acceptor: Any = BrokenAcceptor()
    context = stand.worker.context
    with socket.create_server(("127.0.0.1", 0)) as listener:
        opened = Listener(context.loop, acceptor, listener.dup())
        opened.start_accepting()
        with socket.create_connection(listener.getsockname(), PATIENCE):
            assert len(context.loop.poller.wait(PATIENCE, 8)) == 1
            opened.close()
            context.loop.close_pending()
            assert context.loop.poller.wait(0, 8) == []


def test_an_event_of_a_descriptor_that_nobody_handles_any_more_is_ignored(stand: Stand) -> None:
    """Closed here, but not yet by the process that handed it over: epoll(7), Questions and answers, 6."""
    reader, writer = os.pipe()
    os.write(writer, b"x")
    stand.worker.context.loop.poller.set_interest(reader, READ_EDGES)
    assert stand.inbox.put(Message(Command.DRAIN))
    stand.worker.run()
    os.close(reader)
    os.close(writer)


class Peer:
    """A handler that notes what it is told of its descriptor, and does something when it is."""

    def __init__(
        self, stand: Stand, name: str, log: List[str], lane: int = NOW, then: Callable[[], Any] = lambda: None
    ) -> None:
        self.stand, self.name, self.log, self.lane, self.then = stand, name, log, lane, then

    def on_bug(self, bug: Exception) -> None:
        self.stand.worker.context.report(bug)

    def readable(self) -> None:
        self.log.append(f"{self.name} says something")
        self.then()

    def ready(self, mask: int) -> None:
        if mask == READABLE:
            self.readable()
        else:
            self.log.append(f"{self.name} leaves" if mask & BROKEN else f"{self.name} has room")
            self.then()


def peers(stand: Stand, *watched: Tuple[Peer, int]) -> List[Tuple[socket.socket, socket.socket]]:
    """A pair of sockets for each: ours, watched, and the peer's."""
    pairs = [socket.socketpair() for _ in watched]
    for (peer, events), (ours, _) in zip(watched, pairs):
        stand.worker.context.loop.watch(ours.fileno(), events, peer)
    return pairs


def one_turn(stand: Stand, pairs: List[Tuple[socket.socket, socket.socket]]) -> None:
    assert stand.inbox.put(Message(Command.DRAIN))
    stand.worker.run()
    for ours, theirs in pairs:
        ours.close()
        theirs.close()


def test_hangups_are_handled_last_in_an_iteration(stand: Stand) -> None:
    """Nobody who has something to say, or room for it, waits until others are buried."""
    log: List[str] = []
    loop = stand.worker.context.loop
    leaver, speaker = Peer(stand, "leaver", log), Peer(stand, "speaker", log)
    # Once: a slice that took long is followed by another epoll_wait(2), and there is room still.
    connecting = Peer(stand, "connecting", log, NEW, then=lambda: loop.unwatch(pairs[1][0].fileno()))
    pairs = peers(stand, (leaver, READ_EDGES), (connecting, WRITE), (speaker, READ_EDGES))
    pairs[0][1].close()
    pairs[2][1].send(b"order")
    one_turn(stand, pairs)
    assert log == ["speaker says something", "connecting has room", "leaver leaves"]


def test_a_descriptor_closed_in_this_iteration_reports_no_hangup(stand: Stand) -> None:
    log: List[str] = []
    leaver, speaker = (
        Peer(stand, "leaver", log),
        Peer(stand, "speaker", log, then=lambda: stand.worker.context.loop.close_later(pairs[0][0])),
    )
    pairs = peers(stand, (leaver, READ_EDGES), (speaker, READ_EDGES))
    pairs[0][1].close()
    pairs[1][1].send(b"order")
    one_turn(stand, pairs)
    assert log == ["speaker says something"]
    assert stand.worker.context.counters[Counter.BUGS] == 0


def test_a_hangup_is_reported_once(stand: Stand) -> None:
    log: List[str] = []
    leaver, speaker = Peer(stand, "leaver", log), Peer(stand, "speaker", log)
    stubborn: Any = speaker
    stubborn.readable = lambda: (
        log.append("speaker says something") or stand.inbox.put(Message(Command.DRAIN))
    )  # so there is a turn more
    pairs = peers(stand, (leaver, READ_EDGES), (speaker, READ_EDGES))
    pairs[0][1].close()
    pairs[1][1].send(b"order")
    stand.worker.run()
    for ours, theirs in pairs:
        ours.close()
        theirs.close()
    assert log == ["speaker says something", "leaver leaves"]


def test_a_bug_in_one_deferred_close_keeps_no_other_from_it(stand: Stand) -> None:
    log: List[str] = []
    first, second = Peer(stand, "first", log), Peer(stand, "second", log)
    broken: Any = first
    broken.ready = lambda mask: {}["a bug"]
    pairs = peers(stand, (first, READ_EDGES), (second, READ_EDGES))
    for _, theirs in pairs:
        theirs.close()
    one_turn(stand, pairs)
    assert log == ["second leaves"]
    assert stand.said()[0].endswith("KeyError: 'a bug'\n")


@pytest.fixture
def one_a_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slice of time is over after one event, however long the rest of the iteration took."""
    serve = posted.Posted.serve
    monkeypatch.setattr(posted, "SLICE_NS", 1)
    monkeypatch.setattr(posted.Posted, "serve", lambda self, handle, now, share_ns: serve(self, handle, now, 0))


@pytest.mark.usefixtures("one_a_slice")
@pytest.mark.parametrize("lane", [NEW, BULK, ENDING])
def test_an_order_comes_between_two_new_clients_two_bulk_transfers_or_two_ends(stand: Stand, lane: int) -> None:
    """Also the order that came after all of them were known to be ready."""
    log: List[str] = []
    crowd = [Peer(stand, f"{number}", log, lane, lambda: pairs[3][1].send(b"order")) for number in range(3)]
    speaker = Peer(stand, "speaker", log)
    pairs = peers(stand, *[(peer, READ_EDGES) for peer in (*crowd, speaker)])
    for peer, (_, theirs) in zip(crowd, pairs):
        if lane == ENDING:
            theirs.close()
            peer.ready = lambda mask, peer=peer: peer.readable()  # type: ignore[method-assign]
        else:
            theirs.send(b"much")
    one_turn(stand, pairs)
    said = [f"{name} says something" for name in ("0", "speaker", "1", "speaker", "2", "speaker")]
    assert log == said[: len(log)] and len(log) >= 5, "the last order may come after the worker's end"


@pytest.mark.usefixtures("one_a_slice")
def test_new_clients_bulk_transfer_and_ends_take_turns(stand: Stand) -> None:
    log: List[str] = []
    lanes = {"new": NEW, "bulk": BULK, "end": NOW}
    crowd = [Peer(stand, name, log, lane) for name, lane in lanes.items() for _ in range(3)]
    pairs = peers(stand, *[(peer, READ_EDGES) for peer in crowd])
    for peer, (_, theirs) in zip(crowd, pairs):
        theirs.close() if peer.name == "end" else theirs.send(b"much")
    one_turn(stand, pairs)
    kinds = [line.split()[0] for line in log]
    assert sorted(kinds[:4]) in (["bulk", "end", "end", "new"], ["bulk", "bulk", "end", "end"]), "the inbox is new, too"
    assert sorted(kinds) == ["bulk"] * 3 + ["end"] * 3 + ["new"] * 3


@pytest.mark.usefixtures("one_a_slice")
def test_an_order_comes_between_two_messages_of_the_inbox(stand: Stand) -> None:
    begun: List[int] = []
    ours, theirs = socket.socketpair()

    def order() -> None:
        begun.append(stand.worker.context.counters[Counter.BEGUN])
        ours.recv(1)

    stand.worker.context.loop.watch(ours.fileno(), READ, Peer(stand, "speaker", [], then=order))
    theirs.send(b"orders")
    for number in range(3):
        assert stand.inbox.put(Message(Command.CLIENT, -1, number))
    assert stand.inbox.put(Message(Command.DRAIN))
    stand.worker.run()
    assert begun == [0, 1, 2, 3]
    assert stand.inbox.is_empty
    ours.close()
    theirs.close()


def test_a_number_that_comes_back_has_no_event_of_the_closed_descriptor(stand: Stand) -> None:
    context = stand.context
    log: List[str] = []
    (gone, other), (ours, theirs) = socket.socketpair(), socket.socketpair()
    fd = gone.fileno()
    context.loop.watch(fd, READ_EDGES, Peer(stand, "first", log, BULK))
    context.loop.posted.put(BULK, fd, READABLE, context.loop.now)
    context.loop.close_later(gone)
    context.loop.close_pending()
    os.dup2(ours.fileno(), fd)
    context.loop.watch(fd, READ_EDGES, Peer(stand, "second", log, BULK))
    assert stand.inbox.put(Message(Command.DRAIN))
    stand.worker.run()
    assert log == []
    os.close(fd)
    for sock in (other, ours, theirs):
        sock.close()


class Ear:
    """What a direction tells, unheard."""

    def on_event(self, direction: Direction, mask: int) -> None:
        direction.readable()

    def on_flow(self) -> None:
        pass

    def on_bug(self, bug: Exception) -> None:
        raise bug


def test_a_direction_that_fills_the_buffer_is_bulk_until_it_does_not(stand: Stand) -> None:
    context, ear = stand.context, Ear()
    near, source = socket.socketpair()
    sink, far = socket.socketpair()
    direction, back = make_directions(ear, context, source, sink)  # type: ignore[arg-type]
    lanes = []
    for size in (100, 5000, 100, 100):
        near.send(bytes(size))
        direction.ready(READABLE)
        lanes.append(direction.lane)
    assert lanes == [NOW, BULK, NOW, NOW]
    context.loop.poller.interests.pop(direction.fd, None)
    direction.detach()
    back.detach()
    for sock in (near, source, sink, far):
        sock.close()


class Ender:
    """A deadline of something else that ends a connection, as a look at its peers may."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def on_deadline(self, now_ns: int) -> None:
        self._session.end(Ending.SERVER_TIMEOUT)

    def on_bug(self, bug: Exception) -> None:
        raise bug


@pytest.mark.parametrize("idle_ns", [1, 3_600_000_000_000], ids=["that is over", "that begins anew"])
def test_a_session_that_one_deadline_ends_has_no_idle_timeout_in_the_same_iteration(
    stand: Stand, echoing: Exchange, idle_ns: int
) -> None:
    context = stand.context
    context.settings = context.settings._replace(idle_timeout_ns=idle_ns)
    with relayed(stand, echoing) as session:
        context.loop.timers.arm(Ender(session), TICK_NS)
        context.loop.timers.arm(session, 2 * TICK_NS)
        context.loop._expire(TICK_NS)
        context.loop.close_pending()
    assert (context.counters[Counter.BUGS], context.counters[Counter.ENDED]) == (0, 1)
    assert session not in list(context.loop.timers.due(2**62))


@contextlib.contextmanager
def relayed(stand: Stand, echoing: Exchange) -> Iterator[Any]:
    """A connection that relays, in a worker that does not run."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = client_of(stand, listener, 1, pack(socket.AF_INET, ("127.0.0.1", echoing.port)))
    with client:
        stand.worker.readable()
        (session,) = stand.context.registry.sessions.values()
        wait_until(lambda: session._phase is not CONNECTING or one_event(stand), "it relays")
        yield session


def one_event(stand: Stand) -> None:
    """Handle what comes next."""
    for fd, mask in stand.worker.context.loop.poller.wait(PATIENCE, 1):
        stand.worker.context.loop.handlers[fd].ready(mask)


class BrokenLiveness(Liveness):
    """Has a bug."""

    def check(self, sink: socket.SocketType, stall: Optional[Stall], now_ns: int) -> Verdict:
        raise ValueError("a bug")


class BrokenEvents:
    """A session with a bug in what a direction tells it."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def on_flow(self) -> None:
        raise ValueError("a bug")

    def on_bug(self, bug: Exception) -> None:
        self._session.on_bug(bug)


@pytest.mark.parametrize("what", ["check of its peers", "back-off"])
def test_a_bug_in_a_connections_other_deadlines_costs_that_connection(stand: Stand, echoing: Exchange, what: str) -> None:
    context = stand.context
    with relayed(stand, echoing) as session:
        direction, _ = session._directions
        if what == "back-off":
            context.loop.timers.arm(direction, TICK_NS)
            direction.session = BrokenEvents(session)
        else:
            context.liveness = BrokenLiveness(1)
            context.registry = Registry(context.loop.timers, context.liveness.step_ns)
            context.registry.sessions[1] = session
            context.registry.begin_sweeps(0)
        context.loop.now = 10**9
        context.loop._expire(TICK_NS)
        assert (context.counters[Counter.BUGS], context.counters[Counter.ENDED]) == (1, 1)
        context.loop.close_pending()
    assert "Traceback" in stand.said()[0]
