"""A reload: what comes, goes and changes; a file that can't be had leaves everything as it was; who is connected stays so."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Dict, List

import pytest
from _tsproxy.supervisor import reload
from harness import CHECKOUT, PATIENCE, Exchange, Proxy, children, echo, free_port, pause, receive_exactly, wait_until
from namespaces import Namespace
from program import workers_of
from routed import RoutedProxy, StartRouted, Talkers, answers, routed_starter, text_of


def section(far: Exchange, **keys: Any) -> Dict[str, Any]:
    return {"target": far.target, "port": 0, **{name.replace("_", "-"): value for name, value in keys.items()}}


def sections(far: Exchange, *names: str) -> Dict[str, Any]:
    return {name: section(far) for name in names}


def test_what_is_added_removed_changed_and_left_alone_is_counted(start_routed: StartRouted, echoing: Exchange) -> None:
    proxy = start_routed(sections(echoing, "a", "b", "c"), "--workers=2")
    gone, kept = proxy.port("b"), proxy.port("c")
    changed = {"a": section(echoing, idle_timeout=5), "c": section(echoing), "d": section(echoing), "e": section(echoing)}
    assert proxy.good(changed) == [2, 1, 1, 1]
    for name in changed:
        proxy.ask(name)
    assert proxy.refuses(gone)
    assert proxy.port("c") == kept
    assert [line["route"] for line in proxy.lines if line["event"] == "route"] == ["a", "b", "c", "a", "d", "e"]
    assert proxy.good(changed) == [0, 0, 0, 4]
    assert proxy.stop() == 0
    assert proxy.stderr() == ""


# Files that can't be had


BAD = {
    "a bad value": (
        "[a]\ntarget = 127.0.0.1:9\n\nport = x\n",
        "{file}:4: [a] port: given 'x'; allowed: a port from 0 to 65535",
    ),
    "no key": ("[a]\ntarget = 127.0.0.1:9\nprot = 1\n", "{file}:3: [a] unknown key 'prot'; did you mean port?"),
    "no target": ("[a]\nport = 0\n", "{file}:1: [a] target: given nothing"),
    "no route": ("", "{file}: given no route"),
    "twice": ("[a]\n[a]\n", "{file}:2: [a] given twice"),
    "of the process": ("[a]\nworkers = 3\n", "{file}:2: [a] workers: given '3'; allowed: only as --workers"),
    "no such source": (
        "[a]\ntarget = 127.0.0.1:9\nport = 0\nsource = 192.0.2.1\n",
        "{file}:4: [a] source: given '192.0.2.1'; allowed: an address of this host",
    ),
    "no such address": (
        "[a]\ntarget = 127.0.0.1:9\nport = 0\nbind = 192.0.2.1\n",
        "{file}:4: [a] can't listen on 192.0.2.1:0: Cannot assign requested address (bind takes an address of this host)",
    ),
    "no such interface": (
        "[a]\ntarget = 127.0.0.1:9\nport = 0\ninterface = nowhere0\n",
        "{file}:4: [a] interface: given 'nowhere0'; allowed: an interface of this host",
    ),
}


@pytest.fixture(scope="module")
def long_lived(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One proxy for all bad files: whatever came before, it goes on."""
    far = Exchange(echo)
    for start in routed_starter(CHECKOUT, tmp_path_factory.mktemp("routes")):
        yield far, start({"orders": section(far, max_connections=100)}, "--workers=2")
    far.close()


@pytest.mark.parametrize("what", BAD)
def test_a_bad_file_is_refused_in_one_line_that_says_where_and_everything_goes_on(what: str, long_lived: Any) -> None:
    _, proxy = long_lived
    text, said = BAD[what]
    with proxy.connect_to("orders") as client:
        answers(client)
        assert proxy.bad(text).startswith(said.format(file=proxy.file))
        answers(client)
    proxy.ask("orders")
    assert set(proxy.metrics_by_route()) == {"orders", None}


def test_a_file_that_is_gone_is_refused(start_routed: StartRouted, echoing: Exchange) -> None:
    proxy = start_routed(sections(echoing, "orders"))
    proxy.line("start")
    proxy.file.unlink()
    line = proxy.hang_up()
    assert line["level"] == "error"
    assert f"--routes: given {str(proxy.file)!r}; allowed: a file that can be read (No such file" in line["message"]
    proxy.ask("orders")


