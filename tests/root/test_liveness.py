"""Slow is not dead: a peer that acknowledges is kept however slowly it reads, and one that is gone is noticed in time.

Client, proxy and exchange are hosts of their own. Gone is who neither gets nor sends a packet any more: no reset, no ICMP.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Callable, Iterator, List, Tuple

import pytest
from _tsproxy.linux import sockets, uapi
from _tsproxy.proxy.liveness import Liveness
from harness import ROOT, SUPPORT, Proxy, receive_all, receive_exactly, wait_until
from wire import DOWNSTREAM, UPSTREAM, Wire

pytestmark = pytest.mark.root

TIMEOUT_S = 0.6
MARGIN_S = 3.0  # for a third of the timeout, the second that TCP_RTO_MAX_MS has at least, and a busy machine
MUCH = os.urandom(1 << 20) * 12  # more than all buffers on the way hold
OLDER = "setsockopt:1=6:2=44:ENOPROTOOPT"  # TCP_RTO_MAX_MS, before Linux 6.15
REFUSING = str(SUPPORT / "refusing_launcher.py")
SIDES = pytest.mark.parametrize("side", ["client", "exchange"])


@pytest.fixture
def wire() -> Iterator[Wire]:
    with contextlib.closing(Wire(split=False, sysctl="0")) as made:
        yield made


class Line:
    """One connection over the wire, seen from the side that is slow or gone (`peer`) and from the other."""

    def __init__(self, wire: Wire, side: str, *options: str, wrap: Tuple[str, ...] = (), room: int = 0) -> None:
        """`room` is the receive buffer of the peer."""
        self.wire, self.side = wire, side
        self.was_reset = False
        self.far = wire.far_end(4)
        command = [*wire.clean.enter, *wrap, sys.executable, str(ROOT / "tsproxy.py")]
        words = ["-t", self.far.target, "--metrics-interval=0", "-p0", "-b", wire.listen_address(4), "--workers=1", *options]
        if not any(option.startswith("--user-timeout") for option in options):
            words.append(f"--user-timeout={round(TIMEOUT_S * 1000)}")
        self.proxy = Proxy(command, *words)
        wire._stack.callback(self.proxy.close)
        if room and side == "exchange":
            self.far.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
        with wire.client, contextlib.ExitStack() as undo:
            client = undo.enter_context(socket.socket())
            if room and side == "client":
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
            client.settimeout(20)
            client.connect(self.proxy.address)
            undo.pop_all()
        ends = [client, self.far.accept()]
        self.peer, self.other = ends if side == "client" else ends[::-1]
        wire._stack.callback(client.close)

    @contextlib.contextmanager
    def sending(self, data: bytes, then: Callable[[socket.socket], object] = lambda sock: None) -> Iterator[threading.Thread]:
        """The other side sends to the peer, in a thread."""

        def send() -> None:
            try:
                self.other.sendall(data)
                then(self.other)
            except (ConnectionResetError, BrokenPipeError):
                self.was_reset = True

        thread = threading.Thread(target=send)
        thread.start()
        try:
            yield thread
        finally:
            with contextlib.suppress(OSError):
                self.other.shutdown(socket.SHUT_RDWR)
            thread.join()

    def cut(self) -> float:
        """The peer is gone; when."""
        device = DOWNSTREAM if self.side == "client" else UPSTREAM
        rules = "".join(
            f"chain {hook} {{ type filter hook {hook} priority 0; {which} {device} drop; }}\n"
            for hook, which in (("input", "iifname"), ("output", "oifname"))
        )
        self.wire.rules(f"table inet gone {{\n{rules}}}\n")
        return time.monotonic()

    def is_noticed(self, since: float, at_least_s: float = TIMEOUT_S) -> None:
        line = self.proxy.line("connection")
        took = time.monotonic() - since
        who = "client" if self.side == "client" else "server"
        assert (line["reason"], line["termination_state"]) == (f"{who}_timeout", "CD" if who == "client" else "SD")
        assert at_least_s <= took < at_least_s + MARGIN_S
        assert self.proxy.metrics()["internal_errors_total"] == 0
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):  # the kernel tells it once
            receive_all(self.other)
            wait_until(lambda: self.was_reset, "the sender is told")


def shut(sock: socket.socket) -> None:
    sock.shutdown(socket.SHUT_WR)


def let_pass(seconds: float) -> None:
    """The fault itself lasts so long."""
    threading.Event().wait(seconds)


# Alive


@pytest.mark.parametrize(("side", "zero_copy"), [("client", "auto"), ("exchange", "auto"), ("client", "never")])
def test_a_reader_that_pauses_for_many_user_timeouts_gets_every_byte(wire: Wire, side: str, zero_copy: str) -> None:
    line = Line(wire, side, f"--zero-copy={zero_copy}")
    with line.sending(MUCH, shut):
        let_pass(3 * TIMEOUT_S)
        half = len(MUCH) // 2
        assert receive_exactly(line.peer, half) == MUCH[:half]
        let_pass(3 * TIMEOUT_S)
        assert receive_all(line.peer) == MUCH[half:]
    line.peer.close()
    assert line.proxy.line("connection")["reason"] == "closed"


@SIDES
def test_a_reader_slower_than_one_buffer_a_user_timeout_gets_every_byte(wire: Wire, side: str) -> None:
    line = Line(wire, side, room=4096)
    with line.sending(MUCH[: 8 << 20], shut):
        end, got = time.monotonic() + 6 * TIMEOUT_S, b""
        while time.monotonic() < end:
            got += receive_exactly(line.peer, 512)
            let_pass(TIMEOUT_S / 8)
        line.peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        assert got + receive_all(line.peer) == MUCH[: 8 << 20]
    line.peer.close()
    assert line.proxy.line("connection")["reason"] == "closed"


@SIDES
def test_a_reader_that_pauses_before_the_last_bytes_of_a_closed_connection_gets_them(wire: Wire, side: str) -> None:
    """Both sides have closed: what is left is in the kernel alone, and is neither given up nor taken for delivered."""
    line = Line(wire, side, room=4096)
    data = MUCH[: 32 << 10]
    line.peer.shutdown(socket.SHUT_WR)
    assert line.other.recv(1) == b""
    line.other.sendall(data)
    let_pass(3 * TIMEOUT_S)  # so that probes have been hastened, which an orphan could not bear
    line.other.close()
    let_pass(3 * TIMEOUT_S)
    assert line.proxy.metrics()["downstream_cx_active"] == 1
    assert receive_all(line.peer) == data
    ended = line.proxy.line("connection")
    assert (ended["reason"], ended["discarded_bytes"], ended["unacknowledged_bytes"]) == ("closed", 0, 0)
    assert len(data) in (ended["tx_bytes"], ended["upstream_tx_bytes"])


def test_a_reader_that_pauses_while_the_proxy_drains_gets_every_byte(wire: Wire) -> None:
    line = Line(wire, "client", "--drain-timeout=60")
    with line.sending(MUCH, shut):
        assert receive_exactly(line.peer, 1) == MUCH[:1]
        line.proxy.process.terminate()
        line.proxy.line("drain")
        let_pass(3 * TIMEOUT_S)
        assert receive_all(line.peer) == MUCH[1:]
        line.peer.close()
    assert line.proxy.wait() == 0


@pytest.mark.parametrize("option", ["--idle-timeout=1", "--half-close-timeout=1"])
def test_bytes_that_the_kernel_still_moves_are_no_silence(wire: Wire, option: str) -> None:
    """All of it fits into the kernel's buffers, so that the proxy itself has nothing to do for a long time."""
    line = Line(wire, "client", option, room=4096)
    data = MUCH[: 32 << 10]
    with line.sending(data, shut):
        got, end = b"", time.monotonic() + 3
        while time.monotonic() < end:
            got += receive_exactly(line.peer, 512)
            let_pass(0.05)  # the window opens by some kilobytes at a time
        assert line.proxy.metrics()["downstream_cx_active"] == 1
        assert got + receive_all(line.peer) == data
        line.peer.close()
    assert line.proxy.line("connection")["reason"] == "closed"


