"""A host that errs: descriptors, clocks, signals in a bad moment. What clients see, what is said, and that it comes back."""

from __future__ import annotations

import contextlib
import datetime
import os
import resource
import signal
import subprocess
from pathlib import Path
from typing import Iterator

import pytest
from fake_clock import FakeClock
from faults import CROWD, EACH, RESET, Stand, conserved, ends, fate_of, lowest_free, make_stand, sleeps, storm
from harness import Line, Proxy, children, pause, receive_exactly, wait_until

pytestmark = pytest.mark.root


@pytest.fixture(params=EACH)
def stand(request: pytest.FixtureRequest, bundle: Path) -> Iterator[Stand]:
    yield from make_stand(request.param, bundle)


@pytest.fixture
def forked(bundle: Path) -> Iterator[Stand]:
    """A stand whose workers are processes."""
    yield from make_stand("processes from checkout", bundle)


# Descriptors


def fork_server_of(proxy: Proxy) -> int:
    (fork_server,) = children(proxy.process.pid)
    return fork_server


def having_connections(stand: Stand, proxy: Proxy) -> int:
    """The process that has the connections: the main one, or its one worker."""
    return children(fork_server_of(proxy))[0] if stand.runtime == "processes" else proxy.process.pid


@contextlib.contextmanager
def descriptors_up_to(pid: int, most: int) -> Iterator[None]:
    old = resource.prlimit(pid, resource.RLIMIT_NOFILE, (most, 20_000))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, old)


def test_descriptors_that_run_out_under_load_make_clients_wait_and_come_back(stand: Stand) -> None:
    proxy = stand.start()
    with stand.unharmed(proxy), storm(stand, proxy) as seen:
        wait_until(lambda: seen["served"] > 20, "traffic flows")
        with descriptors_up_to(proxy.process.pid, 8):
            for _ in range(4):  # one a second, so that the policy was looked at meanwhile, too
                said = proxy.line("error", lambda line: line["message"].startswith("accept"), after=len(proxy.lines))["message"]
            sleeps(proxy)
        before = seen["served"]
        wait_until(lambda: seen["served"] > before + 20, "traffic flows again")
    assert said == "accept: Too many open files (raise LimitNOFILE); trying again every 0.1 s"
    assert set(seen) <= {"served", "reset"}
    assert set(ends(proxy)) <= {("no_descriptors", "RC")}, "those that were accepted just before"
    assert seen["reset"] == sum(ends(proxy).values())


def test_a_client_for_whose_upstream_there_is_no_descriptor_is_reset(stand: Stand) -> None:
    proxy = stand.start("--workers=1")
    with stand.unharmed(proxy):
        pid = having_connections(stand, proxy)
        with descriptors_up_to(pid, lowest_free(pid) + 1):
            fates = []
            for _ in range(3):
                with stand.host:
                    proxy.expect_reset()
                fates.append(RESET)
            said = proxy.line("error")["message"]
    assert "EMFILE: out of file descriptors or memory: raise LimitNOFILE" in said
    assert ends(proxy) == {("no_descriptors", "RC"): len(fates)}


def test_a_client_whose_descriptor_finds_no_room_in_the_worker_has_a_line(forked: Stand) -> None:
    """SCM_RIGHTS into a full table: the message comes, the descriptor does not (unix(7))."""
    proxy = forked.start("--workers=2", "--max-connections-per-client=50")
    proxy.line("start")
    workers = wait_until(lambda: two if len(two := children(fork_server_of(proxy))) == 2 else [], "both workers are there")
    with forked.unharmed(proxy):
        with contextlib.ExitStack() as tight:
            for pid in workers:
                tight.enter_context(descriptors_up_to(pid, lowest_free(pid)))
            with forked.host:
                clients = [proxy.connect() for _ in range(4)]
            ports = {client.getsockname()[1] for client in clients}
            fates = [client.recv(1) for client in clients]
            for client in clients:
                client.close()
    assert fates == [b""] * 4
    lines = [line for line in proxy.lines if line["event"] == "connection" and line["reason"] == "no_descriptors"]
    assert {line["client_port"] for line in lines} == ports
    assert len({line["connection_id"] for line in lines}) == 4
    assert {(line["termination_state"], line["client_timestamps"], line["upstream_address"]) for line in lines} == {
        ("RC", None, None)
    }


# The clock