def test_a_pipe_in_its_place_is_refused_and_the_next_reload_comes(start_routed: StartRouted, echoing: Exchange) -> None:
    """open(2) of a FIFO that nobody writes to does not return."""
    proxy = start_routed(sections(echoing, "orders"))
    proxy.line("start")
    proxy.file.unlink()
    os.mkfifo(proxy.file)
    assert proxy.hang_up()["message"].startswith(f"{proxy.file}: given no route")
    assert proxy.good(sections(echoing, "orders", "quotes")) == [1, 0, 0, 1]


def test_the_port_of_another_program_refuses_all_of_the_file(start_routed: StartRouted, echoing: Exchange) -> None:
    proxy = start_routed(sections(echoing, "orders"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        said = proxy.bad({"quotes": section(echoing), "drop-copy": section(echoing, port=port)})
        assert (
            f"routes.ini:7: [drop-copy] can't listen on 127.0.0.1:{port}: Address already in use (ss -ltnp shows by whom); "
            in said
        ), "to share a port takes another start"
    proxy.ask("orders")
    assert [line["route"] for line in proxy.lines if line["event"] == "route"] == ["orders"]
    assert proxy.good({**sections(echoing, "orders", "quotes"), "drop-copy": section(echoing, port=port)}) == [2, 0, 0, 1]


def test_a_listener_that_was_closed_to_make_room_is_back_when_the_file_is_refused(
    start_routed: StartRouted, echoing: Exchange
) -> None:
    """0.0.0.0 can't be bound beside 127.0.0.1, nor, as is found out then, beside another program's 127.0.0.2."""
    before = {"orders": section(echoing, port=free_port()), "quotes": section(echoing, port=free_port())}
    proxy = start_routed(before, "--workers=2")
    wide = {name: {**one, "bind": "0.0.0.0"} for name, one in before.items()}
    with socket.create_server(("127.0.0.2", before["quotes"]["port"])), proxy.connect_to("orders") as client:
        answers(client)
        said = proxy.bad(wide)
        assert f": [quotes] can't listen on 0.0.0.0:{before['quotes']['port']}: Address already in use" in said
        answers(client)
        for _ in range(4):
            proxy.ask("orders")
            proxy.ask("quotes")
        assert proxy.good(before) == [0, 0, 0, 2]
    assert proxy.good(wide) == [0, 0, 2, 0]


@pytest.mark.root
def test_a_port_that_takes_root_is_not_lost_to_a_refused_file_once_root_is_dropped() -> None:
    with contextlib.ExitStack() as stack:
        space = stack.enter_context(contextlib.closing(Namespace()))  # port 900 is free there
        readable = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        readable.chmod(0o755)
        with space:
            far = stack.enter_context(contextlib.closing(Exchange(echo)))
        before, command = {"orders": section(far, port=900)}, [*space.enter, *CHECKOUT]
        proxy = RoutedProxy(command, readable / "routes.ini", before, "--user=nobody", "--workers=1")
        stack.enter_context(contextlib.closing(proxy))
        said = proxy.bad({"orders": section(far, port=900, bind="0.0.0.0")})
        assert (
            ": [orders] can't listen on 0.0.0.0:900: Permission denied (ports below 1024 need root: that takes a restart)"
            in said
        )
        with space:
            proxy.ask("orders")
        assert proxy.good({"orders": section(far, port=900, idle_timeout=9)}) == [0, 0, 1, 0]
        with space:
            proxy.ask("orders")


def test_clients_beyond_the_descriptors_wait_in_the_backlog_and_a_reload_costs_nobody_a_session(
    tmp_path: Path, echoing: Exchange
) -> None:
    """A worker process that has no descriptor left can't be given a new route: it would end, and all its sessions with it."""
    words = ["prlimit", "--nofile=200:200", *CHECKOUT]
    options = ["--workers=1", "--runtime=processes"]
    with contextlib.closing(RoutedProxy(words, tmp_path / "routes.ini", sections(echoing, "orders"), *options)) as proxy:
        assert "descriptors suffice for" in proxy.line("warning")["message"]
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(proxy.connect_to("orders")) for _ in range(100)]
            for client in clients:
                client.sendall(b"order")
            assert "(raise LimitNOFILE)" in proxy.line("error", lambda line: line["route"] == "orders")["message"]
            served = proxy.metrics()["downstream_cx_active"]
            assert 20 < served < 100
            assert proxy.good(sections(echoing, "orders", "quotes")) == [1, 0, 0, 1]
            for place, client in enumerate(clients):
                assert receive_exactly(client, 5) == b"order", place
                client.close()
        proxy.ask("quotes")
        proxy.wait_lines()
        assert {line["reason"] for line in proxy.lines if line["event"] == "connection"} == {"closed"}
        assert proxy.stop() == 0
        assert proxy.stderr() == ""


def test_more_routes_than_a_full_worker_has_descriptors_for_are_refused(tmp_path: Path, echoing: Exchange) -> None:
    """Those that the worker keeps free beyond its connections are for fewer."""
    words, options = ["prlimit", "--nofile=760:760", *CHECKOUT], ["--workers=1", "--runtime=processes"]
    with contextlib.closing(RoutedProxy(words, tmp_path / "routes.ini", sections(echoing, "orders"), *options)) as proxy:
        (room,) = map(int, re.findall(r"suffice for (\d+)", proxy.line("warning")["message"]))
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(proxy.connect_to("orders")) for _ in range(room)]
            for client in clients:
                answers(client)
            said = proxy.bad({**sections(echoing, "orders"), **sections(echoing, *(f"more-{number}" for number in range(90)))})
            assert f"given 91 routes; allowed: fewer beside {room} connections with this process's limit of 760" in said
            for client in clients:
                answers(client)
        proxy.wait_lines()
        assert proxy.metrics()["worker_restarts_total"] == 0


