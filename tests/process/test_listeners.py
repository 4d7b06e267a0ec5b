"""Listeners: no way back to ourselves, no option of whoever made them that hurts, a warning where one client could take all."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any, Iterator, List, Sequence

import pytest
from _tsproxy.linux import sockets, uapi
from handover import HAND_OVER, hand_over, listeners
from harness import CHECKOUT, Exchange, Proxy, free_port, receive_exactly, wait_until
from namespaces import Namespace, require_root

PRESERVE = "--timestamps=preserve"


def relays(client: socket.socket) -> None:
    with client:
        client.sendall(b"order")
        assert receive_exactly(client, 5) == b"order"


# Loops

LOOPS = [
    ("127.0.0.1", "127.0.0.1"),
    ("127.0.0.1", "0.0.0.0"),
    ("0.0.0.0", "0.0.0.0"),
    ("0.0.0.0", "127.0.0.9"),
    ("::1", "[::]"),
    ("::", "[::]"),
    ("::", "0.0.0.0"),
    ("::", "127.0.0.1"),
    ("127.0.0.1", "[::ffff:127.0.0.1]"),
    ("127.0.0.1", "[::ffff:0.0.0.0]"),
    ("127.0.0.1", "localhost"),
    ("::1", "ip6-self"),
]


@pytest.mark.root
@pytest.mark.parametrize(("bind", "target"), LOOPS)
def test_a_target_that_leads_back_to_the_listener_is_refused(bind: str, target: str, tmp_path: Path) -> None:
    """0.0.0.0 and :: are this host to connect(2)."""
    require_root()
    port = free_port()
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n::1 ip6-self\n")
    command = ["unshare", "--mount", "sh", "-c", f'mount --bind {tmp_path}/hosts /etc/hosts && exec "$@"', "sh", *CHECKOUT]
    options = ["-t", f"{target}:{port}", PRESERVE, f"-p{port}", "-b", bind]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False, timeout=30)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "allowed: any address but tsproxy's own" in done.stderr


def test_a_source_is_where_an_unspecified_target_leads_to() -> None:
    port = free_port()
    words = [*CHECKOUT, "-t", f"0.0.0.0:{port}", PRESERVE, f"-p{port}", "-b127.0.0.2", "--source=127.0.0.2"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=30)
    assert (done.returncode, "tsproxy's own" in done.stderr) == (2, True)


@pytest.mark.parametrize(("bind", "target"), [("0.0.0.0", "[::1]"), ("127.0.0.2", "0.0.0.0"), ("127.0.0.2", "127.0.0.1")])
def test_a_target_that_does_not_lead_back_is_not_refused(start: Any, bind: str, target: str) -> None:
    port = free_port()
    proxy = start(f"{target}:{port}", f"-p{port}", f"-b{bind}")
    assert proxy.line("start")["listen_port"] == port
    assert proxy.stop() == 0


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_target_that_is_an_inherited_listener_is_refused(host: str) -> None:
    with listeners(2) as socks:
        port = socks[1].getsockname()[1]
        proxy = hand_over(socks, "-t", f"{host}:{port}", PRESERVE)
    with contextlib.closing(proxy):
        assert proxy.wait() == 2
        assert "tsproxy's own" in proxy.stderr()


@pytest.mark.root
def test_the_same_address_in_another_namespace_is_no_loop() -> None:
    """As `generate systemd` has it: the listener in the host's namespace, tsproxy in another."""
    with contextlib.closing(Namespace()) as space, listeners(1) as socks:
        _, port = socks[0].getsockname()
        with space:
            far = Exchange(lambda client: client.sendall(client.recv(100)), port=port)
        command = [*space.enter, sys.executable, "-c", HAND_OVER, str(socks[0].fileno()), *CHECKOUT]
        env = {**os.environ, "LISTEN_FDS": "1"}
        proxy = Proxy(command, "-t", far.target, PRESERVE, env=env, pass_fds=[socks[0].fileno()])
        with contextlib.closing(far), contextlib.closing(proxy):
            relays(socket.create_connection(proxy.address, 20))


# Options that are inherited


def hurt(listener: socket.socket) -> None:
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 20))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 4096)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000)


def test_no_option_that_hurts_is_inherited_by_what_is_accepted() -> None:
    with listeners(1) as (listener,):
        hurt(listener)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 3)
        meant = listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT)
        sockets.reset_inherited_options(listener)
        with socket.create_connection(listener.getsockname()) as client:
            client.sendall(b"x")  # TCP_DEFER_ACCEPT waits for it
            accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)[:4] == bytes(4)
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT) == 1
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0, "that is --keepalive's to set"
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE) == 1, "urgent bytes are relayed in line"
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_CORK) == 0
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 0
        assert listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT) == meant > 0


