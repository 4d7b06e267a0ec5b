"""Clients that err, and too many of them: what they see, what the line says, and that everything is as before afterwards."""

from __future__ import annotations

import hashlib
import resource
import selectors
import signal
import socket
import time
from functools import partial
from pathlib import Path
from typing import Callable, Dict, Iterator, List

import pytest
from faults import (
    BULK,
    BULK_DIGEST,
    CROWD,
    EACH,
    RESET,
    ROUNDS,
    Stand,
    are_kept_at_rest,
    conserved,
    ends,
    fate_of,
    held,
    make_stand,
    sleeps,
)
from harness import Proxy, pause, reset, wait_until

pytestmark = pytest.mark.root

BURST = 10_000
# What was needed at once, and stays with the workers for the next time: 16 buffers of 64 KiB and 2 pipes each at most.
POOL: Dict[str, int] = {"growth_kib": 4096, "spare_fds": 2 * 2 * 2}
HIGH_WATER_KIB = 8192  # what 500 connections at once needed, the allocator keeps; the 10,000 after them add nothing


@pytest.fixture(params=EACH)
def stand(request: pytest.FixtureRequest, bundle: Path) -> Iterator[Stand]:
    yield from make_stand(request.param, bundle)


def test_a_client_that_reads_slowly_holds_nobody_up_and_gets_every_byte(stand: Stand) -> None:
    proxy = stand.start()
    with stand.unharmed(proxy, **POOL):
        slow = stand.connect(proxy)
        before = held(proxy).rss_kib
        slow.sendall(b"p")
        proxy.wait_metrics(lambda line: line["upstream_flow_control_paused_reading_total"] > 0)
        sleeps(proxy)
        for _ in range(4):
            stand.ask(proxy)
        assert held(proxy).rss_kib - before < 1024, "what the client does not take must stay with the exchange"
        digest, received = hashlib.sha256(), 0
        with slow:
            while data := slow.recv(50_000):
                digest.update(data)
                received += len(data)
    assert (received, digest.hexdigest()) == (BULK, BULK_DIGEST)
    line = proxy.line("connection", lambda line: line["tx_bytes"] == BULK)
    assert (line["reason"], line["termination_state"], line["discarded_bytes"]) == ("closed", "--", 0)
    assert ends(proxy) == {}


def test_a_slow_reader_that_gives_up_costs_what_was_under_way(stand: Stand) -> None:
    proxy = stand.start()
    with stand.unharmed(proxy, **POOL):
        clients = stand.crowd(proxy, b"p")
        proxy.wait_metrics(
            lambda line: line["upstream_flow_control_paused_reading_total"] >= CROWD == line["upstream_cx_active"]
        )
        sleeps(proxy)  # each of them is paused: one may have been twice, and another not yet
        for client in clients:
            reset(client)
    assert ends(proxy) == {("client_reset", "CD"): CROWD}
    lost = [line["discarded_bytes"] for line in proxy.lines if line["event"] == "connection" and line["reason"] != "closed"]
    assert all(0 < bytes_lost < BULK for bytes_lost in lost), "one pipe, and what the reset took back from the kernel"


def test_clients_that_reset_while_they_wait_for_the_upstream_leave_nothing(stand: Stand) -> None:
    proxy = stand.start("--connect-timeout=60")
    with stand.unharmed(proxy), stand.no_syn_arrives():
        clients = stand.crowd(proxy, b"e")
        proxy.wait_metrics(lambda line: line["upstream_cx_active"] == CROWD)
        for client in clients:
            reset(client)
        proxy.wait_metrics(lambda line: line["downstream_cx_active"] == 0)
    assert ends(proxy) == {("client_left", "CD"): CROWD}
    line = proxy.line("connection", lambda line: line["reason"] == "client_left")
    assert (line["rx_bytes"], line["tx_bytes"], line["connect_us"]) == (0, 0, None)


def test_clients_that_reset_in_the_backlog_before_they_are_accepted_leave_nothing(stand: Stand) -> None:
    proxy = stand.start()
    with stand.unharmed(proxy):
        pause(proxy.process.pid)
        for client in stand.crowd(proxy, b"e"):
            reset(client)
        proxy.process.send_signal(signal.SIGCONT)
    seen = ends(proxy)
    assert sum(seen.values()) == CROWD
    assert set(seen) <= {("client_left", "CD"), ("client_reset", "CD")}, "whichever of the two ends is looked at first"


