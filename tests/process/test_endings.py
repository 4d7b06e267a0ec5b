"""How connections end when something goes wrong in between: silence, stalls, resets nobody is reading, timeouts."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any, Iterator

import pytest
from harness import CHECKOUT, Exchange, Proxy, choke, fill, pause, receive_all, receive_exactly, reset, wait_until
from namespaces import Namespace, require_root

MIB = 1 << 20


def test_idle_timeout_resets_both_sides_and_no_busy_session(start: Any, exchange: Exchange) -> None:
    proxy = start(exchange, "--idle-timeout=0.3")
    busy, idle = proxy.connect(), proxy.connect()
    servers = [exchange.accept(), exchange.accept()]
    busy.sendall(b"b")
    idle.sendall(b"i")
    server_of = {server.recv(1): server for server in servers}
    idle.settimeout(0.05)
    with pytest.raises(ConnectionResetError):
        while True:
            busy.sendall(b"b")
            assert receive_exactly(server_of[b"b"], 1) == b"b"
            with contextlib.suppress(socket.timeout):
                idle.recv(1)
    line = proxy.line("connection")
    assert (line["reason"], line["termination_state"], line["rx_bytes"]) == ("idle_timeout", "cD", 1)
    assert line["duration_us"] >= 300_000
    assert proxy.metrics()["downstream_cx_active"] == 1
    assert proxy.metrics()["idle_timeout_total"] == 1
    busy.close()
    idle.close()


def test_a_stop_that_is_longer_than_the_idle_timeout_ends_nobody_whose_bytes_came_meanwhile(
    start: Any, echoing: Exchange
) -> None:
    """As `docker pause`, job control and debuggers stop it. epoll_wait(2) returns 64 events at a time."""
    proxy = start(echoing, "--idle-timeout=3")  # a busy machine takes a while for so many clients
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(proxy.connect()) for _ in range(150)]
        for client in clients:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
        family, stopped = proxy.family(), time.monotonic()
        for pid in family:
            pause(pid)
        for client in clients:
            client.sendall(b"y")
        wait_until(lambda: time.monotonic() > stopped + 3.2)
        for pid in family:
            os.kill(pid, signal.SIGCONT)
        assert [client.recv(1) for client in clients] == [b"y"] * 150


def test_half_close_timeout_ends_a_silent_half_closed_session(start: Any, exchange: Exchange) -> None:
    proxy = start(exchange, "--half-close-timeout=0.2")
    with proxy.connect() as client:
        server = exchange.accept()
        client.shutdown(socket.SHUT_WR)
        assert server.recv(1) == b""
        with pytest.raises(ConnectionResetError):
            client.recv(1)
        # EPIPE is what Linux calls a reset that comes after a FIN.
        assert wait_until(lambda: server.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)) == errno.EPIPE
    line = proxy.line("connection")
    assert (line["reason"], line["termination_state"]) == ("half_close_timeout", "sD")


def test_a_reader_that_stops_pauses_the_sender_and_gets_every_byte_later(start: Any, exchange: Exchange) -> None:
    proxy = start(exchange)
    client = proxy.connect()
    server = exchange.accept()
    sent = choke(proxy, client)
    paused = proxy.metrics()
    assert paused["downstream_flow_control_paused_reading_total"] >= 1
    assert paused["upstream_cx_tx_bytes_total"] < paused["downstream_cx_rx_bytes_total"] <= sent
    before = proxy.cpu_seconds()
    assert fill(client) == 0
    assert proxy.cpu_seconds() - before < 0.1, "a paused relay must not spin"
    client.shutdown(socket.SHUT_WR)
    assert len(receive_all(server)) == sent
    server.close()
    client.close()
    line = proxy.line("connection")
    assert (line["rx_bytes"], line["discarded_bytes"]) == (sent, 0)


@pytest.mark.parametrize("stalled", ["client", "server"])
@pytest.mark.parametrize("breaks", ["client", "server"])
def test_a_reset_is_noticed_while_reading_is_paused(start: Any, exchange: Exchange, stalled: str, breaks: str) -> None:
    proxy = start(exchange)
    sides = {"client": proxy.connect(), "server": exchange.accept()}
    choke(proxy, sides["server" if stalled == "client" else "client"])
    reset(sides.pop(breaks))
    (left,) = sides.values()
    line = proxy.line("connection")  # before anybody reads, and makes room for what is held
    with pytest.raises(ConnectionResetError):
        receive_all(left)
        left.sendall(b"x")
    assert line["reason"] == f"{breaks}_reset"
    assert line["discarded_bytes"] > 0
    metrics = proxy.metrics()
    assert metrics["downstream_cx_active"] == 0
    received = metrics["downstream_cx_rx_bytes_total"] + metrics["upstream_cx_rx_bytes_total"]
    sent = metrics["downstream_cx_tx_bytes_total"] + metrics["upstream_cx_tx_bytes_total"]
    assert received == sent + line["discarded_bytes"]
    left.close()


def test_bytes_before_the_reset_of_a_server_that_closes_on_unread_data_arrive(start: Any, exchange: Exchange) -> None:
    """close() with unread data sends RST: the answer before it must reach the client, then the reset."""
    proxy = start(exchange)
    client = proxy.connect()
    server = exchange.accept()
    client.sendall(b"never read")
    proxy.wait_metrics(lambda line: line["upstream_cx_tx_bytes_total"] == 10)
    server.sendall(b"logout")
    server.close()
    assert receive_exactly(client, 6) == b"logout"
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    assert proxy.line("connection")["reason"] == "server_reset"
    client.close()


def test_bytes_before_a_servers_reset_arrive_even_if_send_reports_it_first(start: Any, exchange: Exchange) -> None:
    """The client's order and the server's reset come in one turn, the order first: the send fails before the receive."""
    proxy = start(exchange, "--runtime=threads", "--workers=1")
    client = proxy.connect()
    server = exchange.accept()
    client.sendall(b"x")
    assert server.recv(1) == b"x"
    pause(proxy.process.pid)
    client.sendall(b"too late")
    server.sendall(b"logout")
    reset(server)
    proxy.process.send_signal(signal.SIGCONT)
    assert receive_exactly(client, 6) == b"logout"
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    line = proxy.line("connection")
    assert (line["reason"], line["tx_bytes"], line["discarded_bytes"]) == ("server_reset", 6, 8)
    client.close()


def test_hung_up_peers_do_not_spin_the_loop(start: Any, exchange: Exchange) -> None:
    """FIN both ways on the client's side while its bytes are held: the descriptor is hung up, and nothing waits for it."""
    proxy = start(exchange)
    client = proxy.connect()
    server = exchange.accept()
    server.shutdown(socket.SHUT_WR)
    assert client.recv(1) == b""
    sent = 0
    while not proxy.metrics()["downstream_flow_control_paused_reading_total"]:
        sent += client.send(bytes(1 << 16))
    client.shutdown(socket.SHUT_WR)
    inode = str(os.fstat(client.fileno()).st_ino)
    wait_until(lambda: is_fin_acknowledged(inode), "the proxy's kernel has the FIN")
    before = proxy.cpu_seconds()
    with contextlib.suppress(subprocess.TimeoutExpired):
        proxy.process.wait(0.5)
    assert proxy.cpu_seconds() - before < 0.1
    assert len(receive_all(server)) == sent
    server.close()
    client.close()
    assert proxy.line("connection")["reason"] == "closed"