@pytest.mark.parametrize("workers", ["--workers=1", "--workers=2"])
def test_small_orders_pass_through_a_listener_that_was_made_for_something_else(echoing: Exchange, workers: str) -> None:
    with listeners(1) as socks:
        hurt(socks[0])
        proxy = hand_over(socks, "-t", echoing.target, PRESERVE, workers)
    with contextlib.closing(proxy):
        relays(socket.create_connection(proxy.address, 20))
        assert proxy.line("connection")["reason"] == "closed"
        assert proxy.stop() == 0


def test_an_mptcp_listener_is_refused_in_one_line() -> None:
    with contextlib.ExitStack() as stack:
        for fd in [os.open(os.devnull, os.O_RDONLY) for _ in range(8)]:
            stack.callback(os.close, fd)
        try:
            listener = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM, uapi.IPPROTO_MPTCP))
        except OSError:
            pytest.skip("LOUD: no MPTCP in this kernel")
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        proxy = hand_over([listener], "-t127.0.0.1:9", PRESERVE)
    with contextlib.closing(proxy):
        assert proxy.wait() == 2
        said = proxy.stderr()
        assert said.startswith("tsproxy.py: LISTEN_FDS: descriptor 3 listens for MPTCP; allowed: a listening TCP socket")
        assert said.count("\n") == 1


# Who could take all there is


def warnings(proxy: Proxy) -> List[str]:
    proxy.line("start")
    assert proxy.stop() == 0
    return [line["message"] for line in proxy.lines if line["event"] == "warning"]


@pytest.mark.parametrize("bind", ["0.0.0.0", "::"])
def test_a_listener_for_others_that_nothing_bounds_is_warned_of(start: Any, bind: str) -> None:
    proxy = start("127.0.0.1:9", f"--bind={bind}")
    port = proxy.line("start")["listen_port"]
    shown = f"[{bind}]:{port}" if ":" in bind else f"{bind}:{port}"
    assert warnings(proxy) == [
        f"one client of {shown} can hold all 1000 connections for ever: "
        "missing --max-connections-per-client, --idle-timeout or --allow"
    ]


@pytest.mark.parametrize(
    "options",
    [
        ["--bind=127.0.0.1"],
        ["--bind=127.0.0.9"],
        ["--bind=::1"],
        ["--bind=0.0.0.0", "--idle-timeout=1h"],
        ["--bind=0.0.0.0", "--max-connections-per-client=10"],
        ["--bind=0.0.0.0", "--allow=10.0.0.0/8"],
    ],
)
def test_loopback_or_any_bound_is_not_warned_of(start: Any, options: Sequence[str]) -> None:
    assert warnings(start("127.0.0.1:9", *options)) == []


def test_an_inherited_listener_for_others_is_warned_of_too() -> None:
    with listeners(1) as loopback, socket.create_server(("0.0.0.0", 0)) as everywhere:
        proxy = hand_over([*loopback, everywhere], "-t127.0.0.1:9", PRESERVE)
        port = everywhere.getsockname()[1]
    with contextlib.closing(proxy):
        (said,) = warnings(proxy)
        assert said.startswith(f"one client of 0.0.0.0:{port} can hold all 1000")


# A zone


@pytest.fixture
def space() -> Iterator[Namespace]:
    with contextlib.closing(Namespace()) as made:
        yield made


def make_link(space: Namespace) -> None:
    space.run("ip", "link", "add", "v0", "type", "veth", "peer", "name", "v1")
    for name in ("v0", "v1"):
        space.run("ip", "link", "set", name, "up")
    space.run("ip", "address", "add", "fe80::1234/64", "dev", "v0", "nodad")


@pytest.mark.root
def test_a_target_with_a_zone_is_followed_when_its_interface_is_made_again(space: Namespace) -> None:
    """The zone is a name to people and a number to the kernel, and the new interface has another number."""
    make_link(space)
    with space:
        far = Exchange(lambda client: client.sendall(client.recv(100)), host="::")
    command = [*space.enter, *CHECKOUT, "-t", f"[fe80::1234%v0]:{far.port}", "-p0", PRESERVE]
    with contextlib.closing(far), contextlib.closing(Proxy(command)) as proxy:
        with space:
            relays(proxy.connect())
        space.run("ip", "link", "delete", "v0")
        make_link(space)

        def is_back() -> bool:
            with space, contextlib.suppress(ConnectionResetError):
                relays(proxy.connect())
                return True
            return False

        wait_until(is_back, "the new interface is found")
        where = f"[fe80::1234%v0]:{far.port}"
        assert proxy.line("start")["upstream_addresses"] == [where]
        assert proxy.line("resolve")["message"] == f"upstream addresses are now {where}"
