"""The timestamp policy in its simplest true form: strip where the sysctl is 0, or not at all."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from typing import Any, Iterator

import pytest
from _tsproxy.linux import sockets, wakeup
from _tsproxy.policy import gates, levers
from _tsproxy.policy.evidence import Evidence
from harness import CHECKOUT, Exchange, Proxy, echo, receive_exactly, wait_until
from namespaces import Namespace

pytestmark = pytest.mark.root


@pytest.fixture
def clean() -> Iterator[Namespace]:
    with contextlib.closing(Namespace(tcp_timestamps="0")) as namespace:
        yield namespace


@pytest.fixture
def proxy(clean: Namespace) -> Iterator[Proxy]:
    with clean:
        far = Exchange(echo)
    running = Proxy([*clean.enter, *CHECKOUT], "-t", far.target, "-p0", "--metrics-interval=0")
    yield running
    running.close()
    far.close()


def ask(namespace: Namespace, proxy: Proxy) -> None:
    with namespace:
        client = proxy.connect()
    with client:
        client.sendall(b"clean?")
        assert receive_exactly(client, 6) == b"clean?"


def test_strip_relays_where_the_sysctl_is_off_and_the_line_carries_the_evidence(clean: Namespace, proxy: Proxy) -> None:
    assert proxy.line("start")["witness"] == "sysctl"
    ask(clean, proxy)
    line = proxy.line("connection")
    assert (line["witness"], line["upstream_timestamps"], line["client_timestamps"]) == ("sysctl", False, False)
    assert proxy.metrics()["upstream_cx_timestamps_total"] == 0


@pytest.mark.parametrize("value", ["1", "2"])
def test_a_sysctl_switched_on_later_lets_no_syn_out(clean: Namespace, proxy: Proxy, value: str) -> None:
    ask(clean, proxy)
    clean.sysctl("tcp_timestamps", value)
    with clean:
        proxy.expect_reset()
    line = proxy.line("connection", lambda line: line["reason"] == "policy")
    assert (line["termination_state"], line["level"], line["upstream_timestamps"]) == ("PR", "error", None)
    assert (line["rx_bytes"], line["tx_bytes"]) == (0, 0)
    metrics = proxy.metrics()
    assert (metrics["upstream_cx_policy_refused_total"], metrics["upstream_cx_total"]) == (1, 1)
    clean.sysctl("tcp_timestamps", "0")
    ask(clean, proxy)


class Preempted(socket.socket):
    """A connection whose reader is off the CPU for a while, just before the kernel answers."""

    def getsockopt(self, *args: Any) -> Any:
        time.sleep(0.01)
        return super().getsockopt(*args)


def test_a_worker_that_is_preempted_while_it_looks_refuses_no_good_connection(clean: Namespace) -> None:
    evidence, asked = Evidence.create(), {socket.AF_INET: wakeup.create()}
    with clean:
        gate = gates.gate_for(levers.Lever.SYSCTL, levers.Policy("strip"), evidence, asked)
        with socket.create_server(("127.0.0.1", 0)) as listener, Preempted() as client:
            client.connect(listener.getsockname())
            assert gate.may_relay(client, sockets.tcp_info(client))
    gate._sysctl.close()
    os.close(evidence.fd)
    asked[socket.AF_INET].close()


def test_preserve_relays_and_counts_the_legs_with_timestamps() -> None:
    dirty = Namespace(tcp_timestamps="1")
    with dirty:
        far = Exchange(echo)
    proxy = Proxy([*dirty.enter, *CHECKOUT], "-t", far.target, "-p0", "--timestamps=preserve")
    ask(dirty, proxy)
    line = proxy.line("connection")
    assert (line["client_timestamps"], line["upstream_timestamps"], line["witness"]) == (True, True, "none")
    metrics = wait_until(proxy.metrics)
    assert (metrics["downstream_cx_timestamps_total"], metrics["upstream_cx_timestamps_total"]) == (1, 1)
    assert proxy.stop() == 0
    proxy.close()
    far.close()
    dirty.close()
