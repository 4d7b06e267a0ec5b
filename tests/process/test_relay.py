"""What each form of the program must do: relay, half-close, reset, report, drain. Checkout and bundle, each Python."""

from __future__ import annotations

import signal
import socket
import threading
from typing import Any

import pytest
from harness import Exchange, free_port, receive_all, receive_exactly, reset, wait_until

LINE_FIELDS = {
    "start": "version listen_address listen_port targets timestamps witness workers runtime python json_encoder knobs limits",
    "connection": "connection_id worker client_address client_port upstream_address upstream_port "
    "upstream_local_address upstream_local_port duration_us connect_us rx_bytes tx_bytes upstream_tx_bytes discarded_bytes "
    "unacknowledged_bytes client_timestamps client_syn_tsval upstream_timestamps witness upstream_rtt_us "
    "upstream_retransmits upstream_segments_sent upstream_segments_received reason termination_state",
    "metrics": "start_time uptime_s interval_s downstream_cx_total downstream_cx_overflow downstream_cx_denied "
    "downstream_cx_rx_bytes_total downstream_cx_tx_bytes_total upstream_cx_total upstream_cx_rx_bytes_total "
    "upstream_cx_tx_bytes_total upstream_cx_connect_fail upstream_cx_connect_timeout downstream_cx_timestamps_total "
    "upstream_cx_timestamps_total upstream_cx_policy_refused_total downstream_flow_control_paused_reading_total "
    "upstream_flow_control_paused_reading_total cx_reset_by_peer_total idle_timeout_total log_lines_dropped_total "
    "worker_restarts_total downstream_cx_active upstream_cx_active rx_bytes_per_s tx_bytes_per_s "
    "upstream_segments_sent upstream_segments_received upstream_segments_per_s upstream_segments_per_s_max "
    "connect_us_p50 connect_us_p99 connect_us_p999 connect_us_max relay_us_p50 relay_us_p99 relay_us_p999 relay_us_max",
    "drain": "",
    "stop": "",
}


def test_what_a_client_sends_comes_back_and_the_line_says_so(start_form: Any, echoing: Exchange) -> None:
    proxy = start_form(echoing)
    with proxy.connect() as client:
        client.sendall(b"order" * 100_000)
        client.shutdown(socket.SHUT_WR)
        assert receive_all(client) == b"order" * 100_000
        ours = client.getsockname()
    line = proxy.line("connection")
    assert (line["client_address"], line["client_port"]) == ours
    assert (line["upstream_address"], line["upstream_port"]) == (echoing.host, echoing.port)
    assert (line["rx_bytes"], line["tx_bytes"], line["discarded_bytes"]) == (500_000, 500_000, 0)
    assert (line["reason"], line["termination_state"], line["witness"]) == ("closed", "--", "none")
    assert 0 < line["connect_us"] < line["duration_us"]


def test_every_line_has_its_fields_and_the_end_is_counted(start_form: Any, echoing: Exchange) -> None:
    proxy = start_form(echoing)
    with proxy.connect() as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
    proxy.line("connection")
    assert proxy.stop() == 0
    events = [line["event"] for line in proxy.lines]
    assert events == ["start", "connection", "drain", "metrics", "stop"]
    for line in proxy.lines:
        assert {"timestamp", "level", "event", "pid", *LINE_FIELDS[line["event"]].split()} <= line.keys()
        assert not any(isinstance(value, dict) for value in line.values())
    last = proxy.line("metrics")
    assert (last["downstream_cx_total"], last["upstream_cx_total"]) == (1, 1)
    assert (last["downstream_cx_active"], last["upstream_cx_active"]) == (0, 0)
    assert (last["downstream_cx_rx_bytes_total"], last["downstream_cx_tx_bytes_total"]) == (1, 1)
    assert last["relay_us_p50"] > 0
    assert proxy.stderr() == ""


@pytest.mark.parametrize("first", ["client", "server"])
def test_eof_on_one_side_keeps_the_other_flowing(start_form: Any, exchange: Exchange, first: str) -> None:
    proxy = start_form(exchange)
    client = proxy.connect()
    server = exchange.accept()
    early, late = (client, server) if first == "client" else (server, client)
    early.sendall(b"last words")
    early.shutdown(socket.SHUT_WR)
    assert receive_all(late) == b"last words"
    for _ in range(3):
        late.sendall(b"still here")
        assert receive_exactly(early, 10) == b"still here"
    late.close()
    assert early.recv(1) == b""
    client.close()
    line = proxy.line("connection")
    assert (line["reason"], line["rx_bytes"] + line["tx_bytes"]) == ("closed", 40)


