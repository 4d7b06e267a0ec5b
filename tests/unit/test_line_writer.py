"""Standard output that stalls, fills up or dies: lines come out whole or are counted, and nobody waits for it."""

from __future__ import annotations

import fcntl
import os
import select
import socket
from pathlib import Path
from typing import List, Tuple

import pytest
from _tsproxy.stats.line_writer import PIPE_BUF, RESERVE
from harness import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from line_station import BACKLOG, Station, appending, lines_of
from samples import pipe


def drained(reader: int) -> bytes:
    """What is in a pipe now."""
    got = b""
    while select.select([reader], [], [], 0)[0]:
        data = os.read(reader, 1 << 20)
        if not data:
            break
        got += data
    return got


# A reader that keeps up


def test_lines_come_out_in_order_as_they_were_put_in() -> None:
    with pipe() as (reader, writer):
        station = Station(writer)
        sent = lines_of(0, 300)
        station.say(*sent)
        assert station.outlet.is_empty
        assert drained(reader) == b"".join(sent)
        assert station.dropped == 0


def test_nothing_to_write_is_nothing_to_wait_for() -> None:
    with pipe() as (_, writer):
        station = Station(writer)
        station.outlet.write()
        assert station.outlet.is_empty
        assert not station.outlet.awaits_pollout


def test_no_write_is_longer_than_what_a_pipe_takes_at_once() -> None:
    packets, writer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with packets, writer:
        station = Station(writer.fileno())
        sent = [line for length in (100, 4096, 1, 2000, 2096, 4095, 60) for line in lines_of(0, 3, max(8, length))]
        station.say(*sent)
        got: List[bytes] = []
        while sum(map(len, got)) < sum(map(len, sent)):
            got.append(packets.recv(1 << 20))
            station.outlet.write()
        assert b"".join(got) == b"".join(sent)
        assert all(len(packet) <= PIPE_BUF and packet.endswith(b"\n") for packet in got)


def test_the_descriptor_stays_blocking_for_those_who_share_it() -> None:
    with pipe() as (_, writer):
        Station(writer).say(*lines_of(0, 10))
        assert os.get_blocking(writer)


# A reader that stalls


def test_a_stalled_reader_costs_what_is_beyond_the_backlog_and_blocks_nobody() -> None:
    with pipe(4096) as (reader, writer):
        station = Station(writer)
        for line in lines_of(0, 3 * BACKLOG):
            station.say(line)
        assert station.outlet.awaits_pollout
        got = b""
        while not station.outlet.is_empty:
            got += drained(reader)
            station.outlet.write()
        got += drained(reader)
        kept = got.count(b"\n")
        assert got == b"".join(lines_of(0, kept))  # the oldest
        assert kept + station.dropped == 3 * BACKLOG
        assert kept >= BACKLOG


def test_a_rate_limited_line_still_has_a_place_when_the_backlog_is_full() -> None:
    with pipe(4096) as (_, writer):
        station = Station(writer)
        station.say(*lines_of(0, 2 * BACKLOG))
        before = station.dropped
        station.say(*lines_of(0, 200), reserve=RESERVE)
        assert station.dropped == before
        station.say(*lines_of(0, 5))
        assert station.dropped == before + 5
        station.say(*lines_of(0, 1000), reserve=RESERVE)
        assert station.dropped > before + 5 + 700  # bounded all the same


def test_giving_up_counts_what_was_never_written() -> None:
    with pipe(4096) as (reader, writer):
        station = Station(writer)
        station.say(*lines_of(0, 1000))
        station.outlet.discard_queue()
        assert station.outlet.is_empty
        assert drained(reader).count(b"\n") + station.dropped == 1000
        station.outlet.discard_queue()
        assert drained(reader).count(b"\n") == 0


@pytest.mark.parametrize("blocking", [True, False])
def test_a_pipe_that_another_writer_fills_is_written_when_there_is_room_again(blocking: bool) -> None:
    with pipe(4096) as (reader, writer):
        os.set_blocking(writer, blocking)
        station = Station(writer)
        station.say(*lines_of(0, 30))
        os.write(writer, b"x" * (4096 - 3000))
        station.say(*lines_of(30, 30))
        assert drained(reader) == b"".join(lines_of(0, 30)) + b"x" * 1096
        station.outlet.write()
        assert drained(reader) == b"".join(lines_of(30, 30))
        assert station.dropped == 0


# A reader that is gone


def test_a_closed_reader_costs_each_line_once_and_no_signal() -> None:
    with pipe() as (reader, writer):
        station = Station(writer)
        station.say(*lines_of(0, 10))
        os.close(reader)
        station.say(*lines_of(10, 200))
        assert station.dropped == 200
        assert station.outlet.is_empty
        assert not station.outlet.awaits_pollout
        station.say(*lines_of(0, 7))
        assert station.dropped == 207


