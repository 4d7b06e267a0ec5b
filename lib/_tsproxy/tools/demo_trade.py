"""The trading of `demo`: a real tsproxy behind a listener, an exchange that echoes, and a client that sends it orders.

One thread serves both ends in turn, so nothing but tsproxy runs while an order is under way.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import sys
import time
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence

from _tsproxy.cli import program
from _tsproxy.linux import namespaces, sockets, systemd
from _tsproxy.linux.addresses import Address, from_sockaddr
from _tsproxy.linux.children import Child
from _tsproxy.linux.sockets import Tuning
from _tsproxy.policy import syn, witness
from _tsproxy.policy.sysctl import Sysctl
from _tsproxy.tools.demo_audit import LegWatch

Line = Dict[str, Any]
ORDER_BYTES = 64
_TRADING_S = 2.0
_WATCHED_S, _WATCHED_ORDERS = 0.4, 8
_PATIENCE_S = 10.0
_GRACE_S = 3.0


class Trouble(Exception):
    """The demo can't go on; the text is the one line to print."""


def trade(listener: socket.socket, mode: str, move_on: Callable[[], None]) -> Dict[str, Any]:
    """Facts of one relayed connection, and of one before it that is captured.

    `move_on` changes from the client's network namespace to the exchange's.
    """
    client_sysctl, client_syn = _sysctl(), _witness_syn()
    with contextlib.ExitStack() as stack:
        watch = stack.enter_context(contextlib.closing(LegWatch()))
        watch.add(listener.getsockname()[1])
        clients = [stack.enter_context(socket.socket(listener.family, socket.SOCK_STREAM)) for _ in range(2)]
        move_on()
        exchange = stack.enter_context(sockets.listener(Address(socket.AF_INET, "127.0.0.1", 0), 16, Tuning()))
        watch.add(exchange.getsockname()[1])
        sockets.save_syns(exchange)
        return {
            **_relay(listener, clients, exchange, mode, watch),
            "mode": mode,
            "client_sysctl": client_sysctl,
            "exchange_sysctl": _sysctl(),
            "client_syn": client_syn,
            "uid": os.geteuid(),
        }


def _sysctl() -> Optional[int]:
    """None where /proc is not readable."""
    try:
        sysctl = Sysctl()
    except OSError:
        return None
    try:
        return sysctl.value()
    finally:
        sysctl.close()


def _witness_syn() -> List[str]:
    """The options of a SYN made here and now, as a list of words."""
    return str(witness.capture_syn(socket.AF_INET, time.monotonic() + _PATIENCE_S)).split(",")


def _relay(
    listener: socket.socket, clients: Sequence[socket.socket], exchange: socket.socket, mode: str, watch: LegWatch
) -> Dict[str, Any]:
    target = from_sockaddr(exchange.family, exchange.getsockname())
    with _proxy(listener, str(target), mode) as proxy:
        proxy.wait_for("start")
        audit = _watched(clients[0], listener, exchange, proxy, watch)
        with _connected(clients[1], listener, exchange) as far:
            upstream_syn = str(syn.parse(sockets.saved_syn(far))).split(",")
            round_trips = _orders(clients[1], far)
            facts = {"client": _leg(clients[1]), "upstream": _leg(far)}
        connection = proxy.wait_for("connection", 1 if audit["why"] else 2)
        proxy.child.send_signal(signal.SIGTERM)
        lines = {"connection": connection, "metrics": proxy.wait_for("metrics"), "start": proxy.wait_for("start")}
    return {**facts, **lines, "upstream_syn": upstream_syn, "round_trips_ns": _summary(round_trips), "audit": audit}


def _watched(
    client: socket.socket, listener: socket.socket, exchange: socket.socket, proxy: _Proxy, watch: LegWatch
) -> Dict[str, Any]:
    """A connection with a few orders, for so long that a clock shows. Captured, therefore not timed."""
    with contextlib.closing(watch):
        if watch.why:
            return watch.facts()
        with _connected(client, listener, exchange) as far:
            for number in range(_WATCHED_ORDERS):
                _there_and_back(client, far, number)
                watch.take()
                time.sleep(_WATCHED_S / _WATCHED_ORDERS)
        claimed = proxy.wait_for("connection")["upstream_timestamps"]
        return {**watch.facts(), "claimed": claimed}


@contextlib.contextmanager
def _connected(client: socket.socket, listener: socket.socket, exchange: socket.socket) -> Iterator[socket.socket]:
    """Connect the client; tsproxy's connection to the exchange for it. Both are closed when the block ends."""
    client.settimeout(_PATIENCE_S)
    client.connect(listener.getsockname())
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with client, _accepted(exchange) as far:
        yield far


def _accepted(exchange: socket.socket) -> socket.socket:
    """tsproxy's connection to the exchange."""
    if not _readable(exchange.fileno(), _PATIENCE_S):
        raise Trouble("tsproxy made no connection to the exchange")
    far, _ = exchange.accept()
    far.settimeout(_PATIENCE_S)
    far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return far