THIS_KERNEL: Tuple[str, ...] = ()
BEFORE_615 = (sys.executable, REFUSING, OLDER, "--")


@pytest.mark.parametrize(
    ("side", "wrap"),
    [("client", THIS_KERNEL), ("exchange", THIS_KERNEL), ("client", BEFORE_615)],
    ids=["client", "exchange", "client, before 6.15"],
)
def test_a_window_that_was_closed_for_long_hides_neither_life_nor_death(wire: Wire, side: str, wrap: Tuple[str, ...]) -> None:
    """The kernel doubles the time between probes: after 6 s of a closed window the next one is up to 6 s away."""
    line = Line(wire, side, wrap=wrap)
    with line.sending(MUCH):
        let_pass(6)
        assert line.proxy.metrics()["downstream_cx_active"] == 1
        cut = line.cut()
        connection = line.proxy.line("connection")
        took = time.monotonic() - cut
    assert connection["reason"] == ("client_timeout" if side == "client" else "server_timeout")
    # Before 6.15 a probe comes after 5 s and a step of looks, and it takes two of them.
    assert took < (14 if wrap else MARGIN_S + TIMEOUT_S)


# Gone


@SIDES
def test_a_peer_that_goes_while_data_is_under_way_is_noticed(wire: Wire, side: str) -> None:
    line = Line(wire, side)
    line.other.sendall(b"before")
    assert receive_exactly(line.peer, 6) == b"before"
    cut = line.cut()
    line.other.sendall(b"after")
    line.is_noticed(cut)