@pytest.mark.parametrize("who", ["client", "server"])
def test_a_reset_is_passed_on_as_a_reset(start_form: Any, exchange: Exchange, who: str) -> None:
    proxy = start_form(exchange)
    client = proxy.connect()
    server = exchange.accept()
    client.sendall(b"hello")
    assert receive_exactly(server, 5) == b"hello"
    breaks, suffers = (client, server) if who == "client" else (server, client)
    reset(breaks)
    with pytest.raises(ConnectionResetError):
        suffers.recv(1)
    suffers.close()
    line = proxy.line("connection")
    assert (line["reason"], line["termination_state"]) == (f"{who}_reset", "CD" if who == "client" else "SD")
    assert proxy.metrics()["cx_reset_by_peer_total"] == 1


def test_a_refused_connect_resets_the_client(start_form: Any) -> None:
    proxy = start_form(f"127.0.0.1:{free_port()}")
    proxy.expect_reset()
    line = proxy.line("connection")
    assert (line["reason"], line["termination_state"]) == ("connect_refused", "SC")
    assert line["upstream_timestamps"] is None
    assert proxy.metrics()["upstream_cx_connect_fail"] == 1


def test_sigusr1_prints_metrics_and_the_first_sigterm_waits_for_connections(start_form: Any, echoing: Exchange) -> None:
    proxy = start_form(echoing)
    with proxy.connect() as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        assert proxy.metrics()["downstream_cx_active"] == 1
        proxy.process.send_signal(signal.SIGTERM)
        assert proxy.line("drain")["active_connections"] == 1
        with pytest.raises(ConnectionRefusedError):
            proxy.connect()
        client.sendall(b"y")
        assert client.recv(1) == b"y"
    assert proxy.wait() == 0
    assert proxy.line("stop")["drained"] is True


def test_a_second_signal_ends_now(start_form: Any, echoing: Exchange) -> None:
    proxy = start_form(echoing)
    with proxy.connect() as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        proxy.process.send_signal(signal.SIGINT)
        proxy.line("drain")
        proxy.process.send_signal(signal.SIGINT)
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    assert proxy.wait() == 0
    line = proxy.line("connection")
    assert (line["reason"], line["termination_state"]) == ("drain", "KD")
    assert proxy.line("stop")["killed_connections"] == 1


def test_strip_refuses_to_start_where_timestamps_are_on(start_form: Any) -> None:
    with open("/proc/sys/net/ipv4/tcp_timestamps") as sysctl:
        if sysctl.read().strip() == "0":
            pytest.skip("LOUD: this namespace has timestamps off already")
    proxy = start_form("127.0.0.1:9", "--timestamps=strip")
    assert proxy.wait() == 78
    assert "sysctl -w net.ipv4.tcp_timestamps=0" in proxy.stderr()


def test_ipv6_and_names_work_as_targets_and_listeners(start_form: Any) -> None:
    with Exchange6() as far:
        proxy = start_form(far.target, "--bind=::1")
        with proxy.connect() as client:
            server = far.accept()
            client.sendall(b"six")
            assert receive_exactly(server, 3) == b"six"
        assert server.recv(1) == b""
        server.close()
        line = proxy.line("connection")
        assert line["client_address"] == line["upstream_address"] == "::1"
    wait_until(lambda: proxy.metrics()["downstream_cx_active"] == 0)


class Exchange6(Exchange):
    def __init__(self) -> None:
        super().__init__(host="::1")

    def __enter__(self) -> Exchange6:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def test_urgent_bytes_arrive_in_line_and_so_do_those_behind_them(start_form: Any, exchange: Exchange) -> None:
    """A receive stops at the urgent mark (tcp(7)), though there is more: that must not be taken for an empty socket."""
    proxy = start_form(exchange)
    client, server = proxy.connect(), exchange.accept()
    for round_number in range(50):
        for source, sink in ((client, server), (server, client)):
            source.sendall(b"before")
            source.send(b"!", socket.MSG_OOB)
            source.sendall(b"after%02d" % round_number)
            assert receive_exactly(sink, 14) == b"before!after%02d" % round_number
    client.send(b"?", socket.MSG_OOB)
    client.close()
    assert receive_all(server) == b"?"
    server.close()
    line = proxy.line("connection")
    assert (line["reason"], line["rx_bytes"], line["tx_bytes"], line["discarded_bytes"]) == ("closed", 701, 700, 0)
    assert proxy.stop() == 0


def test_the_end_of_file_that_comes_with_the_last_bytes_is_passed_on(start_form: Any, exchange: Exchange) -> None:
    proxy = start_form(exchange)
    for size in (1, 1000, 65535, 65536, 65537, 200_000):
        client, server = proxy.connect(), exchange.accept()
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)  # the last bytes and FIN in one segment
        sending = threading.Thread(target=send_and_shut, args=(client, size))
        sending.start()
        assert len(receive_all(server)) == size
        sending.join()
        server.close()
        assert receive_all(client) == b""
        client.close()
    assert proxy.stop() == 0


def send_and_shut(client: socket.socket, size: int) -> None:
    client.sendall(bytes(size))
    client.shutdown(socket.SHUT_WR)
