"""`audit --interface`: live, in namespaces of its own: tunnels through the kernel's filter, Ctrl-C, drops, rights."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import captures
import pytest
from captures import WRAPPED, ether, segment
from common.segments import SYN
from fake_clock import FakeClock
from harness import CHECKOUT, PATIENCE, Exchange, echo, pause, receive_exactly, wait_until
from namespaces import Namespace
from pty_session import PtySession
from unprivileged import BECOME, as_nobody
from wire import UPSTREAM, join

pytestmark = pytest.mark.root
FULL = 128 << 20  # bytes: what setsockopt(2) makes of 64 MiB (socket(7)). What comes then is dropped


class Live:
    """`audit --interface=NAME --json` in a namespace; it watches once this is made."""

    def __init__(self, namespace: Namespace, interface: str, *options: str, **popen: Any) -> None:
        command = [*namespace.enter, *CHECKOUT, "audit", f"--interface={interface}", "--json", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **popen)
        with namespace:
            self._index = socket.if_nametoindex(interface)
        wait_until(lambda: self.queued is not None, "it watches the interface")

    @property
    def queued(self) -> Any:
        """Bytes in its packet socket's queue (/proc/net/packet); None before it is bound."""
        table = Path(f"/proc/{self.process.pid}/net/packet").read_text().splitlines()[1:]
        rows = [line.split() for line in table]
        return next((int(row[6]) for row in rows if int(row[4]) == self._index), None)

    def end(self, number: int = signal.SIGINT) -> Tuple[int, List[Dict[str, Any]], Dict[str, Any]]:
        self.process.send_signal(number)
        out, err = self.process.communicate(
            timeout=3 * PATIENCE
        )  # what is queued, some 50,000 frames in one test, is read first
        assert err == "", err
        *flows, end = map(json.loads, out.splitlines())
        return self.process.returncode, flows, end

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()


@pytest.fixture
def pair() -> Iterator[Tuple[Namespace, Namespace]]:
    """Two namespaces, and a veth between them that has the same name on both ends."""
    with contextlib.closing(Namespace()) as one, contextlib.closing(Namespace()) as other:
        join(one, other, UPSTREAM, 1)
        yield one, other


@contextlib.contextmanager
def sending(namespace: Namespace, interface: str = UPSTREAM) -> Iterator[socket.socket]:
    """A socket that sends whole Ethernet frames."""
    with namespace:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    with sock:
        sock.bind((interface, 0))
        yield sock


@contextlib.contextmanager
def seeing(namespace: Namespace, last: bytes) -> Iterator[Callable[[], None]]:
    """A function that waits until this frame has come: what was sent before it has then been seen by every packet socket."""
    with namespace:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    with sock:
        sock.bind((UPSTREAM, 3))
        sock.settimeout(PATIENCE)

        def wait() -> None:
            while sock.recv(2048) != last:
                pass

        yield wait


@contextlib.contextmanager
def watching(namespace: Namespace, interface: str, *options: str, **popen: Any) -> Iterator[Live]:
    live = Live(namespace, interface, *options, **popen)
    try:
        yield live
    finally:
        live.close()


def test_each_wrapping_comes_through_the_kernels_filter_and_what_holds_no_tcp_does_not(
    pair: Tuple[Namespace, Namespace],
) -> None:
    wrapped = [frame for name, frame in WRAPPED.items() if name != "SNAP"]  # the kernel's filter knows EtherTypes alone
    without = [captures.OTHERS["ARP"][0], captures.OTHERS["UDP"][0], ether(captures.ipv6(17, captures.udp(53, b"x" * 40)))]
    without += [ether(captures.ipv4(17, captures.udp(4789, bytes(40)), fragment=5)), ether(captures.ipv4(1, bytes(40)))]
    last = captures.OTHERS["ARP"][0] + b"the last one"
    with watching(pair[1], UPSTREAM) as live, sending(pair[0]) as sock, seeing(pair[1], last) as wait_for_the_last:
        for frame in [*wrapped, *without, last]:
            sock.send(frame)
        wait_for_the_last()
        code, flows, end = live.end()
    assert (code, end["verdict"], end["reported_drops"]) == (78, "LEAK", 0)
    assert end["frames"] == end["segments"] == end["segments_with_timestamps"] == len(wrapped)
    assert {flow["source"] for flow in flows} >= {captures.CLIENT[0], captures.CLIENT6[0]}
    assert (end["files"], flows[0]["first_leak_file"], flows[0]["first_leak_frame"]) == (0, UPSTREAM, 1)


def test_what_is_sent_and_what_is_received_is_seen_with_the_kernels_times(pair: Tuple[Namespace, Namespace]) -> None:
    with pair[1]:
        far = Exchange(echo, host="10.2.0.2")
    with contextlib.closing(far), watching(pair[0], UPSTREAM, "-t", far.target) as live:
        with pair[0]:
            client = socket.create_connection(("10.2.0.2", far.port))
        with client:
            begun = time.monotonic()
            for _ in range(4):
                client.sendall(b"order")
                assert receive_exactly(client, 5) == b"order"
                time.sleep(0.05)  # so that the flow has a span
            took = time.monotonic() - begun
            code, flows, end = live.end(signal.SIGTERM)
    assert code == 78 and len(flows) == 1
    assert (flows[0]["source"], flows[0]["destination_port"], flows[0]["syn_seen"]) == ("10.2.0.1", far.port, True)
    assert flows[0]["segments"] == flows[0]["segments_with_timestamps"] >= 6
    assert 0.1 < flows[0]["span_s"] < took + 1
    assert end["judged_to"] == [far.target]


