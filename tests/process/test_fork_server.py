"""The fork server's messages: whatever a worker dies of has a name, and an order of any length arrives."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, cast

import pytest
from _tsproxy.linux import wakeup
from _tsproxy.proxy.inbox import Channel, ChannelProducer
from _tsproxy.stats.counters import Counter
from _tsproxy.supervisor import fork_server
from _tsproxy.supervisor.worker_args import WorkerArgs, WorkerShared
from handover import hand_over, listeners
from harness import Exchange, children, lives, pause, receive_exactly, wait_until
from hypothesis import given
from hypothesis import strategies as st
from routed import StartRouted


@given(st.integers(1, 64), st.booleans())
def test_each_signal_that_ends_a_worker_has_a_word(number: int, dumped: bool) -> None:
    exit_status = fork_server._exit_status(number | (0x80 if dumped else 0))  # wait(2): the signal, and whether there is a core
    named = {known.value: known.name for known in signal.Signals}
    assert exit_status == f"killed by {named.get(number, f'signal {number}')}"


@given(st.integers(0, 255))
def test_each_exit_code_of_a_worker_is_reported(code: int) -> None:
    assert fork_server._exit_status(code << 8) == f"exit code {code}"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGRTMIN + 6], ids=["KILL", "real-time"])
def test_a_worker_that_any_signal_kills_is_named_and_replaced(start: Any, echoing: Exchange, number: int) -> None:
    proxy = start(echoing, "--runtime=processes", "--workers=1")
    with proxy.connect() as client:
        client.sendall(b"x")
        assert receive_exactly(client, 1) == b"x"
        (fork_server_pid,) = children(proxy.process.pid)
        (worker,) = children(fork_server_pid)
        os.kill(worker, number)
        line = proxy.line("error")
    named = {known.value: known.name for known in signal.Signals}
    assert f"killed by {named.get(int(number), f'signal {int(number)}')}" in line["message"]
    wait_until(lambda: children(fork_server_pid) not in ([], [worker]))
    with proxy.connect() as client:
        client.sendall(b"again")
        assert receive_exactly(client, 5) == b"again"
    assert proxy.stop() == 0


def test_an_exit_of_the_fork_server_that_is_found_by_the_way_wakes_the_main_thread() -> None:
    """Whoever asks whether a worker runs reads the reports, and the descriptor is not readable any more."""
    exited = wakeup.create()
    server = fork_server.ForkServer(cast(WorkerShared, SimpleNamespace(fds=set(exited), exited=exited)))
    (pid,) = server.pids
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not server.can_start)
    assert exited.collect() == 1
    assert [server.own_exit(), server.own_exit()] == ["killed by SIGKILL", ""]
    server._control.close()
    server._events.close()
    exited.close()


@pytest.mark.parametrize("is_worker_stopped", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_stopped_fork_server_neither_holds_up_the_drain_nor_outlives_the_main_process(
    start: Any, echoing: Exchange, is_worker_stopped: bool
) -> None:
    timeout_s = 0.1 if is_worker_stopped else 300  # much longer than the test waits
    proxy = start(echoing, "--runtime=processes", "--workers=2", f"--drain-timeout={timeout_s}")
    with proxy.connect() as client:
        client.sendall(b"x")
        assert receive_exactly(client, 1) == b"x"
    proxy.wait_lines()
    (fork_server_pid,) = children(proxy.process.pid)
    workers = children(fork_server_pid)
    for pid in (fork_server_pid, *workers[:is_worker_stopped]):
        pause(pid)
    assert proxy.stop() == 0
    wait_until(lambda: not any(map(lives, (fork_server_pid, *workers))), "all have exited")
    assert proxy.line("stop")["drained"] is True


MANY = 300  # requests; the socket of the fork server takes some 270 that it has not read


def test_routes_that_change_while_the_fork_server_is_stopped_are_served_and_known_to_the_next_worker(
    start_routed: StartRouted, echoing: Exchange
) -> None:
    """Each change is two requests to it: one now, and one when what the route was before has ended."""

    def sections(timeout_s: int) -> Dict[str, Any]:
        keys = {"target": echoing.target, "port": 0, "max-connections": 4, "idle-timeout": timeout_s}
        return {f"r{number}": keys for number in range(MANY)}

    proxy = start_routed(sections(100), "--runtime=processes", "--workers=1")
    before = proxy.settled(MANY)
    (fork_server_pid,) = children(proxy.process.pid)
    (worker,) = children(fork_server_pid)
    pause(fork_server_pid)
    for timeout_s in (200, 300):
        assert proxy.good(sections(timeout_s)) == [0, 0, MANY, 0]
        proxy.ask("r0")
    wait_until(lambda: proxy.held()[0] == before[0], "the main process has let go of what the routes were")
    os.kill(worker, signal.SIGKILL)
    os.kill(fork_server_pid, signal.SIGCONT)
    wait_until(lambda: children(fork_server_pid) not in ([], [worker]), "a replacement")
    for name in sections(300):
        proxy.ask(name)
    wait_until(lambda: proxy.held()[:2] == before[:2], "the fork server has let go of it, too")
    assert proxy.stop() == 0


def test_no_worker_is_asked_for_before_the_fork_server_knows_all_routes() -> None:
    """Nor does anyone wait for a fork server that is stopped, and reads no request."""
    exited, null = wakeup.create(), os.open(os.devnull, os.O_RDONLY)
    server = fork_server.ForkServer(cast(WorkerShared, SimpleNamespace(fds=set(exited), exited=exited)))
    (pid,) = server.pids
    pause(pid)
    server._control.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)
    for number in range(MANY):
        server.add_route(number, null)
    producer = ChannelProducer(memoryview(bytearray(8 * len(Counter))).cast("Q"))
    with pytest.raises(BlockingIOError, match=r"the fork server, which starts workers, reads no requests \(is it stopped\?\)"):
        server.start(WorkerArgs(0, cast(Any, None), Channel(-1)), producer)
    assert not server.has_workers
    unsent = len(server._route_changes)
    assert 0 < unsent < MANY
    server.remove_route(MANY - 1)
    assert len(server._route_changes) == unsent - 1, "one that it never knew of need not be taken away"
    server.remove_route(0)
    assert server._route_changes[0] == []
    server.end()
    assert not lives(pid)
    producer.theirs.close()
    producer.close()
    server._events.close()
    os.close(server._exit_pipes[0])
    os.close(null)
    exited.close()


def memory_kib(pid: int) -> Dict[str, int]:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {name: int(value.split()[0]) for name, value in (line.split(":") for line in lines)}


def test_a_worker_shares_most_of_its_memory_with_the_fork_server(start: Any, echoing: Exchange) -> None:
    """A garbage collection in either of them would write to nearly all of it, and give each a copy of its own."""
    proxy = start(echoing, "--runtime=processes", "--workers=2")
    with proxy.connect() as client:
        client.sendall(b"x")
        assert receive_exactly(client, 1) == b"x"
        (fork_server_pid,) = children(proxy.process.pid)
        for worker in children(fork_server_pid):
            found = memory_kib(worker)
            assert found["Private_Dirty"] < found["Anonymous"] / 3
    assert proxy.stop() == 0


def test_ten_thousand_networks_may_be_allowed(start: Any, echoing: Exchange) -> None:
    blocks = [f"--allow=10.{number >> 8}.{number & 255}.0/24" for number in range(10_000)]
    proxy = start(echoing, "--runtime=processes", "--workers=1", "--allow=127.0.0.1", *blocks)
    with proxy.connect() as client:
        client.sendall(b"x")
        assert receive_exactly(client, 1) == b"x"
    assert proxy.stop() == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_the_fork_server_works_behind_a_thousand_handed_over_listeners(echoing: Exchange, workers: int) -> None:
    """Its descriptors have numbers then that select(2) can't take (FD_SETSIZE is 1,024)."""
    with listeners(1) as (listener,):
        words = ["-t", echoing.target, "--timestamps=preserve", "--runtime=processes", f"--workers={workers}"]
        proxy = hand_over([listener] * 1024, *words)
    with contextlib.closing(proxy):
        for _ in range(2):
            with proxy.connect() as client:
                client.sendall(b"x")
                assert receive_exactly(client, 1) == b"x"
            (fork_server_pid,) = children(proxy.process.pid)
            os.kill(children(fork_server_pid)[0], signal.SIGKILL)
            assert "a replacement took its place" in proxy.line("error", after=len(proxy.lines))["message"]
        assert proxy.stop() == 0