def test_no_memory_for_a_reload_is_said_in_one_line() -> None:
    assert reload._told(MemoryError()) == "Cannot allocate memory"


# The file's place


def test_a_relative_path_behind_a_symbolic_link_is_the_same_file_at_a_reload(tmp_path: Path, echoing: Exchange) -> None:
    """a/.. is where the link a leads to, and up. Somewhere else stands another file."""
    (tmp_path / "releases" / "5").mkdir(parents=True)
    (tmp_path / "current").symlink_to(tmp_path / "releases" / "5")
    (tmp_path / "routes.ini").write_text("[wrong]\n")
    command = ["env", f"--chdir={tmp_path}", *CHECKOUT, "--routes=current/../routes.ini", "--timestamps=preserve"]
    file = tmp_path / "releases" / "routes.ini"
    file.write_text(text_of(sections(echoing, "orders")))
    with contextlib.closing(Proxy(command)) as proxy:
        proxy.line("start")
        file.write_text(text_of(sections(echoing, "orders", "quotes")))
        proxy.process.send_signal(signal.SIGHUP)
        assert proxy.line("reload").get("added") == 1, proxy.lines[-1]


def test_a_relative_path_from_a_directory_that_is_gone_is_refused(tmp_path: Path, echoing: Exchange) -> None:
    (tmp_path / "routes.ini").write_text(text_of(sections(echoing, "orders")))
    (tmp_path / "gone").mkdir()
    script = f'cd {tmp_path}/gone && rmdir {tmp_path}/gone && exec "$@"'
    command = ["sh", "-c", script, "sh", *CHECKOUT, "--routes=../routes.ini"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = "tsproxy.py: --routes: given '../routes.ini'; allowed: an absolute path, where the working directory is gone\n"
    assert (done.returncode, done.stderr) == (2, said)


# Listeners


def test_two_routes_swap_their_ports_in_one_reload(start_routed: StartRouted, echoing: Exchange, exchange: Exchange) -> None:
    ports = [free_port(), free_port()]
    proxy = start_routed({"a": section(echoing, port=ports[0]), "b": section(exchange, port=ports[1])})
    assert proxy.good({"a": section(echoing, port=ports[1]), "b": section(exchange, port=ports[0])}) == [0, 0, 2, 0]
    assert (proxy.port("a"), proxy.port("b")) == (ports[1], ports[0])
    proxy.ask("a")
    with proxy.connect_to("b") as client, exchange.accept() as far:
        client.sendall(b"order")
        assert receive_exactly(far, 5) == b"order"
    proxy.wait_lines()
    assert sorted(line["route"] for line in proxy.lines if line["event"] == "connection") == ["a", "b"]


class Knockers(Talkers):
    """New clients without a rest: each connects to the port, sends, and has the echo."""

    def __init__(self, port: int) -> None:
        super().__init__([])
        self._port = port

    def serves_another(self) -> None:
        seen = self.messages
        wait_until(lambda: self.failures or self.messages > seen, "one more is served")

    def _run(self) -> None:
        while not (self._ends or self.failures):
            try:
                with socket.create_connection(("127.0.0.1", self._port), PATIENCE) as client:
                    answers(client)
            except (OSError, AssertionError) as problem:
                self.failures.append(repr(problem))
            else:
                self.messages += 1


def test_a_renamed_route_keeps_its_listener_and_no_client_is_refused(start_routed: StartRouted, echoing: Exchange) -> None:
    port = free_port()
    proxy = start_routed({"name-0": section(echoing, port=port)}, "--workers=2")
    proxy.line("start")
    with Knockers(port) as knockers:
        for turn in range(1, 20):
            assert proxy.good({f"name-{turn}": section(echoing, port=port)}) == [1, 1, 0, 0]
            knockers.serves_another()
    assert knockers.failures == []
    total = proxy.wait_lines()["downstream_cx_total"]
    assert total == knockers.messages
    assert len({line["route"] for line in proxy.lines if line["event"] == "connection"}) > 10


def test_a_changed_route_keeps_its_listener_and_no_client_is_refused(start_routed: StartRouted, echoing: Exchange) -> None:
    proxy = start_routed(sections(echoing, "orders"), "--workers=2")
    port = proxy.port("orders")
    with Knockers(port) as knockers:
        for turn in range(1, 20):
            assert proxy.good({"orders": section(echoing, idle_timeout=100 + turn)}) == [0, 0, 1, 0]
            assert proxy.port("orders") == port, "port 0 is the one that it has"
            knockers.serves_another()
    assert knockers.failures == []
    metrics = proxy.wait_lines()
    assert metrics["downstream_cx_total"] == knockers.messages
    assert proxy.metrics_by_route()["orders"]["downstream_cx_total"] == knockers.messages


def test_a_port_that_was_chosen_may_be_written_into_the_file(start_routed: StartRouted, echoing: Exchange) -> None:
    proxy = start_routed(sections(echoing, "orders"))
    port = proxy.port("orders")
    with proxy.connect_to("orders") as client:
        assert proxy.good({"orders": section(echoing, port=port)}) == [0, 0, 1, 0]
        assert proxy.good({"renamed": section(echoing, port=port)}) == [1, 1, 0, 0]
        answers(client)
        proxy.ask("renamed")


def test_a_listener_moves_from_one_address_to_all_on_its_port_and_back(start_routed: StartRouted, echoing: Exchange) -> None:
    port = free_port()
    proxy = start_routed({"orders": section(echoing, port=port)}, "--workers=2")
    with proxy.connect_to("orders") as client:
        for bind in ("0.0.0.0", "127.0.0.1", "0.0.0.0", "::", "127.0.0.1", "::", "0.0.0.0"):
            assert proxy.good({"orders": section(echoing, port=port, bind=bind)}) == [0, 0, 1, 0]
            assert proxy.route("orders")["listeners"] == [f"[{bind}]:{port}" if ":" in bind else f"{bind}:{port}"]
            proxy.ask("orders")
            answers(client)


def test_a_target_that_is_a_listener_of_any_route_is_refused(start_routed: StartRouted, echoing: Exchange) -> None:
    """Also one that stays, also by another address of this host, also in a ring."""
    ports = [free_port(), free_port()]
    stays = {"orders": section(echoing, port=ports[0], bind="0.0.0.0")}
    proxy = start_routed(stays)
    said = proxy.bad({**stays, "quotes": {"target": f"127.0.0.2:{ports[0]}", "port": ports[1]}})
    assert f": [quotes] target: given '127.0.0.2:{ports[0]}'; allowed: any address but tsproxy's own" in said
    own = proxy.bad({"orders": {**stays["orders"], "target": f"127.0.0.1:{ports[0]}"}})
    assert ": [orders] target: given " in own
    ring = {"orders": {"target": f"127.0.0.1:{ports[1]}", "port": ports[0]}, "quotes": section(echoing, port=ports[1])}
    assert ": [orders] target: given " in proxy.bad(ring)
    proxy.ask("orders")


# Sessions


def test_a_route_that_comes_again_while_its_old_sessions_live(start_routed: StartRouted, echoing: Exchange) -> None:
    port = free_port()
    stays, comes = sections(echoing, "stays"), {"orders": section(echoing, port=port)}
    proxy = start_routed({**stays, **comes}, "--workers=2")
    with proxy.connect_to("orders") as first:
        answers(first)
        assert proxy.good(stays) == [0, 1, 0, 1]
        assert proxy.refuses(port)
        answers(first)
        assert proxy.good({**stays, **comes}) == [1, 0, 0, 1]
        with proxy.connect_to("orders") as second:
            answers(second)
            answers(first)
            assert proxy.metrics_by_route()["orders"]["downstream_cx_active"] == 2
        proxy.good(stays)
        answers(first)
    proxy.wait_lines()
    wait_until(lambda: "orders" not in proxy.metrics_by_route(), "its line stops")
    assert proxy.metrics()["downstream_cx_total"] == 2


def test_sessions_keep_the_options_of_their_begin_and_new_clients_have_the_new_ones(
    start_routed: StartRouted, echoing: Exchange
) -> None:
    proxy = start_routed(sections(echoing, "orders"), "--workers=2")
    with proxy.connect_to("orders") as old:
        answers(old)
        proxy.good({"orders": section(echoing, idle_timeout=0.2)})
        with proxy.connect_to("orders") as new:
            answers(new)
            with contextlib.suppress(ConnectionResetError):
                assert new.recv(1) == b""
        assert proxy.line("connection")["reason"] == "idle_timeout"
        answers(old)
        proxy.good({"orders": section(echoing)})
        with proxy.connect_to("orders") as newest:
            answers(newest)
            answers(old)
    proxy.wait_lines()
    assert [line["reason"] for line in proxy.lines if line["event"] == "connection"] == ["idle_timeout", "closed", "closed"]


def timer_of_other_side(client: socket.socket) -> str:
    """The timer of the proxy's socket for this client, as /proc/net/tcp has it (proc(5)): 02 is keepalive's, 00 none."""
    ports = [f":{name[1]:04X}" for name in (client.getpeername(), client.getsockname())]
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return next(row[5][:2] for row in rows if [row[1][-5:], row[2][-5:]] == ports)


def test_keepalive_that_a_reload_switches_off_is_off_though_the_listener_stays(
    start_routed: StartRouted, echoing: Exchange
) -> None:
    proxy = start_routed({"orders": section(echoing, keepalive=30)}, "--workers=2")
    for keepalive, timer in ((0, "00"), (7, "02"), (0, "00")):
        proxy.good({"orders": section(echoing, keepalive=keepalive)})
        with proxy.connect_to("orders") as client:
            answers(client)
            wait_until(lambda: timer_of_other_side(client) == timer, f"keepalive = {keepalive}")  # noqa: B023


def test_max_connections_of_a_changed_route_counts_the_sessions_from_before(
    start_routed: StartRouted, echoing: Exchange
) -> None:
    """The limit is what the far end can bear."""
    proxy = start_routed({"orders": section(echoing, max_connections=2)}, "--workers=2")
    with proxy.connect_to("orders") as first, proxy.connect_to("orders") as second:
        answers(first)
        answers(second)
        proxy.good({"orders": section(echoing, max_connections=3)})
        with proxy.connect_to("orders") as third:
            answers(third)
            assert is_reset(proxy, "orders")
            proxy.good({"orders": section(echoing, max_connections=1)})
            assert is_reset(proxy, "orders")
            for client in (first, second, third):
                answers(client)
    assert proxy.metrics_by_route()["orders"]["downstream_cx_overflow"] == 2
    proxy.wait_metrics(lambda line: line["downstream_cx_active"] == 0)
    proxy.ask("orders")


def test_max_connections_per_client_of_a_changed_route_counts_the_sessions_from_before(
    start_routed: StartRouted, echoing: Exchange
) -> None:
    limited = {"orders": section(echoing, max_connections_per_client=1)}
    proxy = start_routed(limited, "--workers=2")
    with proxy.connect_to("orders") as first:
        answers(first)
        assert is_reset(proxy, "orders")
        proxy.good({"orders": section(echoing, max_connections_per_client=1, idle_timeout=100)})
        assert is_reset(proxy, "orders")
        answers(first)


def is_reset(proxy: RoutedProxy, name: str) -> bool:
    """Whether a new client of the route is reset: while it connects, or when it first reads."""
    try:
        with proxy.connect_to(name) as client:
            return client.recv(1) is None
    except ConnectionResetError:
        return True


def test_a_route_that_went_is_forgotten_though_reloads_come_faster_than_each_second(
    start_routed: StartRouted, echoing: Exchange
) -> None:
    proxy = start_routed(sections(echoing, "orders", "gone-0"))
    proxy.line("start")
    turns: List[int] = []

    def is_forgotten() -> bool:
        turns.append(len(turns) + 1)
        proxy.good(sections(echoing, "orders", f"gone-{turns[-1]}"))
        return "gone-0" not in proxy.metrics_by_route()

    wait_until(is_forgotten, "the line of the first one stops", pace=0.05)


# Workers that die


@pytest.mark.parametrize("workers", [1, 2])
def test_a_replaced_worker_serves_routes_of_before_and_after(
    start_routed: StartRouted, echoing: Exchange, workers: int
) -> None:
    """Among them one whose message the worker that died had not consumed."""
    proxy = start_routed(sections(echoing, "first"), "--runtime=processes", f"--workers={workers}")
    proxy.ask("first")
    proxy.good(sections(echoing, "first", "second"))
    proxy.ask("second")
    stopped = workers_of(proxy)
    for worker in stopped:
        pause(worker)
    proxy.good(sections(echoing, "first", "second", "third"))
    proxy.good(sections(echoing, "second", "third", "fourth"))
    waiting = [proxy.connect_to(name) for name in ("second", "third", "fourth") for _ in range(2)]
    for client in waiting:
        client.sendall(b"order")
    for worker in stopped:
        os.kill(worker, signal.SIGKILL)
    for client in waiting:
        assert receive_exactly(client, 5) == b"order"
        client.close()
    for name in ("second", "third", "fourth"):
        proxy.ask(name)
    wait_until(lambda: set(proxy.metrics_by_route()) == {"second", "third", "fourth", None})
    assert proxy.metrics()["worker_restarts_total"] == workers
    assert proxy.stop() == 0
    assert proxy.stderr() == ""


def test_workers_that_are_killed_during_reloads_cost_their_own_sessions_alone(
    start_routed: StartRouted, echoing: Exchange
) -> None:
    proxy = start_routed(sections(echoing, "orders"), "--runtime=processes", "--workers=2")
    proxy.ask("orders")
    for turn in range(3):
        killed = workers_of(proxy)[0]
        proxy.write(sections(echoing, "orders", f"new-{turn}"))
        seen = len(proxy.lines)
        proxy.process.send_signal(signal.SIGHUP)
        os.kill(killed, signal.SIGKILL)
        assert proxy.reloaded(seen)["level"] == "info"
        proxy.line("error", lambda line: "a replacement took its place" in line["message"], after=seen)
        for _ in range(4):
            proxy.ask(f"new-{turn}")
            proxy.ask("orders")
    assert proxy.stop() == 0
    metrics = [line for line in proxy.lines if line["event"] == "metrics"][-1]
    assert (metrics["worker_restarts_total"], metrics["downstream_cx_active"]) == (3, 0)
    assert proxy.stderr() == ""


def test_a_reload_works_after_the_fork_server_was_killed(start_routed: StartRouted, echoing: Exchange) -> None:
    """The workers that run go on, with new routes too; what dies then has no replacement, as without routes."""
    proxy = start_routed(sections(echoing, "orders"), "--runtime=processes", "--workers=2")
    proxy.ask("orders")
    (fork_server,) = children(proxy.process.pid)
    os.kill(fork_server, signal.SIGKILL)
    assert "the fork server, which starts workers, died" in proxy.line("error")["message"]
    assert proxy.good(sections(echoing, "orders", "quotes")) == [1, 0, 0, 1]
    for _ in range(4):
        proxy.ask("quotes")
    assert proxy.good(sections(echoing, "quotes")) == [0, 1, 0, 1]
    wait_until(lambda: set(proxy.metrics_by_route()) == {"quotes", None})
    assert proxy.stop() == 0


# SIGHUP


def test_sighup_is_taken_though_nohup_has_it_ignored(echoing: Exchange, tmp_path: Path) -> None:
    proxy = RoutedProxy(["nohup", *CHECKOUT], tmp_path / "routes.ini", sections(echoing, "orders"))
    try:
        assert proxy.good(sections(echoing, "orders", "quotes")) == [1, 0, 0, 1]
        proxy.ask("quotes")
        assert proxy.stop() == 0
    finally:
        proxy.close()


def test_without_routes_sighup_drains(start: Any, echoing: Exchange) -> None:
    proxy = start(echoing)
    proxy.line("start")
    assert proxy.stop(signal.SIGHUP) == 0
    assert proxy.line("stop")["reason"] == "SIGHUP"


def test_sighup_during_the_drain_does_nothing(start_routed: StartRouted, echoing: Exchange) -> None:
    proxy = start_routed(sections(echoing, "orders"), "--workers=2")
    with proxy.connect_to("orders") as client:
        answers(client)
        proxy.process.send_signal(signal.SIGTERM)
        proxy.line("drain")
        proxy.write(sections(echoing, "orders", "quotes"))
        proxy.process.send_signal(signal.SIGHUP)
        for _ in range(3):
            proxy.metrics()  # each of its signals comes behind that one
            answers(client)
    assert proxy.wait() == 0
    assert (proxy.count("reload"), proxy.line("stop")["reason"]) == (0, "SIGTERM")


def test_sighup_before_the_start_line_reloads_once_it_is_there(start_routed: StartRouted, echoing: Exchange) -> None:
    proxy = start_routed(sections(echoing, "orders"), "--workers=2")
    wait_until(lambda: catches_sighup(proxy.process.pid), "it handles SIGHUP", pace=0.001)
    proxy.process.send_signal(signal.SIGHUP)
    proxy.line("start")
    assert proxy.reloaded(0)["level"] == "info"
    proxy.ask("orders")
    assert [line["event"] for line in proxy.lines[:3]] == ["start", "route", "reload"]


def catches_sighup(pid: int) -> bool:
    """proc(5): SigCgt is a mask of the signals that have a handler."""
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(status.split("SigCgt:")[1].split()[0], 16) >> (signal.SIGHUP - 1) & 1)


