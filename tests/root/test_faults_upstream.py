"""An exchange that errs: what the client sees, what the line says, and that everything is as before afterwards."""

from __future__ import annotations

import contextlib
import errno
import socket
from pathlib import Path
from typing import Iterator

import pytest
from faults import ANSWER, CROWD, EACH, RESET, ROUNDS, Stand, are_kept_at_rest, ends, fate_of, make_stand, sleeps
from harness import Exchange, receive_exactly, wait_until

pytestmark = pytest.mark.root


@pytest.fixture(params=EACH)
def stand(request: pytest.FixtureRequest, bundle: Path) -> Iterator[Stand]:
    yield from make_stand(request.param, bundle)


def test_an_upstream_that_refuses_resets_the_clients_and_serves_those_after(stand: Stand) -> None:
    proxy = stand.start()
    with stand.unharmed(proxy), stand.rule(f"tcp dport {stand.exchange.port} reject with tcp reset"):
        assert [fate_of(client) for client in stand.crowd(proxy)] == [RESET] * CROWD
    assert ends(proxy) == {("connect_refused", "SC"): CROWD}
    line = proxy.line("connection", lambda line: line["reason"] == "connect_refused")
    assert (line["level"], line["connect_us"], line["upstream_port"]) == ("warning", None, stand.exchange.port)
    assert (line["rx_bytes"], line["tx_bytes"]) == (0, 0)
    metrics = proxy.metrics()
    assert (metrics["upstream_cx_connect_fail"], metrics["upstream_cx_connect_timeout"]) == (CROWD, 0)


def test_an_upstream_that_drops_syns_costs_the_connect_timeout_and_no_more(stand: Stand) -> None:
    proxy = stand.start("--connect-timeout=300ms")
    with stand.unharmed(proxy), stand.no_syn_arrives():
        clients = stand.crowd(proxy)
        sleeps(proxy)
        assert [fate_of(client) for client in clients] == [RESET] * CROWD
    assert ends(proxy) == {("connect_timeout", "sC"): CROWD}
    late = [line for line in proxy.lines if line["event"] == "connection" and line["reason"] == "connect_timeout"]
    assert all(300_000 <= line["duration_us"] < 5_000_000 and line["connect_us"] is None for line in late)
    assert proxy.metrics()["upstream_cx_connect_timeout"] == CROWD


def test_an_upstream_whose_backlog_is_full_is_served_again_when_it_accepts(stand: Stand) -> None:
    with stand.host:
        full = Exchange(backlog=0)
        first = socket.create_connection((full.host, full.port))
    with contextlib.closing(full), first:
        proxy = stand.start("--connect-timeout=300ms", target=full.target)
        assert [fate_of(client) for client in stand.crowd(proxy)] == [RESET] * CROWD
        assert full.accept().getpeername() == first.getsockname()
        with stand.connect(proxy) as client:
            client.sendall(b"later")
            with full.accept() as server:
                assert receive_exactly(server, 5) == b"later"
        wait_until(lambda: proxy.metrics()["downstream_cx_active"] == 0)
        assert ends(proxy) == {("connect_timeout", "sC"): CROWD}


def test_an_upstream_that_goes_silent_costs_nothing_until_the_idle_timeout_ends_it(stand: Stand) -> None:
    proxy = stand.start("--idle-timeout=1")
    with stand.unharmed(proxy):
        clients = stand.crowd(proxy, b"s" + b"unanswered")
        proxy.wait_metrics(lambda line: line["downstream_cx_rx_bytes_total"] == 6 * ROUNDS + 11 * CROWD)
        sleeps(proxy)
        assert [fate_of(client) for client in clients] == [RESET] * CROWD
    assert ends(proxy) == {("idle_timeout", "cD"): CROWD}
    line = proxy.line("connection", lambda line: line["reason"] == "idle_timeout")
    assert (line["rx_bytes"], line["tx_bytes"], line["discarded_bytes"]) == (11, 0, 0)
    assert proxy.metrics()["idle_timeout_total"] == CROWD


def test_an_upstream_that_goes_silent_keeps_its_clients_if_there_is_no_idle_timeout(stand: Stand) -> None:
    proxy = stand.start()
    with stand.unharmed(proxy):
        clients = stand.crowd(proxy, b"s")
        proxy.wait_metrics(lambda line: line["downstream_cx_rx_bytes_total"] == 6 * ROUNDS + CROWD)
        are_kept_at_rest(proxy, clients)
    assert ends(proxy) == {}


def test_an_upstream_that_resets_in_mid_stream_resets_the_client_after_what_it_had_said(stand: Stand) -> None:
    proxy = stand.start()
    with stand.unharmed(proxy):
        for client in stand.crowd(proxy, b"r"):
            assert receive_exactly(client, len(ANSWER)) == ANSWER
            client.sendall(b"?")
            assert fate_of(client) == RESET
    assert ends(proxy) == {("server_reset", "SD"): CROWD}
    line = proxy.line("connection", lambda line: line["reason"] == "server_reset")
    assert (line["rx_bytes"], line["tx_bytes"]) == (2, len(ANSWER))
    assert line["upstream_tx_bytes"] + line["discarded_bytes"] == 2  # it reset without an ACK for the last one, or after it
    assert proxy.metrics()["cx_reset_by_peer_total"] == CROWD


def test_half_close_of_the_upstream_lets_the_client_send_on(stand: Stand) -> None:
    proxy = stand.start()
    with stand.unharmed(proxy):
        clients = stand.crowd(proxy, b"h")
        for client in clients:
            assert receive_exactly(client, len(ANSWER) + 1) == ANSWER
        sleeps(proxy)
        for client in clients:
            client.sendall(b"still here")
            client.close()
    assert ends(proxy) == {}
    line = proxy.line("connection", lambda line: line["tx_bytes"] == len(ANSWER))
    assert (line["reason"], line["termination_state"], line["rx_bytes"]) == ("closed", "--", 11)


def test_half_close_timeout_ends_a_silent_client_of_a_half_closed_upstream(stand: Stand) -> None:
    proxy = stand.start("--half-close-timeout=300ms")
    with stand.unharmed(proxy):
        for client in stand.crowd(proxy, b"h"):
            with client:
                assert receive_exactly(client, len(ANSWER) + 1) == ANSWER
                # EPIPE is what Linux calls a reset that comes after a FIN.
                assert wait_until(lambda: client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)) == errno.EPIPE  # noqa: B023
    assert ends(proxy) == {("half_close_timeout", "cD"): CROWD}
