"""From accept to the first byte: failover, timeouts, sources, access, clients that do not wait."""

from __future__ import annotations

import contextlib
import socket
from typing import Any, Iterator, List

import pytest
from harness import CHECKOUT, Exchange, Proxy, echo, free_port, receive_all, receive_exactly, reset, wait_until
from namespaces import Namespace

WHO_ACCEPTS = pytest.mark.parametrize("workers", ["--workers=1", "--workers=2"])  # the only worker itself, or the main thread
SILENT = "10.99.0.2:9"  # SYNs leave and nothing ever answers


@pytest.fixture(scope="module")
def void() -> Iterator[Namespace]:
    """A namespace with an address that swallows packets: behind a veth whose far end has no address."""
    with contextlib.closing(Namespace(tcp_timestamps="0")) as namespace:
        namespace.run("ip", "link", "add", "void", "type", "veth", "peer", "name", "nobody")
        namespace.run("ip", "addr", "add", "10.99.0.1/24", "dev", "void")
        namespace.run("ip", "link", "set", "void", "up")
        namespace.run("ip", "link", "set", "nobody", "up", "arp", "off")
        namespace.run("ip", "neigh", "add", "10.99.0.2", "lladdr", "02:00:00:00:00:02", "dev", "void")
        yield namespace


@pytest.fixture
def inside(void: Namespace) -> Iterator[Any]:
    """Start a proxy in the namespace, with the default policy."""
    running = []

    def begin(*options: str) -> Proxy:
        running.append(Proxy([*void.enter, *CHECKOUT], "-p0", "--metrics-interval=0", *options))
        return running[-1]

    yield begin
    for proxy in running:
        proxy.close()


def exchange_with(void: Namespace, client: socket.socket) -> None:
    client.sendall(b"ping")
    assert receive_exactly(client, 4) == b"ping"


@pytest.mark.root
def test_targets_are_tried_in_order_and_the_first_that_answers_serves(void: Namespace, inside: Any) -> None:
    with void:
        far = Exchange(echo)
    proxy = inside(
        "-t", f"127.0.0.1:{free_port()}", "-t", SILENT, "-t", far.target, "--connect-timeout=0.2", "--log-level=debug"
    )
    with void, proxy.connect() as client:
        exchange_with(void, client)
    line = proxy.line("connection")
    assert (line["upstream_port"], line["reason"], line["witness"]) == (far.port, "closed", "sysctl")
    tried = [line["message"] for line in proxy.lines if line["event"] == "debug"]
    assert ["ECONNREFUSED" in tried[0], "ETIMEDOUT" in tried[1]] == [True, True]
    metrics = proxy.metrics()
    assert (metrics["upstream_cx_total"], metrics["upstream_cx_connect_fail"]) == (3, 2)
    assert metrics["upstream_cx_connect_timeout"] == 1
    far.close()


@pytest.mark.root
def test_a_silent_target_ends_in_a_timeout_and_the_client_is_reset(void: Namespace, inside: Any) -> None:
    proxy = inside("-t", SILENT, "--connect-timeout=200ms")
    with void:
        proxy.expect_reset()
    line = proxy.line("connection")
    assert (line["reason"], line["termination_state"], line["connect_us"]) == ("connect_timeout", "sC", None)
    assert 200_000 <= line["duration_us"]
    assert line["upstream_timestamps"] is None


@pytest.mark.root
def test_a_client_that_resets_while_connecting_frees_its_place_at_once(void: Namespace, inside: Any) -> None:
    proxy = inside("-t", SILENT, "--connect-timeout=60", "--max-connections=1")
    with void:
        client = proxy.connect()
        wait_until(lambda: proxy.metrics()["upstream_cx_active"] == 1)
        reset(client)
    line = proxy.line("connection")
    assert (line["reason"], line["termination_state"]) == ("client_left", "CD")
    metrics = proxy.metrics()
    assert (metrics["downstream_cx_active"], metrics["upstream_cx_active"]) == (0, 0)


def test_what_a_client_said_and_closed_before_the_connect_is_relayed(start: Any, exchange: Exchange) -> None:
    proxy = start(exchange)
    with proxy.connect() as client:
        client.sendall(b"request and gone")
        client.shutdown(socket.SHUT_WR)
        server = exchange.accept()
        assert receive_all(server) == b"request and gone"
        server.sendall(b"answer")
        server.close()
        assert receive_all(client) == b"answer"
    assert proxy.line("connection")["reason"] == "closed"


