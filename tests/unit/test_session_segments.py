"""Segments of one session in a loop of its own: what is counted is what its record says, also at 2**32 and without TCP_INFO."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from typing import Iterator, Tuple

import pytest
from _tsproxy.linux import sockets
from _tsproxy.linux.addresses import pack
from _tsproxy.linux.sockets import TcpInfo
from _tsproxy.policy.gates import Preserve
from _tsproxy.proxy.context import RouteContext
from _tsproxy.proxy.inbox import Command, Message
from _tsproxy.proxy.session import Session
from _tsproxy.stats.counters import Counter
from _tsproxy.stats.endings import Ending
from _tsproxy.stats.records import ConnectionRecord, decode
from harness import PATIENCE, Exchange, wait_until
from lone_context import lone_worker

PATIENCE_NS = int(PATIENCE * 1e9)


class Stand:
    """A session that relays, its two ends, and its record."""

    def __init__(self, context: RouteContext, exchange: Exchange, records: int) -> None:
        self.context, self._records = context, records
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.client = socket.create_connection(listener.getsockname(), PATIENCE)
            accepted, address = listener.accept()
        client, upstream = pack(socket.AF_INET, address), pack(socket.AF_INET, (exchange.host, exchange.port))
        message = Message(Command.CLIENT, accepted.detach(), 1, time.monotonic_ns(), client, upstream)
        self.session = Session(context, message)
        self.session.start()
        context.loop.run_for(PATIENCE_NS, lambda: self.counted()[0] > 0)
        self.server = exchange.accept()

    def counted(self) -> Tuple[int, int]:
        counters = self.context.counters
        return counters[Counter.SEGMENTS_SENT], counters[Counter.SEGMENTS_RECEIVED]

    def of_kernel(self) -> Tuple[int, int]:
        """What TCP_INFO says of the upstream socket."""
        info = sockets.tcp_info(self.session._directions[0].sink)
        return info.segments_sent, info.segments_received

    def end(self, *peers: TcpInfo) -> ConnectionRecord:
        """Its record. `peers` is TCP_INFO that was just read; without it, it is read once more."""
        self.session.end(Ending.DRAIN, peers)
        self.context.loop.close_pending()
        found, _ = decode(os.read(self._records, 65536))
        (record,) = [record for record in found if isinstance(record, ConnectionRecord)]
        return record


@pytest.fixture
def stand(exchange: Exchange) -> Iterator[Stand]:
    reader, writer = os.pipe()
    with lone_worker(4096, gate=Preserve(), records=writer) as (_, context):
        made = Stand(context, exchange, reader)
        yield made
        made.session.end(Ending.DRAIN)
        made.client.close()
        vars(made).clear()
    for fd in (reader, writer):
        os.close(fd)


def told(record: ConnectionRecord) -> Tuple[object, object]:
    return record.upstream_segments_sent, record.upstream_segments_received


def test_segments_of_the_handshake_are_counted_at_once_and_the_rest_at_the_end(stand: Stand) -> None:
    assert stand.counted() == (2, 1)  # SYN and ACK, SYN-ACK
    stand.client.sendall(b"order")
    stand.context.loop.run_for(PATIENCE_NS, lambda: stand.of_kernel()[0] == 3)
    assert stand.counted() == (2, 1)
    kernel = wait_until(lambda: stand.of_kernel()[1] == 2 and stand.of_kernel(), "the ACK")
    assert told(stand.end()) == stand.counted() == kernel


def test_segments_go_on_beyond_32_bits_where_the_kernel_begins_again(stand: Stand) -> None:
    seen = TcpInfo(False, 0, 0, 0, False, False)
    for sent, received in ((2**32 - 2, 2**31), (3, 2**32 - 1), (3, 0)):
        seen = seen._replace(segments_sent=sent, segments_received=received)
        stand.session._count_segments(seen)
    assert told(stand.end(seen, seen)) == stand.counted() == (2**32 + 3, 2**32)


def test_segments_are_null_where_the_kernel_does_not_count_them(stand: Stand) -> None:
    """Before Linux 4.2 struct tcp_info ends with tcpi_bytes_received."""
    info = sockets._tcp_info(bytes([1]).ljust(136, b"\xff"))
    assert (info.acknowledged, info.segments_sent, info.segments_received) == (2**64 - 1, 0, 0)
    stand.session._segments_sent = stand.session._segments_received = 0
    assert told(stand.end(info, info)) == (None, None)


def test_segments_of_a_session_without_bytes_are_looked_at_each_ninth_visit(stand: Stand) -> None:
    """The exchange's keepalive probes are answered: by the kernel, so nobody else notices. Nine visits take less than 10 s."""
    for _ in range(9):
        stand.session.visit_each_second()
    counted = stand.counted()
    for option, value in ((socket.TCP_KEEPIDLE, 1), (socket.TCP_KEEPINTVL, 1)):
        stand.server.setsockopt(socket.IPPROTO_TCP, option, value)
    stand.server.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    wait_until(lambda: stand.of_kernel() > counted, "a probe")
    for _ in range(8):
        stand.session.visit_each_second()
    assert stand.counted() == counted
    stand.session.visit_each_second()
    assert stand.counted() > counted


def test_segments_seen_before_stand_if_tcp_info_is_refused_at_the_end(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(sock: socket.SocketType) -> TcpInfo:
        raise OSError(errno.EPERM, "refused")

    monkeypatch.setattr(sockets, "tcp_info", refused)
    record = stand.end()
    assert told(record) == stand.counted() == (2, 1)
    counters = stand.context.counters
    assert (counters[Counter.BUGS], counters[Counter.ENDED], counters[Counter.CONNECTS_ENDED]) == (1, 1, 1)
    assert stand.context.registry.sessions == {}
    with contextlib.suppress(ConnectionResetError):
        assert stand.client.recv(1) == b""
