"""The three ways to start a worker: the same work from each, and a replacement for a worker that dies."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any, Iterator, List, Sequence, Set

import pytest
from _tsproxy.linux import wakeup
from _tsproxy.proxy import inbox
from _tsproxy.stats.counters import SharedCounters
from _tsproxy.stats.records import Notice, RecordPipe, decode
from _tsproxy.supervisor.runners import ThreadRunner
from _tsproxy.supervisor.worker_args import WorkerArgs, WorkerShared
from harness import Exchange, Proxy, children, leave_out, lives, pause, receive_exactly, target, wait_until
from program import EACH_RUNTIME, PYTHON, checkout_alone, python_for, workers_of
from routed import routed_starter
from unprivileged import as_nobody, become, nobody_else


def ask(proxy: Proxy, what: bytes = b"order") -> None:
    with proxy.connect() as client:
        client.sendall(what)
        assert receive_exactly(client, len(what)) == what


def test_all_workers_serve_and_the_start_line_names_the_runtime(begin: Any, echoing: Exchange, request: Any) -> None:
    proxy = begin(echoing, "--workers=3")
    assert proxy.line("start")["runtime"] in request.node.name
    for _ in range(30):
        ask(proxy)
    metrics = proxy.wait_lines()
    assert {line["worker"] for line in proxy.lines if line["event"] == "connection"} == {0, 1, 2}
    assert metrics["downstream_cx_rx_bytes_total"] == 150
    assert proxy.stop() == 0
    assert proxy.stderr() == ""


def loops(proxy: Proxy) -> int:
    """How many event loops (epoll(7)) there are in all its processes."""
    fds = [fd for pid in proxy.family() for fd in Path(f"/proc/{pid}/fd").iterdir()]
    return sum(target(fd) == "anon_inode:[eventpoll]" for fd in fds)


def test_the_start_line_comes_when_the_workers_are_there(begin: Any, echoing: Exchange) -> None:
    """An interpreter needs half a second to be; a client that came before it waited for that."""
    proxy = begin(echoing, "--workers=3")
    proxy.line("start")
    at_start = loops(proxy)
    for _ in range(6):
        ask(proxy)
    assert at_start == loops(proxy) >= 3


@pytest.mark.parametrize("workers", ["--workers=1", "--workers=2"])
def test_held_connections_of_all_workers_drain(begin: Any, echoing: Exchange, workers: str) -> None:
    proxy = begin(echoing, workers)
    clients = [proxy.connect() for _ in range(4)]
    for client in clients:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
    proxy.process.send_signal(signal.SIGTERM)
    assert proxy.line("drain")["active_connections"] == 4
    with pytest.raises(ConnectionRefusedError):
        proxy.connect()
    for client in clients:
        client.sendall(b"y")
        assert client.recv(1) == b"y"
        client.close()
    assert proxy.wait() == 0
    assert proxy.count("connection") == 4


def test_auto_takes_processes_or_better(start: Any, echoing: Exchange) -> None:
    assert start(echoing).line("start")["runtime"] in ("processes", "interpreters", "threads")


def test_interpreters_on_a_python_without_them_are_refused_in_one_line(bundle: Path) -> None:
    if "3.12" not in PYTHON:
        leave_out("no Python 3.12, where interpreters can't be used: that this is refused is NOT tested here")
    proxy = Proxy([PYTHON["3.12"], "-I", "-S", str(bundle)], "-t127.0.0.1:9", "--timestamps=preserve", "--runtime=interpreters")
    assert proxy.wait() == 2
    assert "--runtime: given 'interpreters'" in proxy.stderr()
    proxy.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_worker_is_reported_counted_and_replaced_and_the_others_go_on(
    start: Any, echoing: Exchange, number: int
) -> None:
    proxy = start(echoing, "--runtime=processes", "--workers=2")
    clients = [proxy.connect() for _ in range(4)]
    for client in clients:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
    fds = Path(f"/proc/{proxy.process.pid}/fd")
    before = len(list(fds.iterdir()))
    os.kill(workers_of(proxy)[0], number)
    error = proxy.line("error")
    assert f"killed by {signal.Signals(number).name}); 2 connections closed" in error["message"]
    ended = [client for client in clients if not _answers(client)]
    assert len(ended) == 2
    for _ in range(4):
        ask(proxy)
    metrics = proxy.wait_metrics(lambda line: line["downstream_cx_active"] == 2)
    assert metrics["worker_restarts_total"] == 1
    assert metrics["upstream_cx_active"] == 2
    assert len(workers_of(proxy)) == 2
    assert len(list(fds.iterdir())) == before
    for client in clients:
        client.close()
    assert proxy.stop() == 0


@pytest.mark.parametrize("killed", [1, 2])
def test_workers_that_are_killed_during_the_drain_are_said_and_their_connections_are_no_drained_ones(
    start: Any, echoing: Exchange, killed: int
) -> None:
    proxy = start(echoing, "--runtime=processes", "--workers=2")
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(proxy.connect()) for _ in range(4)]
        for client in clients:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
        workers = workers_of(proxy)
        proxy.process.send_signal(signal.SIGTERM)
        proxy.line("drain")
        for worker in workers[:killed]:
            os.kill(worker, signal.SIGKILL)
        wait_until(lambda: sum(_answers(client) for client in clients) == 4 - 2 * killed)
    assert proxy.wait() == 0
    errors = [line["message"] for line in proxy.lines if line["event"] == "error"]
    assert sorted(errors) == [
        f"worker {number} died (killed by SIGKILL); 2 connections closed; no replacement while draining"
        for number in range(killed)
    ]
    assert [line for line in proxy.lines if line["event"] == "metrics"][-1][
        "downstream_cx_lost_with_worker_total"
    ] == 2 * killed
    stop = proxy.line("stop")
    assert (stop["drained"], stop["killed_connections"]) == (False, 2 * killed)


def _answers(client: socket.socket) -> bool:
    try:
        client.sendall(b"y")
        return client.recv(1) == b"y"
    except OSError:
        return False


def stop_the_workers(proxy: Proxy) -> List[int]:
    workers = workers_of(proxy)
    for worker in workers:
        pause(worker)
    return workers


def waiting_clients(proxy: Proxy) -> List[socket.socket]:
    clients = [proxy.connect() for _ in range(6)]
    for client in clients:
        client.sendall(b"z")
    return clients


def are_served(clients: List[socket.socket]) -> None:
    for client in clients:
        assert receive_exactly(client, 1) == b"z"
        client.close()


def numbers_of(proxy: Proxy) -> List[int]:
    return sorted(line["connection_id"] for line in proxy.lines if line["event"] == "connection")


@pytest.mark.parametrize("workers", [1, 2])
def test_clients_that_wait_for_a_dead_worker_are_served_by_its_replacement(start: Any, echoing: Exchange, workers: int) -> None:
    """In its inbox; or, if it was the only one and accepts by itself, in the listener's backlog."""
    proxy = start(echoing, "--runtime=processes", f"--workers={workers}")
    ask(proxy)
    proxy.line("connection")
    stopped = stop_the_workers(proxy)
    waiting = waiting_clients(proxy)
    if workers > 1:
        proxy.wait_metrics(lambda line: line["downstream_cx_total"] == 7)
    for worker in stopped:
        os.kill(worker, signal.SIGKILL)
    are_served(waiting)
    proxy.wait_metrics(lambda line: line["downstream_cx_active"] == 0)
    assert proxy.stop() == 0
    assert numbers_of(proxy) == [1, 2, 3, 4, 5, 6, 7]


