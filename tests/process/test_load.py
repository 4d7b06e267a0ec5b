"""Many connections and much data: each is served, memory stays where it was."""

from __future__ import annotations

import contextlib
import hashlib
import resource
import selectors
import socket
import threading
import time
from typing import Any, Iterator, List

import pytest
from harness import Exchange, Proxy, wait_until

MIB = 1 << 20
CONNECTIONS = 5000


class Echoes:
    """An echo server for thousands of connections in one thread."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
        self.listener.setblocking(False)
        self.target = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self._wake, self._stop = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        for sock in (self.listener, self._stop):
            self._selector.register(sock, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            for key, _ in self._selector.select():
                sock: Any = key.fileobj
                if sock is self._stop:
                    return
                if sock is self.listener:
                    with contextlib.suppress(BlockingIOError):
                        self._selector.register(sock.accept()[0], selectors.EVENT_READ)
                elif data := sock.recv(1 << 16):
                    sock.sendall(data)
                else:
                    self._selector.unregister(sock)
                    sock.close()

    def close(self) -> None:
        self._wake.send(b"x")
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()
        self._wake.close()


@pytest.fixture
def echoes() -> Iterator[Echoes]:
    server = Echoes()
    yield server
    server.close()


@pytest.mark.slow
def test_five_thousand_connections_are_held_and_each_is_served(start: Any, echoes: Echoes) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard < 2 * CONNECTIONS + 200:
        pytest.fail(f"LOUD: the hard limit of {hard} descriptors is too low for this test")
    proxy = start(echoes.target, f"--max-connections={CONNECTIONS}", "--connection-log=off", "--workers=1", "--runtime=threads")
    clients = [ask(proxy.connect(), b"warm")]
    before = proxy.rss_kib()
    try:
        clients += [ask(proxy.connect(), b"%06d" % number) for number in range(1, CONNECTIONS)]
        per_connection = (proxy.rss_kib() - before) / CONNECTIONS
        assert proxy.metrics()["downstream_cx_active"] == CONNECTIONS
        assert per_connection <= 4, f"{per_connection:.2f} KiB of user memory for an idle connection"
        for number, client in enumerate(clients):
            ask(client, b"again %06d" % number)
        proxy.expect_reset()
    finally:
        for client in clients:
            client.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    proxy.wait_metrics(lambda line: line["downstream_cx_active"] == 0)
    assert proxy.stop() == 0


def ask(client: socket.socket, what: bytes) -> socket.socket:
    client.sendall(what)
    assert client.recv(64) == what
    return client


@pytest.mark.slow
def test_a_reader_that_stops_for_ten_seconds_while_a_gibibyte_comes_gets_every_byte(start: Any, exchange: Exchange) -> None:
    proxy = start(exchange, "--runtime=threads")  # forked memory is shared, and hard to attribute
    client, server = proxy.connect(), exchange.accept()
    sent = threading.Thread(target=push, args=(client, 1024))
    base = proxy.rss_kib()
    sent.start()
    memory: List[int] = watch(proxy, 10.0)
    digest, received = hashlib.sha256(), 0
    buffer = memoryview(bytearray(MIB))
    while count := server.recv_into(buffer):
        digest.update(buffer[:count])
        received += count
    memory.append(proxy.rss_kib())
    sent.join()
    for sock in (server, client):
        sock.close()
    assert received == 1024 * MIB
    assert digest.hexdigest() == expected(1024)
    assert max(memory) - base < 1024, f"memory grew by {max(memory) - base} KiB"
    assert proxy.line("connection")["discarded_bytes"] == 0


def watch(proxy: Proxy, seconds: float) -> List[int]:
    """The proxy's memory while the reader stops: the 10 s are the fault itself, not a wait for something."""
    end, seen = time.monotonic() + seconds, []
    wait_until(lambda: seen.append(proxy.rss_kib()) or time.monotonic() > end, deadline=2 * seconds)
    return seen


def block(number: int) -> bytes:
    return (b"%08d" % number) * (MIB // 8)


def push(client: socket.socket, mebibytes: int) -> None:
    client.settimeout(60)
    for number in range(mebibytes):
        client.sendall(block(number))
    client.shutdown(socket.SHUT_WR)


def expected(mebibytes: int) -> str:
    digest = hashlib.sha256()
    for number in range(mebibytes):
        digest.update(block(number))
    return digest.hexdigest()