def is_fin_acknowledged(inode: str) -> bool:
    """Whether this process's socket is in TIME_WAIT or CLOSE by /proc/net/tcp, or gone from it: both FINs are through."""
    for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[9] == inode:
            return fields[3] in ("06", "07")
    return True


def test_the_drain_timeout_cuts_what_does_not_end(start: Any, exchange: Exchange) -> None:
    proxy = start(exchange, "--drain-timeout=0.2")
    client = proxy.connect()
    server = exchange.accept()
    choke(proxy, client)
    assert proxy.stop() == 0
    with pytest.raises(ConnectionResetError):
        receive_all(server)
        server.sendall(b"x")
    line = proxy.line("connection")
    assert (line["reason"], line["termination_state"]) == ("drain", "KD")
    assert line["discarded_bytes"] > 0
    assert proxy.line("stop")["killed_connections"] == 1
    client.close()


@pytest.mark.root
def test_drain_while_connecting_ends_that_connection_too(start: Any) -> None:
    with contextlib.closing(Namespace(tcp_timestamps="0")) as namespace:
        with namespace:
            full = socket.create_server(("127.0.0.1", 0), backlog=0)
            filler = socket.create_connection(full.getsockname())
        target = f"127.0.0.1:{full.getsockname()[1]}"
        proxy = Proxy([*namespace.enter, *CHECKOUT], "-t", target, "-p0", "--drain-timeout=0.1", "--connect-timeout=60")
        try:
            with namespace:
                clients = [proxy.connect() for _ in range(3)]
            proxy.wait_metrics(lambda line: line["downstream_cx_total"] == 3)
            assert proxy.stop() == 0
            assert proxy.line("stop")["killed_connections"] == proxy.count("connection")
            assert {line["termination_state"] for line in proxy.lines if line.get("reason") == "drain"} == {"KC"}
        finally:
            proxy.close()
            for sock in (*clients, full, filler):
                sock.close()


