"""A system call that is refused though another way is at hand ends no connection: gVisor, a seccomp profile, a BPF hook."""

from __future__ import annotations

import os
import socket
import sys
import threading
from typing import Any, Iterator, List

import pytest
from harness import CHECKOUT, SUPPORT, Exchange, Line, Proxy, receive_all, wait_until

REFUSING = str(SUPPORT / "refusing_launcher.py")
DATA = os.urandom(1 << 20) * 12
FILL = "splice:4=1048576"  # by its length: from the source into the pipe
SEND = "splice:4!=1048576"  # and from the pipe to the sink


@pytest.fixture
def refused(exchange: Exchange) -> Iterator[Any]:
    """Start a proxy for which these calls are refused."""
    running: List[Proxy] = []

    def begin(*rules: str) -> Proxy:
        words = ["-t", exchange.target, "-p0", "--workers=1", "--timestamps=preserve", "--metrics-interval=0"]
        running.append(Proxy([sys.executable, REFUSING, *rules, "--", *CHECKOUT], *words))
        return running[-1]

    yield begin
    for proxy in running:
        proxy.close()


def push(proxy: Proxy, exchange: Exchange, paused: bool) -> Line:
    """A long stream, with its reader too slow at first or not; the connection's line."""
    with proxy.connect() as client, exchange.accept() as server:

        def send() -> None:
            client.sendall(DATA)
            client.shutdown(socket.SHUT_WR)

        sending = threading.Thread(target=send)
        sending.start()
        if paused:
            wait_until(lambda: proxy.metrics()["downstream_flow_control_paused_reading_total"], "backpressure")
        assert receive_all(server) == DATA
        sending.join()
    return proxy.line("connection")


@pytest.mark.parametrize("paused", [False, True], ids=["in one go", "with backpressure"])
@pytest.mark.parametrize("rule", [f"{FILL}:EINVAL", f"{FILL}:EPERM", f"{SEND}:EINVAL", f"{SEND}:ENOSYS", "splice:ENOMEM"])
def test_a_direction_for_which_splice_is_refused_is_copied(refused: Any, exchange: Exchange, rule: str, paused: bool) -> None:
    proxy = refused(rule)
    line = push(proxy, exchange, paused)
    assert (line["reason"], line["rx_bytes"], line["discarded_bytes"]) == ("closed", len(DATA), 0)
    assert rule.rpartition(":")[2] in proxy.line("warning")["message"]
    push(proxy, exchange, paused=False)
    assert proxy.metrics()["internal_errors_total"] == 0
    assert proxy.stop() == 0
    assert proxy.count("error") == 0
    if "ENOMEM" not in rule:
        assert proxy.count("warning") == 1, "splice(2) was tried again"