def test_clients_that_connect_and_send_nothing_are_kept_and_cost_nothing(stand: Stand) -> None:
    proxy = stand.start()
    with stand.unharmed(proxy):
        clients = stand.crowd(proxy)
        proxy.wait_metrics(lambda line: line["upstream_cx_active"] == CROWD)
        are_kept_at_rest(proxy, clients)
    assert ends(proxy) == {}


def test_clients_that_send_nothing_are_reset_by_the_idle_timeout_if_there_is_one(stand: Stand) -> None:
    proxy = stand.start("--idle-timeout=300ms")
    with stand.unharmed(proxy):
        assert [fate_of(client) for client in stand.crowd(proxy)] == [RESET] * CROWD
    assert ends(proxy) == {("idle_timeout", "cD"): CROWD}
    assert proxy.metrics()["idle_timeout_total"] == CROWD


# Ten thousand at once


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < BURST + 1000:
        pytest.fail(f"LOUD: the hard limit of {hard} descriptors is too low for this test")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def overflows(stand: Stand) -> int:
    """How often the kernel found a backlog full in this namespace (TcpExtListenOverflows)."""
    with stand.host, open("/proc/thread-self/net/netstat") as file:
        names, values = (line.split() for line in file if line.startswith("TcpExt:"))
    return int(dict(zip(names, values))["ListenOverflows"])


def burst(stand: Stand, proxy: Proxy) -> List[socket.socket]:
    """All of them connect within a second, none waits for its answer.

    Not all within a tenth: they would send their SYN again in few softirqs, and what is beyond a CPU's queue of received
    packets (net.core.netdev_max_backlog) is lost in every namespace: other tests would miss a reset, which comes once.
    """
    address = proxy.address
    with stand.host:
        clients = [socket.socket() for _ in range(BURST)]
        for number, client in enumerate(clients):
            client.setblocking(False)
            client.connect_ex(address)
            if number % 100 == 0:
                time.sleep(0.01)  # a pace of sending; nothing is waited for
    return clients


def connecting(stand: Stand, proxy: Proxy) -> socket.socket:
    """In the client's namespace; it is not waited for."""
    with stand.host:
        client = socket.socket()
    client.setblocking(False)
    client.connect_ex(proxy.address)
    return client


def served(clients: List[socket.socket], again: Callable[[], socket.socket]) -> int:
    """How many got their answer; each asks once it is connected, and leaves with the answer.

    Who is reset comes again: Linux forgets a handshake beyond the backlog after some 7 s if there are many
    (reqsk_timer_handler(), net/ipv4/inet_connection_sock.c), and a busy machine takes longer than that to serve them.
    """
    count = 0
    with selectors.DefaultSelector() as selector:
        for client in clients:
            selector.register(client, selectors.EVENT_WRITE)
        while selector.get_map():
            events = selector.select(20)
            assert events, f"{len(selector.get_map())} clients wait in vain"
            for key, mask in events:
                client: socket.socket = key.fileobj  # type: ignore[assignment]
                try:
                    if mask & selectors.EVENT_WRITE:
                        client.sendall(b"eA")
                        selector.modify(client, selectors.EVENT_READ)
                        continue
                    count += client.recv(8) == b"A"
                except ConnectionResetError:
                    clients.append(again())
                    selector.register(clients[-1], selectors.EVENT_WRITE)
                selector.unregister(client)
                client.close()
    return count


@pytest.mark.parametrize("stand", EACH[1:], indirect=True)
def test_ten_thousand_connects_at_once_overflow_the_backlog_and_each_is_served(stand: Stand, many_descriptors: None) -> None:
    stand.host.receive_on_one_cpu()
    proxy = stand.start("--max-connections=500", "--on-full=queue")
    with stand.unharmed(proxy, growth_kib=HIGH_WATER_KIB):
        pause(proxy.process.pid)  # so that the backlog is full for sure
        clients = burst(stand, proxy)
        wait_until(lambda: overflows(stand) > 0, "the backlog is full")
        proxy.process.send_signal(signal.SIGCONT)
        try:
            count = served(clients, partial(connecting, stand, proxy))
        finally:
            for client in clients:
                client.close()
    assert ends(proxy) == {}
    assert count == BURST
    metrics = conserved(proxy)
    assert (metrics["downstream_cx_total"], metrics["downstream_cx_overflow"]) == (BURST + 2 * ROUNDS, 0)
