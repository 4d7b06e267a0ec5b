"""What the latencies in a `metrics` line mean: the longest ones as they were measured, and how late the loop itself is."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from typing import Any, Iterator

import pytest
from harness import Exchange, Proxy, asking, pause, receive_exactly, wait_until

STOPPED_S = 0.5


@contextlib.contextmanager
def traffic(proxy: Proxy) -> Iterator[None]:
    """A client that asks and waits for the answer, again and again."""
    with proxy.connect() as client, asking([client]):
        yield


@pytest.mark.parametrize("runtime", ["processes", "threads"])
def test_a_worker_that_is_stopped_under_traffic_shows_it_in_loop_lag(start: Any, echoing: Exchange, runtime: str) -> None:
    proxy = start(echoing, "--workers=1", f"--runtime={runtime}")
    with traffic(proxy):
        proxy.wait_metrics(lambda line: line["loop_lag_us_count"] > 1, "the loop is sampled")
        for pid in proxy.family():
            pause(pid)
        threading.Event().wait(STOPPED_S)  # the fault itself lasts so long
        for pid in proxy.family():
            os.kill(pid, signal.SIGCONT)
        # It was due within 100 ms, and a tick of the timers.
        found = proxy.wait_metrics(lambda line: line["loop_lag_us_max"] >= (STOPPED_S - 0.12) * 1e6)
    assert found["loop_lag_us_le_65536"] < found["loop_lag_us_count"]


def test_an_idle_worker_is_not_woken_to_see_how_late_it_is(start: Any, echoing: Exchange) -> None:
    proxy = start(echoing, "--workers=1", "--user-timeout=0", "--runtime=processes")
    with traffic(proxy):
        proxy.wait_metrics(lambda line: line["loop_lag_us_count"] > 0)
    wait_until(lambda: proxy.metrics()["downstream_cx_active"] == 0)
    (worker,) = [pid for pid in proxy.family() if pid not in (proxy.process.pid, proxy.family()[1])]

    def is_at_rest() -> bool:
        before = switches(worker)
        threading.Event().wait(0.5)
        return switches(worker) == before

    wait_until(is_at_rest, "nothing wakes it")


def switches(pid: int) -> int:
    """How often the process has gone to sleep of its own accord."""
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("voluntary_ctxt_switches"))


def test_the_longest_connect_is_the_longest_of_the_connection_lines(start: Any, echoing: Exchange) -> None:
    proxy = start(echoing)
    for _ in range(5):
        with proxy.connect() as client:
            client.sendall(b"x")
            assert receive_exactly(client, 1) == b"x"
    found = proxy.wait_lines()
    took = [line["connect_us"] for line in proxy.lines if line["event"] == "connection"]
    assert len(took) == 5
    assert int(found["connect_us_max"]) == max(took)
