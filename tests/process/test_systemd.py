"""Inherited listeners and state messages, as systemd gives and wants them."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest
from _tsproxy.linux import systemd
from _tsproxy.loop.event_loop import EventLoop
from _tsproxy.proxy import inbox
from _tsproxy.proxy.inbox import Command
from _tsproxy.stats.counters import Counter
from _tsproxy.supervisor.reload import _refusal
from _tsproxy.supervisor.watchdog import Watchdog
from _tsproxy.supervisor.worker_pool import WorkerPool
from _tsproxy.supervisor.worker_slot import WorkerSlot
from handover import hand_over, listeners
from harness import CHECKOUT, Exchange, Proxy, children, echo, free_port, pause, receive_exactly, wait_until
from hypothesis import given
from hypothesis import strategies as st
from namespaces import Namespace, require_root
from routed import RoutedProxy

WORDS = ["-t", "127.0.0.1:9", "--timestamps=preserve", "--metrics-interval=0"]


def test_inherited_listeners_are_all_served_and_named_in_the_start_line(echoing: Exchange) -> None:
    with listeners(2) as socks:
        addresses = [sock.getsockname() for sock in socks]
        proxy = hand_over(socks, "-t", echoing.target, "--timestamps=preserve", LISTEN_FDNAMES="orders:drops")
    try:
        start = proxy.line("start")
        assert start["listeners"] == [f"127.0.0.1:{port}" for _, port in addresses]
        assert start["listen_port"] == addresses[0][1]
        for address in addresses:
            with socket.create_connection(address, 10) as client:
                client.sendall(b"hello")
                assert receive_exactly(client, 5) == b"hello"
        assert proxy.stop() == 0
    finally:
        proxy.close()


@pytest.mark.parametrize("option", ["-p8080", "--bind=127.0.0.1"])
def test_an_inherited_listener_and_an_address_of_our_own_contradict(option: str) -> None:
    with listeners(1) as socks:
        proxy = hand_over(socks, *WORDS, option)
    try:
        assert proxy.wait() == 2
        assert "LISTEN_FDS" in proxy.stderr()
    finally:
        proxy.close()


@pytest.mark.parametrize("given", ["0", "-1", "x", "", "99999999999", "1.5", "000001999999999"])
def test_words_that_make_no_sense_end_with_2_and_one_line(given: str) -> None:
    with listeners(1) as socks:
        proxy = hand_over(socks, *WORDS, LISTEN_FDS=given)
    try:
        assert proxy.wait() == 2
        (line,) = proxy.stderr().splitlines()
        assert f"LISTEN_FDS: given {given!r}" in line
    finally:
        proxy.close()


def test_a_descriptor_that_does_not_listen_is_refused() -> None:
    with listeners(0), socket.socket() as idle:
        proxy = hand_over([idle], *WORDS)
    try:
        assert proxy.wait() == 2
        assert "does not listen" in proxy.stderr()
    finally:
        proxy.close()


def test_a_handover_meant_for_another_process_is_not_taken(echoing: Exchange) -> None:
    env = {**os.environ, "LISTEN_FDS": "1", "LISTEN_PID": "1"}
    proxy = Proxy(CHECKOUT, "-t", echoing.target, "--timestamps=preserve", "-p0", env=env)
    try:
        with proxy.connect() as client:
            client.sendall(b"own")
            assert receive_exactly(client, 3) == b"own"
    finally:
        proxy.close()


@given(st.dictionaries(st.sampled_from(["LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"]), st.text(max_size=20)))
def test_any_environment_is_taken_or_refused_in_one_line(environment: Dict[str, str]) -> None:
    try:
        handed = systemd.inherited({"LISTEN_PID": "7", **environment}, 7)
    except systemd.BadHandover as problem:
        assert "\n" not in str(problem)
    else:
        assert all(3 <= each.fd < 3 + 1024 for each in handed)


class Manager:
    """The service manager's end of sd_notify."""

    def __init__(self, path: Path) -> None:
        self.path = str(path / "notify")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.path)
        self._socket.settimeout(20)
        self.messages: List[Dict[str, str]] = []

    def wait_for(self, name: str) -> str:
        return self.wait_for_state(name)[name]

    def wait_for_state(self, name: str) -> Dict[str, str]:
        """The next message that has this."""
        while True:
            text = self._socket.recv(4096).decode()
            self.messages.append(dict(line.split("=", 1) for line in text.splitlines()))
            if name in self.messages[-1]:
                return self.messages[-1]

    def has_message(self) -> bool:
        return bool(select.select([self._socket], [], [], 0)[0])

    def falls_silent(self, for_s: float) -> None:
        """Nothing comes for so long, once what is under way has come."""
        ready = select.poll()
        ready.register(self._socket, select.POLLIN)
        wait_until(lambda: not (ready.poll(for_s * 1000) and self._socket.recv(4096)), "silence")

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    made = Manager(tmp_path)
    yield made
    made.close()