@pytest.fixture
def unplugged() -> Iterator[Any]:
    """A proxy and an exchange on two ends of a veth; call it to pull the plug."""
    with contextlib.closing(Namespace(tcp_timestamps="0")) as near, contextlib.closing(Namespace()) as far:
        near.run("ip", "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", f"/proc/{far.pid}/ns/net")
        for namespace, address in ((near, "10.98.0.1/24"), (far, "10.98.0.2/24")):
            namespace.run("ip", "addr", "add", address, "dev", "wire")
            namespace.run("ip", "link", "set", "wire", "up")
        with far:
            exchange = Exchange(host="10.98.0.2")
        proxy = Proxy([*near.enter, *CHECKOUT], "-t", exchange.target, "-p0", "--user-timeout=500", "--keepalive=0")
        yield near, far, proxy, exchange
        proxy.close()
        exchange.close()


@pytest.mark.root
def test_an_upstream_that_is_unplugged_is_dead_after_the_user_timeout(unplugged: Any) -> None:
    near, far, proxy, exchange = unplugged
    with near:
        client = proxy.connect()
    server = exchange.accept()
    client.sendall(b"before")
    assert receive_exactly(server, 6) == b"before"
    far.run("ip", "link", "set", "wire", "down")
    client.sendall(b"after")
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    line = proxy.line("connection")
    assert (line["reason"], line["termination_state"]) == ("server_timeout", "SD")
    client.close()


AT_ONCE = 100


def test_many_connections_leave_no_descriptor_and_no_memory_behind(start: Any, echoing: Exchange) -> None:
    proxy = start(echoing, "--connection-log=off", "--runtime=threads")  # forked memory is shared, and hard to attribute

    def churn(count: int) -> None:
        """Never more than AT_ONCE at the same time: what a worker needed at once it keeps, and how many end late is chance."""
        for number in range(count):
            with proxy.connect() as client:
                client.sendall(b"x")
                assert client.recv(1) == b"x"
                if number % 3 == 0:
                    reset(client)
            if (number + 1) % AT_ONCE == 0:
                proxy.wait_metrics(lambda line: line["downstream_cx_active"] == 0)

    with contextlib.ExitStack() as stack:
        for _ in range(AT_ONCE):
            client = stack.enter_context(proxy.connect())
            client.sendall(b"x")
            assert client.recv(1) == b"x"
    churn(1000)  # by then it has all that it keeps
    fds, rss = proxy.fds(), proxy.rss_kib()
    churn(1000)
    assert proxy.fds() == fds
    assert proxy.rss_kib() - rss < 400, "1,000 connections left 400 bytes each behind"
    assert proxy.count("connection") == 0


@pytest.mark.root
def test_a_client_whose_syn_is_longer_than_can_be_read_ends_nobody(start: Any, echoing: Exchange) -> None:
    """IPv6 extension headers are the client's to choose: to read them must not raise where nobody is left to catch it."""
    require_root()  # for the sticky option
    proxy = start(echoing, "--bind=::1", "--workers=1", "--runtime=threads")
    other = proxy.connect()
    for options in (1, 4):
        header = b"\0\0" + (b"\x1e\xfa" + bytes(250)) * options  # an option that nobody knows, 250 bytes of it
        header += b"\0" * (-len(header) % 8)  # Pad1
        with socket.socket(socket.AF_INET6) as client:
            client.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_DSTOPTS, bytes([0, len(header) // 8 - 1]) + header[2:])
            client.settimeout(10)
            client.connect(proxy.address[:2])
            client.sendall(b"x")
            assert receive_exactly(client, 1) == b"x"
        wait_until(lambda: proxy.metrics()["downstream_cx_active"] == 1, "it has ended")
    other.sendall(b"still here")
    assert receive_exactly(other, 10) == b"still here"
    other.close()
    assert proxy.metrics()["internal_errors_total"] == 0
    assert proxy.stop() == 0


@pytest.mark.parametrize("option", ["--idle-timeout=2592000", "--half-close-timeout=2592000"])
def test_the_longest_timeout_is_one_that_the_kernel_takes(start: Any, exchange: Exchange, option: str) -> None:
    """epoll_wait(2) takes milliseconds as an int: 24.8 days."""
    proxy = start(exchange, option)
    client, server = proxy.connect(), exchange.accept()
    client.sendall(b"x")
    assert receive_exactly(server, 1) == b"x"
    client.shutdown(socket.SHUT_WR)
    assert receive_all(server) == b""
    server.sendall(b"y")
    server.close()
    assert receive_all(client) == b"y"
    client.close()
    assert proxy.metrics()["internal_errors_total"] == 0
    assert proxy.stop() == 0