def hour_of(line: Line) -> float:
    """A line's time as hours off the real time."""
    stamp = datetime.datetime.strptime(line["timestamp"], "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=datetime.timezone.utc)
    return round((stamp - datetime.datetime.now(datetime.timezone.utc)).total_seconds() / 3600, 1)


HOUR_S = 3600  # less than any step, more than this takes


@pytest.mark.parametrize("stand", EACH[1:], indirect=True)
def test_a_clock_that_steps_moves_the_lines_times_and_nothing_else(stand: Stand, clock: FakeClock) -> None:
    proxy = stand.start("--idle-timeout=60", "--connect-timeout=1", env=clock.environment)
    with stand.unharmed(proxy):
        with stand.connect(proxy) as client:
            client.sendall(b"e" + b"before")
            assert receive_exactly(client, 6) == b"before"
            assert hour_of(proxy.metrics()) == 0
            stepped = {}
            for hours in (26, -26):
                clock.step(hours * HOUR_S)
                client.sendall(b"after")
                assert receive_exactly(client, 5) == b"after"
                stepped[hours] = proxy.metrics()
            sleeps(proxy)
        held_on = proxy.line("connection", lambda line: line["rx_bytes"] == 17)
        with stand.no_syn_arrives():
            assert [fate_of(client) for client in stand.crowd(proxy)] == [RESET] * CROWD
    for hours, metrics in stepped.items():
        assert hour_of(metrics) == hours
        assert 0 < metrics["interval_s"] <= metrics["uptime_s"] < HOUR_S
    assert (hour_of(held_on), held_on["reason"]) == (-26, "closed")
    assert 0 < held_on["duration_us"] < HOUR_S * 1e6
    assert ends(proxy) == {("connect_timeout", "sC"): CROWD}, "after its second, neither at once nor never"
    assert proxy.stop() == 0
    assert 0 < proxy.line("stop")["uptime_s"] < HOUR_S


@pytest.fixture
def shifted() -> Iterator[str]:
    """A time namespace whose CLOCK_MONOTONIC is ten days ahead of the one that the kernel's TCP counts by."""
    command = ["unshare", "--time", "--monotonic", "864000", "--fork", "sh", "-c", "echo ready && exec cat"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == b"ready\n"
        yield f"/proc/{children(holder.pid)[0]}/ns/time"


def test_a_monotonic_clock_of_its_own_is_no_timestamp_offset(stand: Stand, shifted: str) -> None:
    proxy = stand.start(wrap=("nsenter", f"--time={shifted}"))
    with stand.unharmed(proxy):
        stand.ask(proxy)
    assert proxy.line("start")["witness"] == "sysctl"
    assert ends(proxy) == {}


# Signals


def test_sigterm_in_a_burst_serves_whom_it_accepted_and_refuses_the_others(stand: Stand) -> None:
    proxy = stand.start()
    with stand.connect(proxy) as held_on, storm(stand, proxy, threads=4) as seen:
        wait_until(lambda: seen["served"] > 50, "traffic flows")
        proxy.process.send_signal(signal.SIGTERM)
        proxy.line("drain")
        held_on.sendall(b"e" + b"still")
        assert receive_exactly(held_on, 5) == b"still"
        held_on.close()
        assert proxy.wait() == 0
    assert seen["cut"] == 0
    assert proxy.line("stop")["drained"]
    assert proxy.line("stop")["killed_connections"] == 0
    metrics = proxy.line("metrics")
    assert ends(proxy) == {}
    assert proxy.count("connection") == metrics["downstream_cx_total"] == seen["served"] + 1
    assert metrics["downstream_cx_active"] == metrics["internal_errors_total"] == 0
    assert proxy.stderr() == ""
    # A handshake that ends between the last accept() and close() is reset by the kernel, before a byte was relayed.
    assert seen["reset"] <= 4


# Workers


def test_a_killed_worker_takes_its_connections_with_it_and_nothing_else(forked: Stand) -> None:
    proxy = forked.start()
    with forked.unharmed(proxy, without_line=CROWD // 2):
        clients = forked.crowd(proxy, b"eA")
        assert [receive_exactly(client, 1) for client in clients] == [b"A"] * CROWD
        os.kill(children(fork_server_of(proxy))[0], signal.SIGKILL)
        said = proxy.line("error")["message"]
        left = [client for client in clients if still_answers(client)]
        for client in clients:
            client.close()
    assert said == f"worker 0 died (killed by SIGKILL); {CROWD // 2} connections closed; a replacement took its place"
    assert len(left) == CROWD // 2
    metrics = conserved(proxy, CROWD // 2)
    assert (metrics["worker_restarts_total"], metrics["downstream_cx_lost_with_worker_total"]) == (1, CROWD // 2)


def test_clients_that_find_the_workers_inbox_full_wait_and_are_served(forked: Stand) -> None:
    proxy = forked.start("--workers=1", "--max-connections-per-client=1000")  # so that the main thread accepts
    with forked.unharmed(proxy, growth_kib=8192):  # what 600 connections at once needed
        (worker,) = children(fork_server_of(proxy))
        pause(worker)
        clients = [client for _ in range(30) for client in forked.crowd(proxy, b"eA")]
        said = proxy.line("error")["message"]
        os.kill(worker, signal.SIGCONT)
        assert [receive_exactly(client, 1) for client in clients] == [b"A"] * len(clients)
        for client in clients:
            client.close()
    assert said == "no worker takes connections: their inboxes are full; clients wait"
    assert ends(proxy) == {}
    assert proxy.metrics()["downstream_cx_overflow"] == 0


def still_answers(client: object) -> bool:
    with contextlib.suppress(OSError):
        client.sendall(b"B")  # type: ignore[attr-defined]
        return bool(client.recv(1) == b"B")  # type: ignore[attr-defined]
    return False


def test_a_killed_fork_server_is_reported_at_once_and_its_workers_go_on(forked: Stand) -> None:
    proxy = forked.start()
    with forked.connect(proxy) as held_on:
        forked.ask(proxy)
        fork_server = fork_server_of(proxy)
        workers = children(fork_server)
        os.kill(fork_server, signal.SIGKILL)
        error = proxy.line("error")
        for _ in range(8):
            forked.ask(proxy)
        held_on.sendall(b"eA")
        assert held_on.recv(1) == b"A"
        sleeps(proxy)
        assert not is_there(fork_server), "nothing is left of it"
        assert [is_there(pid) for pid in workers] == [True, True]
    assert error["message"] == (
        "the fork server, which starts workers, died (killed by SIGKILL); the connections go on, "
        "but a worker that dies has no replacement: restart when it suits"
    )
    conserved(proxy)
    assert proxy.stop() == 0
    assert (proxy.count("error"), proxy.count("connection")) == (1, 10)
    assert proxy.line("stop")["drained"]
    wait_until(lambda: not any(is_there(pid) for pid in workers), "the workers end, too")
    assert proxy.stderr() == ""


def test_a_worker_that_dies_after_the_fork_server_ends_the_whole_once_the_others_have_drained(forked: Stand) -> None:
    proxy = forked.start()
    clients = forked.crowd(proxy, b"eA")
    assert [receive_exactly(client, 1) for client in clients] == [b"A"] * CROWD
    fork_server = fork_server_of(proxy)
    workers = children(fork_server)
    os.kill(fork_server, signal.SIGKILL)
    proxy.line("error")
    os.kill(workers[1], signal.SIGKILL)
    assert proxy.line("drain")["active_connections"] == CROWD // 2
    left = [client for client in clients if still_answers(client)]
    assert len(left) == CROWD // 2, "those of the other worker are drained, not cut"
    for client in clients:
        client.close()
    assert proxy.wait() == 1
    assert [line["message"] for line in proxy.lines if line["event"] == "error"][1:] == [
        f"worker 1 died (how is not known, since the fork server is gone); {CROWD // 2} connections closed; "
        "nobody can start a replacement: draining, then ending"
    ]
    stop = proxy.line("stop")
    assert (stop["reason"], stop["drained"], stop["killed_connections"]) == ("worker_died", True, 0)
    assert proxy.stderr() == ""


def test_a_replacement_for_which_the_main_process_has_no_descriptor_is_tried_again(forked: Stand) -> None:
    """It needs two for a moment, a pipe(2): EMFILE there ended everything."""
    proxy = forked.start()
    with forked.unharmed(proxy):
        main, (victim, _) = proxy.process.pid, children(fork_server_of(proxy))
        with descriptors_up_to(main, lowest_free(main)):
            os.kill(victim, signal.SIGKILL)
            died = proxy.line("error")["message"]
        assert died.startswith("worker 0 died (killed by SIGKILL); 0 connections closed; no replacement yet, trying again: ")
        assert "pipe2(2): Too many open files" in died
        assert proxy.line("warning")["message"] == "worker 0: a replacement took its place after all"
    assert proxy.stop() == 0
    assert proxy.stderr() == ""


def test_a_worker_whose_fork_server_died_in_the_same_moment_is_no_crash(forked: Stand) -> None:
    proxy = forked.start()
    forked.ask(proxy)
    fork_server = fork_server_of(proxy)
    workers = children(fork_server)
    pause(proxy.process.pid)  # it learns of both at once
    for pid in (fork_server, *workers):
        os.kill(pid, signal.SIGKILL)
    proxy.process.send_signal(signal.SIGCONT)
    assert proxy.wait() == 1
    assert proxy.line("stop")["reason"] == "worker_died"
    assert proxy.stderr() == ""


def is_there(pid: int) -> bool:
    """Whether a process is, and be it as a zombie that nobody has waited for."""
    return Path(f"/proc/{pid}").exists()