def test_the_manager_hears_of_the_start_of_life_and_of_the_end(start: Any, echoing: Exchange, manager: Manager) -> None:
    env = {**os.environ, "NOTIFY_SOCKET": manager.path, "WATCHDOG_USEC": "200000"}
    proxy = start(echoing, env=env)
    assert manager.wait_for("READY") == "1"
    with proxy.connect() as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        for _ in range(3):
            assert manager.wait_for("WATCHDOG") == "1"
        wait_until(lambda: manager.wait_for("STATUS") == "relaying 1 connections")
        proxy.process.send_signal(signal.SIGTERM)
        assert manager.wait_for("STOPPING") == "1"
        assert manager.wait_for("WATCHDOG") == "1", "a long drain must not look like a hang"
    assert proxy.wait() == 0


def test_the_watchdog_is_fed_through_a_whole_drain_though_a_worker_has_ended(
    start: Any, echoing: Exchange, manager: Manager
) -> None:
    """One worker has a connection that stays, the other has nothing to do, and ends at once."""
    env = {**os.environ, "NOTIFY_SOCKET": manager.path, "WATCHDOG_USEC": "300000"}
    proxy = start(echoing, "--workers=2", "--runtime=processes", env=env)
    with proxy.connect() as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        proxy.process.send_signal(signal.SIGTERM)
        assert int(manager.wait_for_state("STOPPING")["EXTEND_TIMEOUT_USEC"]) > 30e6, "as long as the drain may take"
        (fork_server,) = children(proxy.process.pid)
        wait_until(lambda: len(children(fork_server)) == 1, "the worker that has nothing to do ends")
        for _ in range(8):
            assert manager.wait_for_state("WATCHDOG")["STATUS"] == "draining 1 connections"
    assert proxy.wait() == 0


def test_a_stuck_worker_silences_the_watchdog_until_it_goes_on(start: Any, echoing: Exchange, manager: Manager) -> None:
    env = {**os.environ, "NOTIFY_SOCKET": manager.path, "WATCHDOG_USEC": "300000"}
    proxy = start(echoing, "--workers=2", "--runtime=processes", env=env)
    manager.wait_for("WATCHDOG")
    (fork_server,) = children(proxy.process.pid)
    stuck = children(fork_server)[0]
    pause(stuck)
    manager.falls_silent(for_s=1.0)
    os.kill(stuck, signal.SIGCONT)
    assert manager.wait_for("WATCHDOG") == "1"


def test_a_stuck_worker_is_ended_by_the_clock_of_the_drain(start: Any, echoing: Exchange, manager: Manager) -> None:
    """Not by the manager's watchdog, which would kill the other workers' connections with it."""
    env = {**os.environ, "NOTIFY_SOCKET": manager.path, "WATCHDOG_USEC": "300000"}
    proxy = start(echoing, "--workers=2", "--runtime=processes", "--drain-timeout=0.1", env=env)
    proxy.line("start")
    (fork_server,) = children(proxy.process.pid)
    stuck = children(fork_server)[0]
    pause(stuck)
    proxy.process.send_signal(signal.SIGTERM)
    manager.wait_for_state("STOPPING")
    assert int(manager.wait_for("EXTEND_TIMEOUT_USEC")) > 5e6, "the time that it takes is asked for, once more"
    os.kill(stuck, signal.SIGCONT)
    assert proxy.wait() == 0


class Running:
    """A runner whose worker runs; the test consumes its inbox."""

    is_alive = can_start = True
    exit_status = ""

    def start(self) -> None: ...


def test_a_busy_worker_whose_inbox_is_never_empty_answers_the_watchdog(manager: Manager) -> None:
    """It has to consume what was there at the time of the ping."""
    row = memoryview(bytearray(8 * len(Counter))).cast("Q")
    producer = inbox.ChannelProducer(row)
    consumer = inbox.ChannelConsumer(inbox.Channel(producer.theirs.fileno()), row)
    pool = WorkerPool.__new__(WorkerPool)
    pool._slots = [slot] = [WorkerSlot(0, producer, Running())]
    notifier = systemd.Notifier({"NOTIFY_SOCKET": manager.path, "WATCHDOG_USEC": "150000"}, os.getpid())
    with contextlib.closing(EventLoop()) as loop, contextlib.closing(notifier):
        watchdog = Watchdog(loop, notifier, pool, lambda: "relaying")
        assert producer.put(inbox.Message(Command.PING))
        watchdog.start()
        for _ in range(3):
            loop.run(lambda: slot._ping_mark == producer.last_put)
            assert producer.put(inbox.Message(Command.PING))  # one is put before one is consumed
            assert consumer.pop()
            assert not producer.is_empty
            loop.run(manager.has_message)
            assert manager.wait_for("WATCHDOG") == "1"
        loop.run_for(2 * 10**8)
        assert not manager.has_message(), "nothing was consumed since the last ping"
    producer.theirs.detach()
    consumer._socket.close()
    producer._ours.close()