def test_on_loopback_each_segment_is_seen_once() -> None:
    with contextlib.closing(Namespace(tcp_timestamps="0")) as namespace:
        with namespace:
            far = Exchange(echo)
        with contextlib.closing(far), watching(namespace, "lo") as live:
            with namespace:
                client = socket.create_connection(("127.0.0.1", far.port))
            with client:
                client.sendall(b"order")
                assert receive_exactly(client, 5) == b"order"
            code, flows, end = live.end()
    assert (code, end["verdict"], len(flows)) == (0, "CLEAN", 2)
    client_flow = next(flow for flow in flows if flow["syn_seen"])
    assert 3 <= client_flow["segments"] <= 6


def test_packets_that_the_kernel_dropped_are_reported_and_make_no_flow_clean(pair: Tuple[Namespace, Namespace]) -> None:
    frame, last = ether(segment(flags=SYN, payload=bytes(1400))), captures.OTHERS["ARP"][0] + b"the last one"
    with watching(pair[1], UPSTREAM) as live, sending(pair[0]) as sock:
        live.process.send_signal(signal.SIGSTOP)
        while live.queued < FULL:
            for _ in range(1000):
                sock.send(frame)
        with seeing(pair[1], last) as wait_for_the_last:
            for one in (frame, last):
                sock.send(one)
            wait_for_the_last()
        live.process.send_signal(signal.SIGCONT)
        code, flows, end = live.end()
    assert (code, flows[0]["verdict"], end["verdict"]) == (65, "UNDECIDED", "UNDECIDED")
    assert end["reported_drops"] > 0
    assert end["frames"] == flows[0]["segments"] > 1000


def test_frames_that_are_queued_at_the_end_are_read_whatever_time_it_is(
    pair: Tuple[Namespace, Namespace], clock: FakeClock
) -> None:
    """The kernel's times are ahead after a step back; and of the first frames, for which it keeps none yet, they are those of
    recvmsg(2) (net_enable_timestamp() has a work item do it)."""
    clock.step(-3600)
    frame, last = ether(segment(flags=SYN)), captures.OTHERS["ARP"][0] + b"the last one"
    with watching(pair[1], UPSTREAM, env=clock.environment) as live, sending(pair[0]) as sock:
        pause(live.process.pid)
        with seeing(pair[1], last) as wait_for_the_last:
            for one in [frame] * 50 + [last]:
                sock.send(one)
            wait_for_the_last()
        live.process.send_signal(signal.SIGINT)
        code, _, end = live.end(signal.SIGCONT)
    assert (code, end["frames"], end["reported_drops"]) == (0, 50, 0)


def test_seconds_end_the_watch() -> None:
    with contextlib.closing(Namespace()) as namespace:
        begun = time.monotonic()
        command = [*namespace.enter, *CHECKOUT, "audit", "--interface=lo", "--seconds=300ms"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        took = time.monotonic() - begun
    assert (done.returncode, done.stderr) == (65, "")
    assert done.stdout.splitlines()[-1] == "UNDECIDED: no such flow in this capture"
    assert took >= 0.3


def test_on_a_terminal_it_says_how_it_goes_and_ctrl_c_gives_the_verdict(pair: Tuple[Namespace, Namespace]) -> None:
    command = [*pair[1].enter, *CHECKOUT, "audit", f"--interface={UPSTREAM}"]
    with PtySession(command) as session, sending(pair[0]) as sock:
        session.wait_for("0 frames, 0 flows; Ctrl-C for the verdict")
        sock.send(ether(segment(5, SYN)))
        session.wait_for("1 flow; Ctrl-C for the verdict")
        session.press(b"\x03")
        assert session.wait() == 78
        shown = session.wait_for("LEAK: timestamps left 10.1.0.1")
    assert not any("Ctrl-C" in row for row in shown)
    assert b"\x1b[31mLEAK" in session.output


def test_an_interface_that_goes_away_makes_no_flow_clean(pair: Tuple[Namespace, Namespace]) -> None:
    command = [*pair[1].enter, *CHECKOUT, "audit", f"--interface={UPSTREAM}"]
    with PtySession(command) as session, sending(pair[0]) as sock:
        session.wait_for("Ctrl-C for the verdict")
        sock.send(ether(segment(flags=SYN)))
        session.wait_for("1 flow; Ctrl-C for the verdict")
        pair[0].run("ip", "link", "del", UPSTREAM)
        session.press(b"\x03")
        assert session.wait() == 65
        session.wait_for("the interface was down, or went away", "UNDECIDED")


# Rights


def test_without_the_right_to_capture_it_says_what_that_takes_and_ends_with_65(bundle: Path) -> None:
    with contextlib.closing(Namespace()) as namespace, as_nobody(bundle) as command:
        words = [*namespace.enter, *command, "audit", "--interface=lo"]
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (65, "", 1)
    assert "takes CAP_NET_RAW, which uid 65534 does not have" in done.stderr


def test_cap_net_raw_alone_is_enough(bundle: Path) -> None:
    right = ["--inh-caps=+net_raw", "--ambient-caps=+net_raw"]
    with contextlib.closing(Namespace()) as namespace, as_nobody(bundle) as command:
        become = [word for word in BECOME if not word.startswith("--bounding-set")]
        words = [*namespace.enter, *become, *right, *command[len(BECOME) :], "audit", "--interface=lo", "--seconds=0.1"]
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (65, "")
    assert "UNDECIDED" in done.stdout


@pytest.mark.parametrize("name", ["nope0", "", "a-name-that-is-longer-than-any"])
def test_an_interface_that_is_not_there_is_refused_with_those_that_are(name: str) -> None:
    with contextlib.closing(Namespace()) as namespace:
        command = [*namespace.enter, *CHECKOUT, "audit", f"--interface={name}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"tsproxy.py: --interface: given {name!r}; allowed: an interface of this host: lo\n"
