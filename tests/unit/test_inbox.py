"""The inbox: each entry exactly once and in order, whatever the order of events, and whoever takes over."""

from __future__ import annotations

import os
import socket
from typing import Iterator, List

import pytest
from _tsproxy.proxy import inbox
from _tsproxy.proxy.inbox import RING_SLOTS, Command, Message
from _tsproxy.stats.counters import SharedCounters
from hypothesis import given
from hypothesis import strategies as st


class Pair:
    """Both sides of an inbox; a consumer may be replaced, as a worker is."""

    def __init__(self, kind: str) -> None:
        self._shared_counters = SharedCounters.create(1)
        row = self._shared_counters.worker(0)
        if kind == "ring":
            self.place = inbox.create_ring()
            self.producer: inbox.RingProducer | inbox.ChannelProducer = inbox.RingProducer(self.place, row)
        else:
            self.producer = inbox.ChannelProducer(row)
            self.place = None
        self.replace()

    def replace(self) -> None:
        """The consumer is gone, perhaps in the middle of taking; another begins."""
        self._drop_consumer()
        self.producer.redispatch()
        place = self.place or inbox.Channel(os.dup(self.producer.theirs.fileno()))
        self.consumer = inbox.consumer(place, self._shared_counters.worker(0))

    def _drop_consumer(self) -> None:
        if isinstance(getattr(self, "consumer", None), inbox.ChannelConsumer):
            self.consumer._socket.close()

    def close(self) -> None:
        self._drop_consumer()
        if self.place:
            self.place.wakeup.close()
            os.close(self.place.memory)
        else:
            self.producer.theirs.close()
            self.producer._ours.close()
        os.close(self._shared_counters.fd)
        vars(self).clear()  # the maps go with their last reference, and their descriptors with them


@pytest.fixture(params=["ring", "channel"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    made = Pair(request.param)
    yield made
    made.close()


def all_of(consumer: inbox.Consumer) -> List[Message]:
    """Take as long as there is something to take."""
    entries: List[Message] = []
    while message := consumer.pop():
        entries.append(message)
    return entries


def order(number: int) -> Message:
    return Message(Command.CLIENT, -1, number, number * 7, bytes(24), b"u" * 24 * (number % 5))


def test_messages_come_out_as_they_went_in(pair: Pair) -> None:
    for number in range(10):
        assert pair.producer.put(order(number))
    assert not pair.producer.is_empty
    assert all_of(pair.consumer) == [order(number) for number in range(10)]
    assert pair.producer.is_empty
    assert all_of(pair.consumer) == []


def test_a_full_inbox_says_so_and_takes_again_when_there_is_room(pair: Pair) -> None:
    count = 0
    while pair.producer.put(order(count)):
        count += 1
    assert 16 < count <= max(RING_SLOTS, 1024), "a socket has room for what net.core.wmem_default allows"
    taken: List[Message] = []
    while more := all_of(pair.consumer):
        taken += more
    assert [message.connection_id for message in taken] == list(range(count))
    assert pair.producer.put(order(count))


def test_a_descriptor_goes_over_and_is_the_same_socket(pair: Pair) -> None:
    ours, theirs = socket.socketpair()
    pair.producer.put(Message(Command.CLIENT, theirs.detach(), 1))
    message = pair.consumer.pop()
    assert message is not None
    with socket.socket(fileno=message.fd) as received, ours:
        ours.sendall(b"over")
        assert received.recv(4) == b"over"


steps = st.lists(st.one_of(st.just("put"), st.integers(1, 5), st.just("replace")), max_size=60)


@given(st.sampled_from(["ring", "channel"]), steps)
def test_each_message_comes_once_and_in_order_even_if_the_reader_dies_in_between(kind: str, script: List[object]) -> None:
    pair = Pair(kind)
    put, taken = 0, []
    for step in script:
        if step == "put":
            put += pair.producer.put(order(put))
        elif step == "replace":
            pair.replace()
        else:
            taken += [message.connection_id for message in (pair.consumer.pop() for _ in range(int(str(step)))) if message]
            pair.replace()  # what it was told of and has not taken is not lost
    while not pair.producer.is_empty:
        taken += [message.connection_id for message in all_of(pair.consumer)]
    assert taken == list(range(put))
    pair.close()


def test_a_producer_that_is_gone_means_kill() -> None:
    pair = Pair("channel")
    pair.producer._ours.close()
    assert pair.consumer.pop() == Message(Command.KILL)
    pair.close()