@pytest.mark.root
def test_the_status_tells_a_drift_until_it_is_over(manager: Manager) -> None:
    require_root()
    env = {**os.environ, "NOTIFY_SOCKET": manager.path, "WATCHDOG_USEC": "300000"}
    with contextlib.closing(Namespace(tcp_timestamps="0")) as host, contextlib.ExitStack() as stack:
        with host:
            far = stack.enter_context(contextlib.closing(Exchange(echo)))
        proxy = Proxy([*host.enter, *CHECKOUT], "-t", far.target, "-p0", env=env)
        stack.callback(proxy.close)
        proxy.line("start")
        host.sysctl("tcp_timestamps", "1")
        while not manager.wait_for("STATUS").startswith("refusing"):
            pass
        for _ in range(4):
            status = manager.wait_for_state("WATCHDOG")["STATUS"]
            assert status.startswith("refusing new connections, with 0 connections: ")
            assert "tcp_timestamps=1" in status
        host.sysctl("tcp_timestamps", "0")
        while manager.wait_for("STATUS").startswith("refusing"):
            pass
        assert manager.wait_for("STATUS") == "relaying 0 connections"
        assert proxy.stop() == 0


def test_the_status_tells_a_refused_reload_until_one_succeeds(tmp_path: Path, echoing: Exchange, manager: Manager) -> None:
    """To systemd both are over with READY=1."""
    good = {"orders": {"target": echoing.target, "port": 0}}
    env = {**os.environ, "NOTIFY_SOCKET": manager.path, "WATCHDOG_USEC": "300000"}
    with contextlib.closing(RoutedProxy(CHECKOUT, tmp_path / "r.ini", good, env=env)) as proxy:
        proxy.bad("[orders]\nport = x\n")
        said = re.escape(f"{proxy.file}:2: [orders] port: given 'x'; allowed: ")
        refused = rf"relaying 0 connections; reload refused at \w{{3}} \d\d [\d:]{{8}}: {said}.*"
        assert manager.wait_for("RELOADING") == "1"
        assert re.fullmatch(refused, manager.wait_for_state("READY")["STATUS"])
        assert re.fullmatch(refused, manager.wait_for_state("WATCHDOG")["STATUS"]), "it stays"
        proxy.bad(f"[orders]\nport = \x1b]2;{'x' * 300}\n")
        status = manager.wait_for_state("READY")["STATUS"]
        assert len(status) < 256
        assert status.endswith("xxx...")
        assert proxy.good(good) == [0, 0, 0, 1]
        assert manager.wait_for_state("READY")["STATUS"] == "relaying 0 connections"
        assert proxy.stop() == 0


@pytest.mark.parametrize(
    ("problem", "shown"),
    [
        ("/r\x1b]2;\u202e.ini:1: [a] given\nmore", r"/r\x1b]2;\u202e.ini:1: [a] given"),
        ("Traceback (most recent call last):\n  at\nKeyError: 'a'\n", "KeyError: 'a'"),
        ("x" * 9000, "x" * 160 + "..."),
    ],
    ids=["escapes", "a bug", "long"],
)
def test_the_status_of_a_refused_reload_is_one_short_line_that_no_terminal_obeys(problem: str, shown: str) -> None:
    assert re.fullmatch(r"reload refused at [A-Z][a-z]{2} \d\d \d\d:\d\d:\d\d: " + re.escape(shown), _refusal(problem))


def test_a_slow_name_is_resolved_before_the_managers_timeout(start: Any, manager: Manager) -> None:
    start("localhost:9", env={**os.environ, "NOTIFY_SOCKET": manager.path})
    first = manager.wait_for_state("EXTEND_TIMEOUT_USEC")
    assert first["STATUS"] == "resolving localhost:9"
    assert int(first["EXTEND_TIMEOUT_USEC"]) > 90e6, "more than systemd's own limit for a start"
    assert manager.wait_for_state("READY")["STATUS"] == "relaying 0 connections"


def test_a_manager_that_is_gone_does_not_matter(start: Any, echoing: Exchange, manager: Manager) -> None:
    proxy = start(echoing, env={**os.environ, "NOTIFY_SOCKET": manager.path, "WATCHDOG_USEC": "100000"})
    manager.wait_for("READY")
    manager.close()
    os.unlink(manager.path)
    with proxy.connect() as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
    assert proxy.stop() == 0


def test_a_real_activator_hands_its_listener_over(echoing: Exchange) -> None:
    """systemd-socket-activate, where it is installed: the same protocol from another hand."""
    address = ("127.0.0.1", free_port())
    activator = ["systemd-socket-activate", "-l", f"127.0.0.1:{address[1]}", "-E", "PATH", "--fdname=orders"]
    if subprocess.run(["which", activator[0]], capture_output=True, check=False).returncode:
        pytest.skip("LOUD: systemd-socket-activate is not installed")
    words = ["-t", echoing.target, "--timestamps=preserve"]
    proxy = Proxy([*activator, *CHECKOUT], *words, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: _connects(address))
        assert proxy.line("start")["listen_port"] == address[1]
        with socket.create_connection(address, 10) as client:
            client.sendall(b"activated")
            assert receive_exactly(client, 9) == b"activated"
    finally:
        proxy.close()


def _connects(address: Any) -> bool:
    try:
        socket.create_connection(address, 1).close()
    except OSError:
        return False
    return True
