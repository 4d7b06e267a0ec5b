"""termination_state is HAProxy's for the same event: both proxies go through it, and HAProxy's own log says its code."""

from __future__ import annotations

import contextlib
import queue
import shutil
import signal
import socket
import subprocess
import threading
from pathlib import Path
from typing import Callable, Dict, Iterator, Mapping, Tuple, Union

import pytest
from _tsproxy.linux import uapi
from harness import CHECKOUT, PATIENCE, Exchange, Proxy, receive_exactly, reset, wait_until
from namespaces import Namespace

pytestmark = pytest.mark.root

CLIENT, SERVER, SILENT = "127.0.0.2", "127.0.0.3", "127.0.0.4"
SHORT_MS = 300

_HAPROXY = """
global
    log stdout format raw local0
    stats socket {admin} level admin
    hard-stop-after {drain}ms
defaults
    mode tcp
    log global
    log-format "code %ts"
    retries 0
    timeout connect {connect}ms
    timeout client {idle}ms
    timeout server {idle}ms
    timeout client-fin {half_close}ms
    timeout server-fin {half_close}ms
listen relay
    bind fd@{fd}
    server exchange {target} tcp-ut {user}ms
    {rule}
"""
_DEFAULTS = {"connect": 20000, "idle": 60000, "user": 20000, "drain": 20000}
_OPTIONS = {
    "connect": "--connect-timeout",
    "idle": "--idle-timeout",
    "half_close": "--half-close-timeout",
    "user": "--user-timeout",
    "drain": "--drain-timeout",
}