def test_upstream_connections_come_from_the_sources_in_turn(start: Any, exchange: Exchange) -> None:
    proxy = start(exchange, "--source=127.0.0.2", "--source=127.0.0.3", "--workers=1")
    seen = []
    for _ in range(4):
        with proxy.connect():
            server = exchange.accept()
            seen.append(server.getpeername()[0])
    assert sorted(seen) == ["127.0.0.2", "127.0.0.2", "127.0.0.3", "127.0.0.3"]
    assert seen[0] != seen[1]


def test_a_source_that_is_not_ours_says_so(start: Any, exchange: Exchange) -> None:
    proxy = start(exchange, "--source=192.0.2.77")
    assert proxy.wait() == 75, "it may come yet: a service manager tries again"
    assert "--source: given '192.0.2.77'" in proxy.stderr()


@pytest.mark.root
@pytest.mark.parametrize(("family", "first", "second"), [(4, "10.97.0.1", "10.97.0.2"), (6, "fd97::1", "fd97::2")])
def test_a_source_address_that_leaves_the_host_leaves_its_share_to_the_others(
    void: Namespace, inside: Any, family: int, first: str, second: str
) -> None:
    ip = ("ip", f"-{family}", "addr")
    length, plain = ("/32", ()) if family == 4 else ("/128", ("nodad",))
    for source in (first, second):
        void.run(*ip, "add", source + length, "dev", "lo", *plain)
    with void:
        far = Exchange(echo, host="127.0.0.1" if family == 4 else "::1")
    proxy = inside("-t", far.target, f"--source={first}", f"--source={second}", "--workers=1")
    address = proxy.address
    void.run(*ip, "del", first + length, "dev", "lo")
    for _ in range(4):
        with void, socket.create_connection(address) as client:
            exchange_with(void, client)
    said = proxy.line("error")["message"]
    assert f"--source={first} is no address of this host any more" in said
    assert "port" not in said
    proxy.wait_metrics(lambda line: line["downstream_cx_active"] == 0)  # no FIN can come to an address that is gone
    void.run(*ip, "del", second + length, "dev", "lo")
    with void:
        proxy.expect_reset()
    line = proxy.line("connection", lambda line: line["reason"] != "closed")
    assert (line["reason"], line["termination_state"]) == ("connect_failed", "SC")
    assert f"--source={second} is" in proxy.line("error", lambda line: second in line["message"])["message"]
    assert not any("port" in line["message"] for line in proxy.lines if line["event"] == "error")
    metrics = proxy.metrics()
    assert (metrics["upstream_cx_connect_fail"], metrics["internal_errors_total"]) == (1, 0)
    proxy.stop()
    far.close()


@pytest.mark.root
def test_ports_that_run_out_are_reported_as_what_they_are(void: Namespace, inside: Any) -> None:
    with void:
        far = Exchange(echo)
    void.sysctl("ip_local_port_range", "50000 50003")
    try:
        proxy = inside("-t", far.target, "--workers=1")
        clients = []
        with void:
            address = proxy.address
            for number in range(8):
                client = socket.socket()
                client.bind(("127.0.0.1", 40000 + number))
                client.connect(address)
                clients.append(client)
        line = proxy.line("connection")
        assert (line["reason"], line["termination_state"]) == ("no_ports", "RC")
        assert "ip_local_port_range" in proxy.line("error")["message"]
        exchange_with(void, clients[0])
        for client in clients:
            client.close()
    finally:
        void.sysctl("ip_local_port_range", "32768 60999")
    proxy.stop()
    far.close()


@WHO_ACCEPTS
def test_a_client_outside_the_allowed_blocks_is_reset_and_counted(start: Any, echoing: Exchange, workers: str) -> None:
    proxy = start(echoing, workers, "--allow=127.0.0.2/32", "--allow=2001:db8::/32")
    proxy.expect_reset()
    with proxy.connect(source_address=("127.0.0.2", 0)) as friend:
        friend.sendall(b"in")
        assert receive_exactly(friend, 2) == b"in"
    metrics = proxy.metrics()
    assert (metrics["downstream_cx_denied"], metrics["downstream_cx_total"]) == (1, 1)


