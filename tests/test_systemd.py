"""Inherited listeners and state messages, as systemd gives and wants them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence

import pytest
from _tsproxy.host import systemd
from conftest import CHECKOUT
from harness import Exchange, Proxy, receive_exactly, wait_until
from hypothesis import given
from hypothesis import strategies as st

WORDS = ["-t", "127.0.0.1:9", "--timestamps=preserve", "--metrics-interval=0"]
HAND_OVER = """
import os, sys
for number, fd in enumerate(map(int, sys.argv[1].split(","))):
    os.dup2(fd, 3 + number)
os.environ.update(LISTEN_PID=str(os.getpid()))
os.execv(sys.argv[2], sys.argv[2:])
"""


def hand_over(listeners: List[socket.socket], *options: str, pass_also: Sequence[int] = (), **environment: str) -> Proxy:
    """A proxy with inherited listeners, at 3 and on."""
    fds = [listener.fileno() for listener in listeners]
    command = [sys.executable, "-c", HAND_OVER, ",".join(map(str, fds)), *CHECKOUT]
    env = {**os.environ, "LISTEN_FDS": str(len(fds)), **environment}
    return Proxy(command, *options, env=env, pass_fds=[*fds, *pass_also])


@contextlib.contextmanager
def listeners(count: int) -> Iterator[List[socket.socket]]:
    """Listening sockets whose numbers do not clash with the places that they are to be put at."""
    made, spare = [], [os.open(os.devnull, os.O_RDONLY) for _ in range(8)]
    try:
        made = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
        yield made
    finally:
        for sock in made:
            sock.close()
        for fd in spare:
            os.close(fd)


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
        while True:
            text = self._socket.recv(4096).decode()
            self.messages.append(dict(line.split("=", 1) for line in text.splitlines()))
            if name in self.messages[-1]:
                return self.messages[-1][name]

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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = probe.getsockname()
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