@SIDES
def test_a_peer_that_goes_in_mid_stream_is_noticed(wire: Wire, side: str) -> None:
    line = Line(wire, side)
    with line.sending(MUCH * 4) as sending:
        assert receive_exactly(line.peer, len(MUCH)) == MUCH
        line.is_noticed(line.cut(), at_least_s=0)  # the last ACK may be older than the cut
        sending.join()


@SIDES
def test_a_peer_that_goes_with_its_window_closed_is_noticed(wire: Wire, side: str) -> None:
    line = Line(wire, side)
    with line.sending(MUCH) as sending:
        line.proxy.wait_metrics(lambda metrics: bool(metrics["downstream_cx_active"]))
        let_pass(3 * TIMEOUT_S)
        line.is_noticed(line.cut(), at_least_s=0)
        sending.join()


@SIDES
def test_a_peer_that_goes_after_the_others_fin_is_noticed(wire: Wire, side: str) -> None:
    line = Line(wire, side)
    with line.sending(MUCH, shut) as sending:
        assert receive_exactly(line.peer, 1) == MUCH[:1]
        line.is_noticed(line.cut(), at_least_s=0)
        sending.join()


@SIDES
def test_an_idle_peer_that_goes_is_noticed_by_keepalive(wire: Wire, side: str) -> None:
    line = Line(wire, side, "--keepalive=1")
    line.other.sendall(b"before")
    assert receive_exactly(line.peer, 6) == b"before"
    line.is_noticed(line.cut(), at_least_s=1)


def test_with_both_timeouts_off_a_peer_that_goes_is_not_noticed(wire: Wire) -> None:
    line = Line(wire, "client", "--user-timeout=0", "--keepalive=0")
    cut = line.cut()
    line.other.sendall(b"after")
    let_pass(2)
    assert time.monotonic() - cut > 2
    assert line.proxy.metrics()["downstream_cx_active"] == 1


@pytest.mark.parametrize("option", ["this kernel's", "older kernels'"])
def test_what_shortens_the_time_between_probes_is_undone_when_the_peer_reads(
    monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    """An older kernel's own answer: ENOPROTOOPT to an option that it does not know."""
    if option != "this kernel's":
        monkeypatch.setattr(uapi, "TCP_RTO_MAX_MS", 9999)
    tcp = socket.IPPROTO_TCP
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        sink = socket.create_connection(listener.getsockname())
        peer, _ = listener.accept()
    with sink, peer:
        sink.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                sink.send(MUCH)
        wait_until(lambda: not sink.getsockopt(tcp, uapi.TCP_INFO, 28)[24], "nothing under way: the window is closed")
        liveness, stall = Liveness(10_000), None
        before = settings(sink)
        for second in range(0, 60, 3):
            is_dead, stall = liveness.check(sink, stall, second * 10**9)
            assert not is_dead
            if second:
                assert stall
                assert stall.undo
                changed = sink.getsockopt(tcp, stall.undo.number)
                assert 3334 <= changed < 3350 if stall.undo.number == 44 else changed >= second * 1000 + 10_000
        while peer.recv(1 << 20):
            if not sockets.outstanding(sink).any:
                break
        assert liveness.check(sink, stall, 61 * 10**9) == (False, None)
        assert settings(sink) == before


def settings(sock: socket.socket) -> List[int]:
    found = []
    for number in (uapi.TCP_USER_TIMEOUT, 44):
        with contextlib.suppress(OSError):  # before 6.15
            found.append(sock.getsockopt(socket.IPPROTO_TCP, number))
    return found


# What it costs


def test_idle_connections_are_not_looked_at(wire: Wire, tmp_path: Path) -> None:
    """strace(1) sees each TCP_INFO: one look at both ends finds them settled, and no other follows."""
    if not shutil.which("strace"):
        pytest.skip("LOUD: no strace: that an idle connection costs no look is NOT tested here")
    trace = tmp_path / "trace"
    wrap = ("strace", "-D", "-f", "-qq", "-o", str(trace), "-e", "trace=getsockopt")
    line = Line(wire, "client", "--keepalive=0", wrap=wrap)
    line.other.sendall(b"order")
    assert receive_exactly(line.peer, 5) == b"order"

    def looks() -> int:
        return trace.read_text().count("TCP_INFO")

    let_pass(3 * TIMEOUT_S)
    before = looks()
    assert before
    let_pass(3 * TIMEOUT_S)
    assert looks() == before
