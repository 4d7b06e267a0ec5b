"""Segments from end to end: the counters are the sum of the lines, the most in a second is told, and warned of."""

from __future__ import annotations

import contextlib
import socket
import threading
from pathlib import Path
from typing import Any, Iterator, List

import pytest
from harness import CHECKOUT, PATIENCE, Exchange, Line, Proxy, asking, free_port, of_threads, receive_exactly, reset, wait_until
from program import EACH_RUNTIME, checkout_alone, python_for

FIELDS = ("upstream_segments_sent", "upstream_segments_received")


@pytest.fixture(params=EACH_RUNTIME)
def started(request: pytest.FixtureRequest, bundle: Path, echoing: Exchange) -> Iterator[Proxy]:
    """With two workers of each runtime, by a Python that has it, and a limit of 20 segments."""
    command = [python_for(request.param), "-I", "-S", str(checkout_alone(bundle))]
    words = ["-t", echoing.target, "-p0", "--timestamps=preserve", "--metrics-interval=0", "--segments-warning=20"]
    with contextlib.closing(Proxy(command, *words, "--workers=2", f"--runtime={request.param}")) as proxy:
        yield proxy


def trade(proxy: Proxy, orders: int) -> None:
    """One client, so many orders, each with its echo; it leaves with FIN, or resets after an odd number of them."""
    with proxy.connect() as client:
        for _ in range(orders):
            client.sendall(b"order")
            assert receive_exactly(client, 5) == b"order"
        if orders % 2:
            reset(client)


def sums(lines: List[Line]) -> List[int]:
    connections = [line for line in lines if line["event"] == "connection"]
    return [sum(line[field] or 0 for line in connections) for field in FIELDS]


def test_the_segments_of_metrics_are_the_sum_of_the_connection_lines(started: Proxy) -> None:
    proxy = started
    for orders in (0, 1, 2, 5, 30):
        trade(proxy, orders)
    with proxy.connect() as quick:
        reset(quick)
    metrics = proxy.wait_metrics(lambda line: line["downstream_cx_active"] == 0)
    proxy.wait_lines()
    assert [metrics[field] for field in FIELDS] == sums(proxy.lines)
    assert metrics[FIELDS[0]] > 38  # each order is one, and there are handshakes
    assert 0 < metrics["upstream_segments_per_s_max"] <= metrics[FIELDS[0]]


def test_segments_of_a_connection_that_was_refused_are_null_and_counted_nowhere(start: Any) -> None:
    proxy = start(f"127.0.0.1:{free_port()}")
    proxy.expect_reset()
    line = proxy.line("connection")
    metrics = proxy.metrics()
    assert [line[field] for field in FIELDS] == [None, None]
    assert [metrics[field] for field in FIELDS] == [0, 0]


def test_segments_of_a_session_that_lives_show_within_a_second_and_are_warned_of(started: Proxy) -> None:
    """No line is due but this one: it is the session that wakes the reporter."""
    proxy = started
    assert "segments_warning=20" in proxy.line("start")["knobs"]
    with proxy.connect() as client:
        with asking([client]):
            line = proxy.line("warning")
        metrics = proxy.wait_metrics(lambda line: line["upstream_segments_sent"] > 20)
    assert (line["level"], line["route"]) == ("warning", "default")
    sent = int(line["message"].split()[0])
    assert line["message"] == f"{sent} segments were sent to the exchange in a second; --segments-warning is 20"
    assert 20 < sent <= metrics["upstream_segments_per_s_max"] <= metrics["upstream_segments_sent"]
    proxy.stop()
    assert proxy.count("warning") == 1


ROUTES = """
[DEFAULT]
timestamps = preserve
port = 0
target = {target}
[orders]
[quotes]
segments-warning = 20
"""


def test_segments_of_two_routes_are_told_apart_and_each_has_its_own_limit(echoing: Exchange, tmp_path: Path) -> None:
    """The second one's session begins while the first one's is open, in the same worker."""
    (tmp_path / "routes").write_text(ROUTES.format(target=echoing.target))
    words = [f"--routes={tmp_path / 'routes'}", "--metrics-interval=0", "--workers=1"]
    with contextlib.closing(Proxy(CHECKOUT, *words)) as proxy:
        routes = [proxy.line("route", lambda line, name=name: line["route"] == name) for name in ("orders", "quotes")]
        clients = [socket.create_connection(("127.0.0.1", line["listen_port"]), PATIENCE) for line in routes]
        with asking(clients):
            assert proxy.line("warning")["route"] == "quotes"
        for client in clients:
            client.close()
        wait_until(lambda: proxy.metrics() and proxy.count("connection") == 2, "both sessions have ended")
        proxy.stop()
        last = {line["route"]: line for line in proxy.lines if line["event"] == "metrics"}
        for route in ("orders", "quotes"):
            of_route = [line for line in proxy.lines if line.get("route") == route]
            assert [last[route][field] for field in FIELDS] == sums(of_route)
        assert [last[None][field] for field in FIELDS] == sums(proxy.lines)
        assert 20 < last["quotes"]["upstream_segments_per_s_max"] <= last[None]["upstream_segments_per_s_max"]
        assert proxy.count("warning") == 1


def test_nothing_wakes_the_reporter_while_no_session_is_open(start: Any, echoing: Exchange) -> None:
    proxy = start(echoing, "--workers=1", "--runtime=processes", "--user-timeout=0")
    trade(proxy, 2)
    proxy.wait_metrics(lambda line: line["downstream_cx_active"] == 0)

    def is_at_rest() -> bool:
        before = switches(proxy)
        threading.Event().wait(1.5)  # longer than the time between two samples
        return switches(proxy) == before

    wait_until(is_at_rest, "nothing wakes it")


def switches(proxy: Proxy) -> int:
    """How often the threads of the main process have gone to sleep of their own accord."""
    texts = of_threads([proxy.process.pid], "status")
    return sum(int(line.split()[1]) for text in texts for line in text.splitlines() if line.startswith("voluntary_ctxt"))