def _orders(client: socket.socket, far: socket.socket) -> List[int]:
    """Send orders, one at a time, for two seconds; how many nanoseconds each took there and back."""
    took: List[int] = []
    end = time.monotonic() + _TRADING_S
    while time.monotonic() < end:
        took.append(_there_and_back(client, far, len(took)))
    return took


def _there_and_back(client: socket.socket, far: socket.socket, number: int) -> int:
    """How many nanoseconds an order took."""
    order = f"8=FIX.4.4|35=D|34={number:09d}|55=TSPX|54=1|38=100|".ljust(ORDER_BYTES, "x").encode()
    begun = time.monotonic_ns()
    client.sendall(order)
    far.sendall(_exactly(far))
    if _exactly(client) != order:
        raise Trouble(f"order {number} did not come back as it was sent")
    return time.monotonic_ns() - begun


def _exactly(sock: socket.socket) -> bytes:
    data = sock.recv(ORDER_BYTES, socket.MSG_WAITALL)
    if len(data) != ORDER_BYTES:
        raise Trouble("the connection ended in the middle of an order")
    return data


def _leg(sock: socket.socket) -> Dict[str, Any]:
    """What this end's TCP_INFO says of its leg, and its two addresses."""
    ends = [str(from_sockaddr(sock.family, name)) for name in (sock.getsockname(), sock.getpeername())]
    return {**sockets.tcp_info(sock)._asdict(), "here": ends[0], "there": ends[1]}


def _summary(took: List[int]) -> Dict[str, Any]:
    ordered = sorted(took)
    if not ordered:
        raise Trouble("no order came back in time")
    share = {name: ordered[int(part * (len(ordered) - 1))] for name, part in (("p50", 0.5), ("p99", 0.99))}
    return {**share, "count": len(ordered)}


# The proxy


class _Proxy:
    """A tsproxy process, and its JSON lines as they come."""

    def __init__(self, child: Child, output: int, errors: int) -> None:
        self._output, self._errors = output, errors
        self._lines: List[Line] = []
        self._rest = b""
        self.child = child

    def wait_for(self, event: str, which: int = 1) -> Line:
        """The first line of that event, or the second one. Trouble, with what it says instead, if it ends without."""
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            found = [line for line in self._lines if line["event"] == event]
            if len(found) >= which:
                return found[which - 1]
            self._read(deadline - time.monotonic())

    def _read(self, patience_s: float) -> None:
        data = os.read(self._output, 1 << 16) if _readable(self._output, patience_s) else b""
        if not data:
            raise Trouble(f"tsproxy said no more: {self._complaint()}")
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._lines += [json.loads(line) for line in lines]

    def _complaint(self) -> str:
        said = os.read(self._errors, 4096) if _readable(self._errors, 0) else b""
        lines = said.decode("utf-8", "replace").strip().splitlines()
        begin = f"{program.name(_script())}: "
        return lines[0 if lines[0].startswith(begin) else -1].replace(begin, "", 1) if lines else "no reason given"


@contextlib.contextmanager
def _proxy(listener: socket.socket, target: str, mode: str) -> Iterator[_Proxy]:
    """The same program as this one, relaying from the listener to the target; gone when the block ends."""
    words = ["--target", target, f"--timestamps={mode}", "--workers=1", "--max-connections=4", "--metrics-interval=0"]
    output, errors = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        _become_tsproxy(listener.fileno(), output[1], errors[1], words)
    child = Child(pid)
    os.close(output[1])
    os.close(errors[1])
    try:
        yield _Proxy(child, output[0], errors[0])
    finally:
        child.terminate(_GRACE_S)
        os.close(output[0])
        os.close(errors[0])


def _become_tsproxy(listener: int, output: int, errors: int, words: List[str]) -> None:
    """Never returns: becomes tsproxy with the listener handed over as sd_listen_fds(3) says, and dies with its parent."""
    try:
        namespaces.set_parent_death_signal(signal.SIGKILL)
        # Out of each other's way first: any of them may have the number that another is to get.
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (os.open(os.devnull, os.O_RDONLY), output, errors, listener)]
        for number, fd in enumerate(high):
            os.dup2(fd, number)
            os.close(fd)
        handover = {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid()), "LISTEN_FDNAMES": "demo"}
        command = [sys.executable, *_flags(), _script(), *words]
        os.execve(sys.executable, command, {**systemd.without_handover(os.environ), **handover})  # noqa: S606 -- no shell wanted
    except BaseException as problem:
        os.write(2, f"can't start {sys.executable}: {problem}\n".encode("utf-8", "backslashreplace"))
    finally:
        os._exit(127)


def _flags() -> List[str]:
    """The interpreter's options that decide what it imports, as they were given to us."""
    given = (("-I", sys.flags.isolated), ("-S", sys.flags.no_site), ("-B", sys.flags.dont_write_bytecode))
    return [flag for flag, is_given in given if is_given]


def _script() -> str:
    """What runs here: tsproxy.py, the bundle, or the installed command."""
    return os.path.abspath(sys.modules["__main__"].__file__ or "")


def _readable(fd: int, patience_s: float) -> bool:
    """poll(2), since a descriptor may be beyond what select(2) can take."""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(max(0.0, patience_s) * 1000))