@WHO_ACCEPTS
def test_an_ipv4_client_of_an_ipv6_listener_is_judged_and_named_as_ipv4(start: Any, echoing: Exchange, workers: str) -> None:
    proxy = start(echoing, workers, "--bind=::", "--allow=127.0.0.1")
    port = proxy.line("start")["listen_port"]
    with socket.create_connection(("127.0.0.1", port), 5) as client:
        client.sendall(b"4")
        assert client.recv(1) == b"4"
    assert proxy.line("connection")["client_address"] == "127.0.0.1"


def test_names_resolve_and_a_name_that_does_not_leaves_the_others_in_use(start: Any, echoing: Exchange) -> None:
    proxy = start("does-not-exist.invalid:1", "-t", f"localhost:{echoing.port}")
    assert "does-not-exist.invalid" in proxy.line("warning")["message"]
    with proxy.connect() as client:
        client.sendall(b"ok")
        assert receive_exactly(client, 2) == b"ok"


@pytest.mark.root
@WHO_ACCEPTS
def test_beyond_max_connections_reject_resets_at_once(start: Any, echoing: Exchange, workers: str) -> None:
    proxy = start(echoing, workers, "--max-connections=2")
    inside = [proxy.connect() for _ in range(2)]
    for client in inside:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
    for _ in range(3):
        proxy.expect_reset()
    assert proxy.metrics()["downstream_cx_overflow"] == 3
    assert proxy.line("warning")["message"] == (
        "2 connections, all that --max-connections allows: new clients are reset until one ends"
    )
    inside.pop().close()
    proxy.line("connection")
    with proxy.connect() as fourth:
        fourth.sendall(b"x")
        assert fourth.recv(1) == b"x"
    inside.pop().close()
    assert proxy.stop() == 0
    assert proxy.count("warning") == 1, "once a minute"


@WHO_ACCEPTS
def test_lines_of_connections_targets_and_limits_name_their_route(start: Any, echoing: Exchange, workers: str) -> None:
    options = ("-tno.invalid:1", f"-t{echoing.target}", "--max-connections=1", "--log-level=debug", "--bind=0.0.0.0")
    proxy = start("127.0.0.1:9", workers, *options)
    with proxy.connect() as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        proxy.expect_reset()
        proxy.line("warning", lambda line: "all that" in line["message"])
    proxy.stop()
    assert {line["event"] for line in proxy.lines if "route" not in line} == {"start", "drain", "stop"}
    named = {line["event"]: line["route"] for line in proxy.lines if "route" in line}
    assert named == dict.fromkeys(("connection", "metrics", "warning", "debug"), "default")


@WHO_ACCEPTS
def test_beyond_max_connections_queue_serves_when_a_place_is_free(start: Any, echoing: Exchange, workers: str) -> None:
    proxy = start(echoing, workers, "--max-connections=1", "--on-full=queue")
    first = proxy.connect()
    first.sendall(b"1")
    assert first.recv(1) == b"1"
    with proxy.connect() as second:
        second.sendall(b"2")
        before = proxy.cpu_seconds()
        second.settimeout(0.5)
        with pytest.raises(socket.timeout):
            second.recv(1)
        assert proxy.cpu_seconds() - before < 0.1
        assert "new clients wait in the backlog until one ends" in proxy.line("warning")["message"]
        first.close()
        second.settimeout(10)
        assert second.recv(1) == b"2"
    metrics = proxy.wait_metrics(lambda line: line["downstream_cx_active"] == 0)
    assert (metrics["downstream_cx_total"], metrics["downstream_cx_overflow"]) == (2, 0)


@pytest.mark.root
def test_each_source_brings_its_own_ports(void: Namespace, inside: Any) -> None:
    """Four local ports, two sources: eight connections to one target, and the ninth finds none."""
    with void:
        far = Exchange(echo)
    proxy = inside("-t", far.target, "--source=127.0.0.2", "--source=127.0.0.3", "--workers=1")
    address = proxy.address  # it listens on a port of the usual range
    clients: List[socket.socket] = []
    void.sysctl("ip_local_port_range", "50000 50003")
    try:
        with void:
            for number in range(8):
                clients.append(socket.socket())
                clients[-1].bind(("127.0.0.1", 41000 + number))
                clients[-1].connect(address)
                exchange_with(void, clients[-1])
            ninth = socket.socket()
            ninth.bind(("127.0.0.1", 41008))
            ninth.connect(address)
        assert proxy.line("connection")["reason"] == "no_ports"
        ninth.close()
    finally:
        void.sysctl("ip_local_port_range", "32768 60999")
        for client in clients:
            client.close()
    proxy.stop()
    far.close()