class Haproxy:
    """A running HAProxy in a namespace; `code()` is what its log says of the next session that ended."""

    drain_signal = signal.SIGUSR1

    def __init__(self, void: Namespace, tmp_path: Path, target: str, rule: str, settings: Mapping[str, int]) -> None:
        """`settings` are times in ms."""
        with void:
            listener = socket.create_server(("127.0.0.1", 0))
        self.address, self._admin = listener.getsockname(), str(tmp_path / "admin")
        config, fd = tmp_path / "haproxy.cfg", listener.fileno()
        values = {**_DEFAULTS, **settings}
        values.setdefault("half_close", values["idle"])  # it shuts one side down first when the timers are not quite equal
        # The accepted sockets inherit it; HAProxy does not set its tcp-ut on a listener that it inherits.
        listener.setsockopt(socket.IPPROTO_TCP, uapi.TCP_USER_TIMEOUT, values["user"])
        config.write_text(_HAPROXY.format(**values, rule=rule, admin=self._admin, fd=fd, target=target))
        self.process = subprocess.Popen(
            [*void.enter, "haproxy", "-db", "-f", str(config)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=[listener.fileno()],
        )
        listener.close()
        self._lines: queue.Queue[str] = queue.Queue()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self._lines.put(line.decode())

    def code(self) -> str:
        while True:
            line = self._lines.get(timeout=PATIENCE)
            if line.startswith("code "):
                return line.split()[1]

    def is_connecting(self) -> bool:
        with socket.socket(socket.AF_UNIX) as admin:
            if admin.connect_ex(self._admin):
                return False
            admin.sendall(b"show sess\n")
            return b"fe=relay" in b"".join(iter(lambda: admin.recv(4096), b""))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._thread.join()
        assert self.process.stdout
        self.process.stdout.close()


class Ours:
    """tsproxy, for the same."""

    drain_signal = signal.SIGTERM

    def __init__(self, void: Namespace, target: str, settings: Mapping[str, int]) -> None:
        words = [f"{_OPTIONS[name]}={ms}ms" for name, ms in settings.items() if name != "user"]
        words += [f"--user-timeout={ms}" for name, ms in settings.items() if name == "user"]
        words += ["-p0", "-t", target, "--metrics-interval=0", "--keepalive=0", "--timestamps=preserve", "--workers=1"]
        self._proxy = Proxy([*void.enter, *CHECKOUT], *words)
        self.process, self.address = self._proxy.process, self._proxy.address

    def code(self) -> str:
        return str(self._proxy.line("connection")["termination_state"])

    def is_connecting(self) -> bool:
        return bool(self._proxy.metrics()["upstream_cx_active"])

    def close(self) -> None:
        self._proxy.close()


class Stand:
    """One of the two proxies between a client and an exchange with addresses of their own."""

    def __init__(self, void: Namespace, which: str, tmp_path: Path, undo: contextlib.ExitStack) -> None:
        self.is_haproxy = which == "haproxy"
        self._void, self._undo, self._path = void, undo, tmp_path
        with void:
            self.exchange = Exchange(host=SERVER)
        undo.callback(self.exchange.close)

    def start(self, target: str = "", rule: str = "", **settings: int) -> None:
        to = target or self.exchange.target
        made: Union[Haproxy, Ours]
        made = Haproxy(self._void, self._path, to, rule, settings) if self.is_haproxy else Ours(self._void, to, settings)
        self.proxy = made
        self._undo.callback(made.close)

    def connect(self) -> socket.socket:
        with self._void:
            client = socket.socket()
        self._undo.callback(client.close)
        client.bind((CLIENT, 0))
        client.settimeout(PATIENCE)
        with contextlib.suppress(ConnectionResetError):  # a refused one may be reset before connect(2) has returned
            client.connect(self.proxy.address)
        return client

    def connecting(self) -> socket.socket:
        client = self.connect()
        wait_until(self.proxy.is_connecting, "it connects")
        return client

    def relaying(self) -> Tuple[socket.socket, socket.socket]:
        client = self.connect()
        server = self.exchange.accept()
        for one, other in ((client, server), (server, client)):
            one.sendall(b"x")
            assert receive_exactly(other, 1) == b"x"
        return client, server

    def lose(self, address: str) -> None:
        """Whoever has that address is not there any more."""
        rules = f"table ip gone {{ chain in {{ type filter hook input priority 0; ip saddr {address} drop; "
        self._void.run("nft", "-f", "-", input=f"{rules} ip daddr {address} drop; }}; }}")
        self._undo.callback(self._void.run, "nft", "delete", "table", "ip", "gone")


@pytest.fixture(scope="module")
def void() -> Iterator[Namespace]:
    with contextlib.closing(Namespace(tcp_timestamps="0")) as namespace:
        yield namespace


@pytest.fixture(params=["haproxy", "tsproxy"])
def stand(void: Namespace, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stand]:
    if request.param == "haproxy" and not shutil.which("haproxy"):
        pytest.skip("LOUD: no haproxy here, so it is not asked whether these are its codes")
    with contextlib.ExitStack() as undo:
        yield Stand(void, request.param, tmp_path, undo)


def fill(sock: socket.socket) -> None:
    """Send as long as the proxy is there: more than all buffers hold, whatever stalls the machine has."""
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        while True:
            sock.send(bytes(1 << 16))


@pytest.mark.parametrize(("client_leaves", "code"), [(True, "CD"), (False, "sC")])
def test_while_connecting_a_client_reset_is_cd_and_the_timeout_sc(stand: Stand, client_leaves: bool, code: str) -> None:
    stand.lose(SILENT)
    stand.start(f"{SILENT}:9", **({} if client_leaves else {"connect": SHORT_MS}))
    if client_leaves:
        reset(stand.connecting())
    else:
        stand.connect()
    assert stand.proxy.code() == code


def test_a_refused_connect_is_sc(stand: Stand) -> None:
    stand.exchange.close()
    stand.start()
    stand.connect()
    assert stand.proxy.code() == "SC"


def closed(client: socket.socket, server: socket.socket) -> None:
    client.close()
    assert server.recv(1) == b""
    server.close()


ENDS: Dict[str, Tuple[str, Callable[[socket.socket, socket.socket], object]]] = {
    "closed by both": ("--", closed),
    "reset by the client": ("CD", lambda client, server: reset(client)),
    "reset by the server": ("SD", lambda client, server: reset(server)),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_relayed_session_that_its_peers_end_has_its_code(stand: Stand, end: str) -> None:
    code, act = ENDS[end]
    stand.start()
    act(*stand.relaying())
    assert stand.proxy.code() == code


SILENCES: Dict[str, Tuple[str, str, Callable[[socket.socket, socket.socket], object]]] = {
    "nobody speaks": ("cD", "idle", lambda client, server: None),
    "the server owes an answer": ("cD", "idle", lambda client, server: client.sendall(b"?")),
    "the server takes nothing": ("sD", "idle", lambda client, server: fill(client)),
    "the client takes nothing": ("cD", "idle", lambda client, server: fill(server)),
    "the client has closed": ("sD", "half_close", lambda client, server: client.shutdown(socket.SHUT_WR)),
    "the server has closed": ("cD", "half_close", lambda client, server: server.shutdown(socket.SHUT_WR)),
}


@pytest.mark.parametrize("silence", SILENCES)
def test_a_silent_session_has_the_code_of_the_side_that_is_waited_for(stand: Stand, silence: str) -> None:
    code, timeout, act = SILENCES[silence]
    stand.start(**{timeout: 2 * SHORT_MS})
    act(*stand.relaying())
    assert stand.proxy.code() == code


@pytest.mark.parametrize(("gone", "code"), [(CLIENT, "CD"), (SERVER, "SD")])
def test_a_peer_that_acknowledges_nothing_has_the_code_of_a_reset(stand: Stand, gone: str, code: str) -> None:
    stand.start(user=SHORT_MS)
    client, server = stand.relaying()
    stand.lose(gone)
    (server if gone == CLIENT else client).sendall(b"lost")
    assert stand.proxy.code() == code


def test_a_session_that_is_cut_while_connecting_is_kc(stand: Stand) -> None:
    stand.lose(SILENT)
    stand.start(f"{SILENT}:9", drain=SHORT_MS)
    stand.connecting()
    stand.proxy.process.send_signal(stand.proxy.drain_signal)
    assert stand.proxy.code() == "KC"


def test_a_session_that_is_cut_while_relaying_is_kd_by_the_manual(stand: Stand) -> None:
    """K: "actively killed", D: "in the DATA phase". HAProxy 2.6 itself leaves the phase out when it is cut there."""
    stand.start(drain=SHORT_MS)
    stand.relaying()
    stand.proxy.process.send_signal(stand.proxy.drain_signal)
    assert stand.proxy.code() in ({"K-", "KD"} if stand.is_haproxy else {"KD"})


REJECTS = {
    "PR": "tcp-request content reject",
    "PD": "tcp-response inspect-delay 20s\n    tcp-response content reject if { res.len gt 0 }",
}


@pytest.mark.parametrize("code", REJECTS)
def test_a_session_that_a_rule_refuses_is_pr_and_one_that_it_ends_later_pd(stand: Stand, code: str) -> None:
    """tsproxy's own are in test_policy.py and test_drift.py."""
    if not stand.is_haproxy:
        return
    stand.start(rule=REJECTS[code])
    stand.connect()
    if code == "PD":
        stand.exchange.accept().sendall(b"later")
    assert stand.proxy.code() == code
