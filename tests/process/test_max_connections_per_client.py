"""--max-connections-per-client in a running tsproxy: whichever worker serves a client, and when workers die."""

from __future__ import annotations

import os
import resource
import signal
import socket
from typing import Any, List

import pytest
from harness import Exchange, Proxy, first_free, free_port, pause, receive_exactly, reset
from program import workers_of


def held(proxy: Proxy, count: int) -> List[socket.socket]:
    clients = [proxy.connect() for _ in range(count)]
    for client in clients:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
    return clients


def works(proxy: Proxy, **options: Any) -> None:
    with proxy.connect(**options) as client:
        client.sendall(b"order")
        assert receive_exactly(client, 5) == b"order"


def test_each_address_has_its_share_and_gets_it_back(begin: Any, echoing: Exchange) -> None:
    proxy = begin(echoing, "--workers=2", "--max-connections-per-client=3")
    assert "max_connections_per_client=3" in proxy.line("start")["limits"]
    clients = held(proxy, 3)
    for _ in range(2):
        proxy.expect_reset()
    works(proxy, source_address=("127.0.0.2", 0))
    metrics = proxy.wait_metrics(lambda line: line["downstream_cx_active"] == 3)
    assert (metrics["downstream_client_cx_overflow"], metrics["downstream_cx_overflow"]) == (2, 0)
    clients.pop().close()
    reset(clients.pop())
    proxy.wait_metrics(lambda line: line["downstream_cx_active"] == 1)
    clients += held(proxy, 2)
    proxy.expect_reset()
    for client in clients:
        client.close()
    assert proxy.stop() == 0
    assert proxy.count("connection") == 6


def test_connections_that_never_reach_the_exchange_give_their_place_back(begin: Any) -> None:
    far = Exchange(port=free_port())
    far.close()  # it refuses from now on
    proxy = begin(far, "--workers=2", "--max-connections-per-client=1")
    for ended in range(1, 6):
        proxy.expect_reset()
        metrics = proxy.wait_metrics(lambda line: line["downstream_cx_active"] == 0)
        assert metrics["downstream_cx_total"] == ended
    assert metrics["downstream_client_cx_overflow"] == 0


def test_with_queue_a_client_beyond_its_share_is_reset_not_queued(start: Any, echoing: Exchange) -> None:
    proxy = start(echoing, "--max-connections=10", "--on-full=queue", "--max-connections-per-client=1")
    with held(proxy, 1)[0]:
        proxy.expect_reset()
        works(proxy, source_address=("127.0.0.2", 0))


def test_ipv4_clients_of_an_ipv6_listener_are_counted_with_their_ipv4_address(start: Any, echoing: Exchange) -> None:
    proxy = start(echoing, "--bind=::", "--max-connections-per-client=1")
    port = proxy.address[1]
    with socket.create_connection(("127.0.0.1", port)) as first:
        first.sendall(b"x")
        assert first.recv(1) == b"x"
        with pytest.raises(ConnectionResetError), socket.create_connection(("127.0.0.1", port)) as second:
            second.recv(1)
        with socket.create_connection(("::1", port)) as other:
            other.sendall(b"x")
            assert other.recv(1) == b"x"


def test_a_killed_workers_clients_get_their_places_back(start: Any, echoing: Exchange) -> None:
    proxy = start(echoing, "--runtime=processes", "--workers=2", "--max-connections-per-client=4")
    clients = held(proxy, 4)
    proxy.expect_reset()
    os.kill(workers_of(proxy)[0], signal.SIGKILL)
    assert "2 connections closed" in proxy.line("error")["message"]
    clients += held(proxy, 2)
    proxy.expect_reset()
    for client in clients:
        client.close()
    proxy.wait_metrics(lambda line: line["downstream_cx_active"] == 0)
    for client in held(proxy, 4):
        client.close()


def test_clients_that_wait_in_a_dead_workers_inbox_keep_their_places(start: Any, echoing: Exchange) -> None:
    proxy = start(echoing, "--runtime=processes", "--workers=1", "--max-connections-per-client=3")
    clients = held(proxy, 1)
    (worker,) = workers_of(proxy)
    pause(worker)
    clients += [proxy.connect() for _ in range(2)]
    proxy.expect_reset()  # so the two before it have been accepted
    os.kill(worker, signal.SIGKILL)
    assert "1 connections closed" in proxy.line("error")["message"]
    for client in clients[1:]:
        client.sendall(b"y")
        assert client.recv(1) == b"y"
    clients += held(proxy, 1)
    proxy.expect_reset()
    for client in clients:
        client.close()


def test_a_client_whose_descriptor_a_worker_can_not_get_gives_its_place_back(start: Any, echoing: Exchange) -> None:
    proxy = start(echoing, "--runtime=processes", "--workers=1", "--max-connections-per-client=1")
    works(proxy)
    proxy.wait_metrics(lambda line: line["downstream_cx_active"] == 0)
    (worker,) = workers_of(proxy)
    old = resource.prlimit(worker, resource.RLIMIT_NOFILE, (first_free(worker, sockets=1), 20000))
    proxy.expect_end()
    assert "LimitNOFILE" in proxy.line("error")["message"]
    resource.prlimit(worker, resource.RLIMIT_NOFILE, old)
    proxy.wait_metrics(lambda line: line["downstream_cx_active"] == 0)
    works(proxy)
    assert proxy.metrics()["downstream_client_cx_overflow"] == 0