def test_a_reader_that_leaves_in_the_middle_costs_what_it_did_not_take() -> None:
    with pipe(4096) as (reader, writer):
        station = Station(writer)
        station.say(*lines_of(0, 100))
        got = drained(reader).count(b"\n")
        os.close(reader)
        station.outlet.write()
        assert got + station.dropped == 100
        assert station.outlet.is_empty


def test_a_closed_descriptor_is_a_reader_that_is_gone() -> None:
    with pipe() as (_, writer):
        station = Station(writer)
        os.close(writer)
        station.say(*lines_of(0, 3))
        assert station.dropped == 3
        assert not station.outlet.awaits_pollout
        other = os.memfd_create("what gets the same number later")
        os.dup2(other, writer)
        station.say(*lines_of(3, 3))
        assert os.fstat(other).st_size == 0
        assert station.dropped == 6
        os.close(other)


def test_a_socket_whose_other_end_is_closed_is_a_reader_that_is_gone() -> None:
    near, far = socket.socketpair()
    with near:
        station = Station(near.fileno())
        far.close()
        station.say(*lines_of(0, 3))
        assert station.dropped == 3


# A write that is taken in part


def test_a_reader_that_takes_seven_bytes_at_a_time_gets_all_of_them() -> None:
    with pipe(4096) as (reader, writer):
        station = Station(writer)
        sent = lines_of(0, 200, 99)
        station.say(*sent)
        got = b""
        while not station.outlet.is_empty:
            got += os.read(reader, 7)
            station.outlet.write()
        assert got + drained(reader) == b"".join(sent)


def stream_pair() -> Tuple[socket.socket, socket.socket]:
    """A non-blocking stream socket with little room: it takes writes in part."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    near.setblocking(False)
    return near, far


@settings(deadline=None)
@given(st.lists(st.integers(9, 4096), min_size=1, max_size=200), st.lists(st.integers(1, 9000), min_size=1))
def test_no_two_lines_are_glued_however_the_reader_takes_them(lengths: List[int], bites: List[int]) -> None:
    near, far = stream_pair()
    with near, far:
        station = Station(near.fileno())
        sent = [b"%07d" % number + b"." * (length - 8) + b"\n" for number, length in enumerate(lengths)]
        station.say(*sent)
        got, total = b"", sum(lengths)
        while len(got) < total:
            got += far.recv(bites[len(got) % len(bites)])
            station.later()
        assert got == b"".join(sent)
        assert station.dropped == 0


# A disk that is full


def test_a_device_without_room_is_asked_again_each_second_and_not_before() -> None:
    with appending(Path("/dev/full")) as fd:
        station = Station(fd)
        station.say(*lines_of(0, 3))
        for _ in range(3):
            assert not station.outlet.awaits_pollout
            station.clock.now += 0.5
            assert not station.outlet.awaits_pollout
            station.clock.now += 0.5
            assert station.outlet.awaits_pollout
            station.outlet.write()
        assert not station.outlet.is_empty
        station.outlet.discard_queue()
        assert station.dropped == 3


# Anything in any order


class AnyOrder(RuleBasedStateMachine):
    """A pipe, its outlet, and a reader that takes what it likes and may leave: written and dropped are all that was put in."""

    def __init__(self) -> None:
        super().__init__()
        self.reader, self.writer = os.pipe()
        fcntl.fcntl(self.writer, 1031, 4096)
        self.station = Station(self.writer)
        self.got = b""
        self.gone = False

    @rule(count=st.integers(1, 60), length=st.integers(9, 4096), reserve=st.sampled_from([0, RESERVE // 2, RESERVE]))
    def put(self, count: int, length: int, reserve: int) -> None:
        self.station.say(*lines_of(self.station.put, count, length), reserve=reserve)

    @rule()
    def flood(self) -> None:
        self.station.say(*lines_of(self.station.put, BACKLOG, 9))

    @rule(size=st.integers(1, 20_000))
    def read(self, size: int) -> None:
        if not self.gone and select.select([self.reader], [], [], 0)[0]:
            self.got += os.read(self.reader, size)

    @rule()
    def write(self) -> None:
        self.station.later()

    @rule()
    def leave(self) -> None:
        if not self.gone:
            self.got += drained(self.reader)
            os.close(self.reader)
            self.gone = True

    @invariant()
    def the_reader_has_lines_in_order(self) -> None:
        numbers = [int(line[:7]) for line in self.got.split(b"\n")[:-1]]
        assert all(low < high for low, high in zip(numbers, numbers[1:]))
        assert all(line[7:].strip(b".") == b"" for line in self.got.split(b"\n")[:-1])

    def teardown(self) -> None:
        self.station.outlet.write()
        if not self.gone:
            self.station.outlet.discard_queue()
            self.got += drained(self.reader)
            os.close(self.reader)
        os.close(self.writer)
        assert self.got.count(b"\n") + self.station.dropped == self.station.put


def test_written_and_dropped_are_all_that_was_put_in_whatever_happens() -> None:
    run_state_machine_as_test(AnyOrder, settings=settings(deadline=None, max_examples=examples(60), stateful_step_count=30))