def test_the_only_worker_shares_the_listener_with_the_main_process_alone(start: Any, echoing: Exchange) -> None:
    """The fork server would keep the port open when both have closed it."""
    proxy = start(echoing, "--runtime=processes", "--workers=1")
    ask(proxy)
    (fork_server,), (worker,) = children(proxy.process.pid), workers_of(proxy)
    listener = inode_of_listener(proxy)
    holders = [pid for pid in (proxy.process.pid, fork_server, worker) if listener in inodes(pid)]
    assert holders == [proxy.process.pid, worker]


def inode_of_listener(proxy: Proxy) -> str:
    """proc(5), /proc/net/tcp: 0A is LISTEN."""
    port = f":{proxy.address[1]:04X}"
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return next(f"socket:[{row[9]}]" for row in rows if row[1].endswith(port) and row[3] == "0A")


def inodes(pid: int) -> Set[str]:
    return {target(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()}


def test_clients_that_came_while_the_only_worker_was_stuck_are_served_in_the_drain(start: Any, echoing: Exchange) -> None:
    """It does not answer that it accepts no more, so the main thread takes them, for it to find when it goes on."""
    proxy = start(echoing, "--runtime=processes", "--workers=1")
    ask(proxy)
    proxy.line("connection")
    stopped = stop_the_workers(proxy)
    waiting = waiting_clients(proxy)
    proxy.process.send_signal(signal.SIGTERM)
    assert proxy.line("drain")["active_connections"] == 6
    for worker in stopped:
        os.kill(worker, signal.SIGCONT)
    are_served(waiting)
    assert proxy.wait() == 0
    assert numbers_of(proxy) == [1, 2, 3, 4, 5, 6, 7]


def test_workers_that_die_at_once_again_and_again_end_the_whole(start: Any, echoing: Exchange) -> None:
    proxy = start(echoing, "--runtime=processes", "--workers=1")
    ask(proxy)

    def killed_for_good() -> bool:
        with contextlib.suppress(ValueError, OSError):  # between two of them
            for worker in workers_of(proxy):
                os.kill(worker, signal.SIGKILL)
        return proxy.process.poll() is not None

    wait_until(killed_for_good)
    assert proxy.wait() == 1
    assert proxy.line("stop")["reason"] == "worker_died"


def test_a_stuck_worker_does_not_outlive_the_main_process_and_keep_the_port(start: Any, echoing: Exchange) -> None:
    proxy = start(echoing, "--runtime=processes", "--workers=1")
    ask(proxy)
    (stuck,) = stop_the_workers(proxy)
    proxy.process.kill()
    wait_until(lambda: not lives(stuck), "the fork server kills it")
    with pytest.raises(ConnectionRefusedError):
        proxy.connect()


def test_nothing_is_left_when_the_main_process_is_killed(start: Any, echoing: Exchange) -> None:
    proxy = start(echoing, "--runtime=processes", "--workers=2")
    with proxy.connect() as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        family = [*children(proxy.process.pid), *workers_of(proxy)]
        proxy.process.kill()
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    wait_until(lambda: not any(lives(pid) for pid in family), "fork server and workers end")
    proxy.process.wait()


@pytest.mark.parametrize("runtime", EACH_RUNTIME)
def test_a_whole_life_with_a_reload_leaves_nothing_unclosed(
    bundle: Path, tmp_path: Path, echoing: Exchange, runtime: str
) -> None:
    """Python's development mode tells of each socket and file that is not closed (ResourceWarning)."""
    command = [python_for(runtime), "-X", "dev", "-I", "-S", str(checkout_alone(bundle))]
    route = {"target": echoing.target, "port": 0}
    for begin in routed_starter(command, tmp_path, f"--runtime={runtime}", "--workers=2", "--drain-timeout=0.1"):
        proxy = begin({"stays": route, "goes": route})
        proxy.ask("goes")
        assert proxy.good({"stays": route, "comes": route}) == [1, 1, 0, 1]
        proxy.ask("comes")
        with proxy.connect_to("stays") as client:
            client.sendall(b"x")
            assert receive_exactly(client, 1) == b"x"
            assert proxy.stop() == 0
        assert proxy.stderr() == ""


def test_ctrl_c_for_the_whole_group_drains(start: Any, echoing: Exchange) -> None:
    proxy = start(echoing, "--runtime=processes", "--workers=2", start_new_session=True)
    with proxy.connect() as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        os.killpg(proxy.process.pid, signal.SIGINT)
        proxy.line("drain")
        client.sendall(b"y")
        assert client.recv(1) == b"y"
    assert proxy.wait() == 0
    assert proxy.line("connection")["reason"] == "closed"


def test_a_reader_of_standard_output_sees_its_end_with_the_main_process(start: Any, echoing: Exchange) -> None:
    proxy = start(echoing, "--runtime=processes", "--workers=1")
    client = proxy.connect()
    client.sendall(b"x")
    assert client.recv(1) == b"x"
    pause(workers_of(proxy)[0])  # it can't end, and must not hold the pipe open
    worker = workers_of(proxy)[0]
    proxy.process.kill()
    proxy.process.wait()
    assert proxy.wait() == -signal.SIGKILL  # reads up to the end of the pipe
    os.kill(worker, signal.SIGCONT)
    client.close()
    wait_until(lambda: not lives(worker))


def test_workers_keep_to_their_cpus(start: Any, echoing: Exchange) -> None:
    cpus = sorted(os.sched_getaffinity(0))[:2]
    proxy = start(echoing, "--runtime=processes", f"--cpus={','.join(map(str, cpus))}")
    ask(proxy)
    assert proxy.line("start")["workers"] == len(cpus)
    wait_until(
        lambda: sorted(os.sched_getaffinity(pid) == {cpu} for pid, cpu in zip(workers_of(proxy), cpus)) == [True] * len(cpus)
    )
    done = subprocess.run(["taskset", "-p", str(proxy.process.pid)], capture_output=True, check=False)
    assert done.returncode == 0


# Tasks that can't be had


@pytest.fixture
def alone(bundle: Path) -> Iterator[Any]:
    """Start the proxy as a user that nobody else is: alone(exchange, options, prefix=...) -> Proxy."""
    with as_nobody(bundle, nobody_else()) as command:
        running: List[Proxy] = []

        def begin(far: Exchange, *options: str, prefix: Sequence[str] = ()) -> Proxy:
            running.append(Proxy([*prefix, *command], "-t", far.target, "-p0", "--timestamps=preserve", *options))
            return running[-1]

        yield begin
        for proxy in running:
            proxy.close()


@contextlib.contextmanager
def tasks_up_to(pid: int, most: int) -> Iterator[None]:
    """Set as the user that the process has: another needs CAP_SYS_RESOURCE, which not every root has."""
    (limits,) = [line.split() for line in Path(f"/proc/{pid}/limits").read_text().splitlines() if "Max processes" in line]
    _set_tasks(pid, str(most))
    try:
        yield
    finally:
        _set_tasks(pid, limits[3])


def _set_tasks(pid: int, soft: str) -> None:
    (user,) = re.findall(r"^Uid:\t(\d+)", Path(f"/proc/{pid}/status").read_text(), re.M)
    subprocess.run([*become(int(user)), "prlimit", f"--pid={pid}", f"--nproc={soft}:"], check=True)


@pytest.mark.root
@pytest.mark.parametrize(("runtime", "most"), [("threads", 1), ("threads", 2), *(("processes", most) for most in (1, 2, 3))])
def test_tasks_that_are_refused_end_the_start_in_one_line(alone: Any, exchange: Exchange, runtime: str, most: int) -> None:
    """The reporter's thread, the fork server, a worker: whichever it is."""
    limit = ["prlimit", f"--nproc={most}:{most}"]
    proxy = alone(exchange, f"--runtime={runtime}", "--workers=1", prefix=limit)
    assert proxy.wait() == 75
    (line,) = proxy.stderr().splitlines()
    assert line.startswith(("tsproxy: fork(2): Resource temporarily unavailable", "tsproxy: clone(2): can't start new thread"))
    assert line.endswith("raise the number of tasks that are allowed (ulimit -u, TasksMax=, pids.max)")
    assert proxy.lines == []


@pytest.mark.root
@pytest.mark.parametrize("workers", [1, 2])
def test_a_replacement_that_can_not_be_forked_is_tried_again_and_the_others_go_on(
    alone: Any, echoing: Exchange, workers: int
) -> None:
    """With one worker, clients wait in the backlog; with two, the other one serves them all."""
    proxy = alone(echoing, "--runtime=processes", f"--workers={workers}")
    ask(proxy)
    proxy.line("connection")
    (fork_server,) = children(proxy.process.pid)
    with tasks_up_to(fork_server, 1):
        os.kill(workers_of(proxy)[0], signal.SIGKILL)
        refusal = "no replacement yet, trying again: fork(2): Resource temporarily unavailable, needed for a worker; "
        died = proxy.line("error")["message"]
        assert died.startswith(f"worker 0 died (killed by SIGKILL); 0 connections closed; {refusal}")
        for _ in range(3):
            assert proxy.line("error", after=len(proxy.lines))["message"].startswith(f"worker 0: {refusal}")
        if workers > 1:
            for _ in range(6):
                ask(proxy)
        waiting = waiting_clients(proxy) if workers == 1 else []
    assert proxy.line("warning")["message"] == "worker 0: a replacement took its place after all"
    are_served(waiting)
    for _ in range(4):
        ask(proxy)
    assert proxy.metrics()["worker_restarts_total"] == 1
    assert len(workers_of(proxy)) == workers
    assert proxy.stop() == 0
    assert proxy.stderr() == ""


class StillbornRunner(ThreadRunner):
    """A worker that can't begin: an interpreter that can't be had, a module that can't be imported."""

    def _work(self) -> None:
        raise RuntimeError("no interpreter to be had")


def test_a_worker_that_can_not_even_start_is_logged_and_seen_to_have_exited() -> None:
    """is_alive must be False when the wake-up comes: there is only one."""
    shared_counters, pipe, exited = SharedCounters.create(1), RecordPipe.create(), wakeup.create()
    unused: Any = None
    shared = WorkerShared(unused, {}, -1, {}, shared_counters.fd, pipe.writer, exited)
    runner = StillbornRunner(WorkerArgs(0, shared, inbox.Channel(-1)))
    runner.start()
    wait_until(exited.collect, "the wake-up")
    assert not runner.is_alive
    (record,), _ = decode(b"".join(pipe.read()))
    assert isinstance(record, Notice)
    assert "no interpreter to be had" in record.message
    exited.close()
    for fd in (shared_counters.fd, *pipe):
        os.close(fd)