def test_many_sighups_at_once_end_with_what_the_file_says_last(start_routed: StartRouted, echoing: Exchange) -> None:
    proxy = start_routed(sections(echoing, "orders"), "--workers=2")
    proxy.line("start")
    for turn in range(20):
        proxy.write(sections(echoing, "orders", f"new-{turn}"))
        proxy.process.send_signal(signal.SIGHUP)
    proxy.line("route", lambda line: line["route"] == "new-19")
    proxy.ask("new-19")
    wait_until(lambda: set(proxy.metrics_by_route()) == {"orders", "new-19", None}, "the others are gone")
    assert proxy.count("reload") <= 20


def test_a_signal_during_a_reload_is_not_lost_with_it(start_routed: StartRouted, echoing: Exchange) -> None:
    """Half of the file was written when the first one came."""
    proxy = start_routed(sections(echoing, "orders"))
    proxy.line("start")
    proxy.file.write_text(text_of(sections(echoing, "orders", "quotes"))[:-8] + "x = ")
    proxy.process.send_signal(signal.SIGHUP)
    proxy.write(sections(echoing, "orders", "quotes"))
    proxy.process.send_signal(signal.SIGHUP)
    proxy.line("route", lambda line: line["route"] == "quotes")
    proxy.ask("quotes")
