"""The policy breaks while traffic flows: it is noticed, new connections are refused, nothing is relayed that leaks."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Any, Callable, Iterator, List, Tuple

import pytest
from _tsproxy.policy import syn
from harness import Exchange, Proxy, receive_exactly, wait_until
from rules import REWRITE, generated
from wire import UPSTREAM, Sniffer, Wire

pytestmark = pytest.mark.root

Seen = List[Tuple[bool, int]]


class Leaks:
    """An echo server that notes of each connection whether its SYN carried TSopt, and how many bytes came."""

    def __init__(self, wire: Wire) -> None:
        self.seen: Seen = []
        self.far: Exchange = wire.far_end(4, self._serve)
        self.far.listener.setsockopt(socket.IPPROTO_TCP, 27, 1)  # TCP_SAVE_SYN

    def _serve(self, client: socket.socket) -> None:
        headers = client.getsockopt(socket.IPPROTO_TCP, 28, 256)  # TCP_SAVED_SYN
        received = 0
        try:
            while data := client.recv(4096):
                received += len(data)
                client.sendall(data)
        finally:
            self.seen.append((syn.parse(headers).has_timestamps, received))


@contextlib.contextmanager
def load(wire: Wire, proxy: Proxy) -> Iterator[List[bool]]:
    """Clients that connect, ask and leave, again and again, in two threads; each try's success is noted."""
    answers: List[bool] = []
    ended = threading.Event()
    address = proxy.address

    def ask() -> None:
        while not ended.is_set():
            with wire.client:
                client = socket.socket()
            client.settimeout(20)
            try:
                client.connect(address)
                client.sendall(b"order")
                answers.append(receive_exactly(client, 5) == b"order")
            except (ConnectionResetError, BrokenPipeError):
                answers.append(False)
            client.close()

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def by_sysctl(make_wire: Any) -> Tuple[Wire, Callable[[], None], Callable[[], None]]:
    wire = make_wire(split=True, sysctl="0")
    return wire, lambda: wire.clean.sysctl("tcp_timestamps", "1"), lambda: wire.clean.sysctl("tcp_timestamps", "0")


def by_rules(make_wire: Any) -> Tuple[Wire, Callable[[], None], Callable[[], None]]:
    wire, rules = make_wire(split=False), generated()
    wire.rules(rules)
    undo = lambda: wire.clean.run("nft", "delete", "table", "inet", "tsproxy")  # noqa: E731
    return wire, undo, lambda: wire.rules(rules)


@pytest.mark.parametrize("lever", [by_sysctl, by_rules])
def test_a_lever_that_goes_under_load_lets_no_byte_out_beside_a_timestamp(make_wire: Any, lever: Any) -> None:
    wire, break_it, mend_it = lever(make_wire)
    leaks = Leaks(wire)
    proxy = wire.start(leaks.far, 4, "--connection-log=on", "--max-connections=200")
    with load(wire, proxy) as answers:
        wait_until(lambda: answers.count(True) > 20, "traffic flows")
        break_it()
        drift = proxy.line("timestamps_drift")
        refused = answers.count(False)
        wait_until(lambda: answers.count(False) > refused + 5, "clients are refused")
        served = answers.count(True)
        mend_it()
        healed = proxy.line("timestamps_drift", lambda line: line["level"] == "info")
        wait_until(lambda: answers.count(True) > served + 5, "clients are served again")
    assert drift["level"] == "error"
    assert [line["route"] for line in proxy.lines if line["event"] == "timestamps_drift"] == ["default", "default"]
    assert "TSopt" in drift["message"] or "tcp_timestamps=1" in drift["message"]
    assert proxy.count("timestamps_drift") == 2, "one line for each change"
    assert healed["message"].startswith("the policy holds again")
    metrics = proxy.wait_metrics(lambda line: line["downstream_cx_active"] == 0)
    assert metrics["upstream_cx_policy_refused_total"] >= 5
    assert proxy.stop() == 0
    leaks.far.close()
    assert [received for stamped, received in leaks.seen if stamped and received] == []
    refusals = [line for line in proxy.lines if line["event"] == "connection" and line["reason"] == "policy"]
    assert len(refusals) == metrics["upstream_cx_policy_refused_total"]
    assert {(line["rx_bytes"], line["tx_bytes"], line["termination_state"]) for line in refusals} == {(0, 0, "PR")}


def test_established_connections_stay_clean_under_strip_when_the_sysctl_is_switched_on(make_wire: Any) -> None:
    wire, break_it, _ = by_sysctl(make_wire)
    far = wire.far_end(4)
    proxy = wire.start(far, 4)
    client, server = wire.connect(proxy), far.accept()
    with contextlib.closing(Sniffer(wire.exchange, UPSTREAM)) as sniffer:
        break_it()
        proxy.line("timestamps_drift")
        client.sendall(b"still clean")
        assert receive_exactly(server, 11) == b"still clean"
        packets = sniffer.stop()
    assert [packet for packet in packets if packet.tsval is not None] == []
    client.close()


def test_established_connections_are_reset_under_rewrite_when_the_rules_go(make_wire: Any) -> None:
    wire = make_wire(split=False)
    wire.rules(generated(*REWRITE))
    far = wire.far_end(4)
    proxy = wire.start(far, 4, *REWRITE)
    client, server = wire.connect(proxy), far.accept()
    client.sendall(b"constant")
    assert receive_exactly(server, 8) == b"constant"
    wire.clean.run("nft", "delete", "table", "inet", "tsproxy")
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    assert proxy.line("timestamps_drift")["level"] == "error"
    line = proxy.line("connection")
    assert (line["reason"], line["termination_state"], line["rx_bytes"]) == ("policy_drift", "PD", 8)
    with wire.client:
        proxy.expect_reset()
    metrics = proxy.wait_metrics(lambda line: line["downstream_cx_total"] == 2 and not line["downstream_cx_active"])
    assert (metrics["upstream_cx_policy_ended_total"], metrics["upstream_cx_policy_refused_total"]) == (1, 1)
    client.close()


def test_a_trusted_host_is_believed_but_each_connection_is_still_checked(make_wire: Any) -> None:
    """Nothing strips here, so the promise is false: TCP_INFO shows it, and nothing is relayed."""
    wire = make_wire(split=False)
    far = wire.far_end(4)
    proxy = wire.start(far, 4, "--trust-host")
    assert proxy.line("start")["witness"] == "trusted"
    with wire.client:
        proxy.expect_reset()
    with pytest.raises(ConnectionResetError):
        far.accept().recv(1)
    line = proxy.line("connection")
    assert (line["reason"], line["upstream_timestamps"], line["witness"]) == ("policy", True, "trusted")


def test_a_trusted_host_where_something_outside_strips_relays(make_wire: Any) -> None:
    wire = make_wire(split=False)
    far = wire.far_end(4)
    wire.exchange.run(
        "nft",
        "-f",
        "-",
        input="table netdev outside { chain in { type filter hook ingress device upstream priority 0; "
        "tcp flags & (syn|ack) == syn reset tcp option timestamp; }; }",
    )
    proxy = wire.start(far, 4, "--trust-host")
    client, server = wire.connect(proxy), far.accept()
    client.sendall(b"trusted")
    assert receive_exactly(server, 7) == b"trusted"
    client.close()
    server.close()
    line = proxy.line("connection")
    assert (line["reason"], line["upstream_timestamps"], line["witness"]) == ("closed", False, "trusted")
