"""A restart that nobody notices: an old and a new instance overlap, under a storm of clients of which none may be lost."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import resource
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Iterator, List, Sequence, Tuple

import pytest
from _tsproxy.linux import reuseport
from _tsproxy.linux.reuseport import Tables
from _tsproxy.supervisor.handoff import ReuseportHandoff
from handover import HAND_OVER, listeners
from harness import CHECKOUT, Exchange, Proxy, echo, free_port, receive_exactly, wait_until
from harness import target as opened
from namespaces import Namespace
from program import RUNTIME, RUNTIMES, Start, python_for, slow_but
from routed import RoutedProxy, Sections
from storms import Storm, far_end
from wire import ADDRESSES, DOWNSTREAM, join

RESTARTS = 3


@contextlib.contextmanager
def storm(address: Tuple[str, int], enter: Sequence[str] = ()) -> Iterator[None]:
    """Two processes full of clients meanwhile; not one of them may have been refused, reset, or answered wrongly."""
    storms = [Storm(address, enter) for _ in range(2)]
    try:
        yield
        reports = [one.end() for one in storms]
    finally:
        for one in storms:
            one.close()
    assert [report["failures"] for report in reports] == [[], []]


def leaves(proxy: Proxy) -> None:
    """It drains to the last connection, and ends well."""
    assert proxy.stop() == 0, (proxy.stderr(), [line for line in proxy.lines if line["level"] != "info"])
    assert proxy.line("stop")["drained"]


def served(proxy: Proxy) -> int:
    return int(proxy.metrics()["downstream_cx_total"])


def stormed(proxy: Proxy) -> None:
    """Wait until the storm has come to it."""
    wait_until(lambda: served(proxy) >= 50, "the storm has come")


@pytest.fixture(
    params=slow_but([f"{RUNTIME} 1", f"{RUNTIME} 2"], [f"{kind} {workers}" for kind in RUNTIMES for workers in (1, 2)])
)
def command(request: pytest.FixtureRequest, bundle: Path) -> List[str]:
    """tsproxy under one runtime, on a Python that has it. One worker accepts by itself."""
    kind, workers = request.param.split()
    return [python_for(kind), "-I", "-S", str(bundle), f"--runtime={kind}", f"--workers={workers}"]


def options(target: str) -> List[str]:
    return ["-t", target, "--timestamps=preserve", "--metrics-interval=0", "--connection-log=off"]


@pytest.fixture
def run() -> Iterator[Callable[..., Proxy]]:
    """Start a proxy and wait until it is ready."""
    with contextlib.ExitStack() as stack:

        def begin(words: Sequence[str], *more: str, **popen: Any) -> Proxy:
            proxy = Proxy(words, *more, **popen)
            stack.callback(proxy.close)
            proxy.line("start")
            return proxy

        yield begin


def test_an_overlap_by_reuse_port_loses_no_client_of_a_storm(command: List[str], run: Any) -> None:
    with far_end() as target:
        old = run(command, *options(target), "--reuse-port", "-p0")
        port = old.address[1]
        with storm(old.address):
            for _ in range(RESTARTS):
                stormed(old)
                new = run(command, *options(target), "--reuse-port", f"-p{port}")
                leaves(old)
                old = new


def test_the_new_one_can_be_taken_back_without_a_loss(run: Any) -> None:
    with far_end() as target:
        old = run(CHECKOUT, *options(target), "--reuse-port", "-p0")
        with storm(old.address):
            new = run(CHECKOUT, *options(target), "--reuse-port", f"-p{old.address[1]}")
            stormed(new)
            leaves(new)
        leaves(old)


def test_an_overlap_with_the_listener_that_systemd_holds_loses_no_client_of_a_storm(command: List[str], run: Any) -> None:
    with far_end() as target, listeners(1) as socks:
        fd = socks[0].fileno()
        words = [sys.executable, "-c", HAND_OVER, str(fd), *command, *options(target)]
        activated = functools.partial(run, words, env={**os.environ, "LISTEN_FDS": "1"}, pass_fds=(fd,))
        old = activated()
        with storm(old.address):
            for _ in range(RESTARTS):
                stormed(old)
                new = activated()
                leaves(old)
                old = new


def test_stop_then_start_with_the_listener_that_systemd_holds_lets_clients_wait_and_loses_none(run: Any) -> None:
    with far_end() as target, listeners(1) as socks:
        fd = socks[0].fileno()
        words = [sys.executable, "-c", HAND_OVER, str(fd), *CHECKOUT, *options(target)]
        activated = functools.partial(run, words, env={**os.environ, "LISTEN_FDS": "1"}, pass_fds=(fd,))
        proxy = activated()
        with storm(proxy.address):
            for _ in range(RESTARTS):
                stormed(proxy)
                leaves(proxy)
                proxy = activated()


# Where the handshake takes time, it is not enough to accept what is queued


class Wan:
    """Clients in one namespace, the proxies and the exchange in another."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.clients, self.host = (stack.enter_context(contextlib.closing(Namespace())) for _ in range(2))
        join(self.clients, self.host, DOWNSTREAM, 0)
        self.ip = f"{ADDRESSES[4][0]}2"
        self.words = [*self.host.enter, *CHECKOUT]

    def shape(self, namespace: Namespace, rate: str) -> None:
        """A slow line with a queue before it: packets wait in it for as long as others need (tc-tbf(8))."""
        line = ["tc", "qdisc", "add", "dev", DOWNSTREAM, "root", "tbf", "rate", rate, "burst", "2kb", "limit", "1mb"]
        namespace.run(*line)


@pytest.fixture
def wan() -> Iterator[Wan]:
    with contextlib.ExitStack() as stack:
        yield Wan(stack)


@pytest.mark.root
@pytest.mark.parametrize("workers", ["--workers=1", "--workers=2"])
def test_a_slow_wire_loses_no_client_of_a_storm(wan: Wan, run: Any, workers: str) -> None:
    for namespace in (wan.clients, wan.host):
        wan.shape(namespace, "1mbit")
    with far_end(enter=wan.host.enter) as target:
        begin = functools.partial(run, wan.words, *options(target), "--reuse-port", f"--bind={wan.ip}", workers)
        old = begin("-p0")
        with storm(old.address, wan.clients.enter):
            for _ in range(RESTARTS):
                stormed(old)
                new = begin(f"-p{old.address[1]}")
                stormed(new)
                leaves(old)
                old = new


HOLD_BACK = "table ip late { chain out { type filter hook output priority 0; tcp flags & (syn | ack) == ack drop; }; }"


@contextlib.contextmanager
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    """Where systemd would listen for state messages."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(20)
        yield sock


@pytest.mark.root
def test_clients_whose_last_step_of_the_handshake_is_late_are_still_served(wan: Wan, run: Any, tmp_path: Path) -> None:
    with far_end(enter=wan.host.enter) as target, manager(tmp_path) as notify, contextlib.ExitStack() as stack:
        begin = functools.partial(run, wan.words, *options(target), "--reuse-port", f"--bind={wan.ip}")
        old = begin("-p0", env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")})
        begin(f"-p{old.address[1]}")
        wan.clients.run("nft", "-f", "-", input=HOLD_BACK)
        with wan.clients:  # by the hash of their ports, half of them belong to the old one
            clients = [stack.enter_context(socket.create_connection(old.address, 20)) for _ in range(24)]
        old.process.send_signal(signal.SIGTERM)
        wait_until(lambda: b"STOPPING" in notify.recv(4096), "it is on its way out")
        wan.clients.run("nft", "delete", "table", "ip", "late")
        for client in clients:
            client.sendall(b"late")
            assert receive_exactly(client, 4) == b"late"
            client.close()
        assert old.wait() == 0
        served_by_old = old.line("metrics")["downstream_cx_total"]
        assert 0 < served_by_old < len(clients)


# What is left behind


def test_after_one_has_detached_the_others_share_the_port_as_before(start: Start, echoing: Exchange) -> None:
    first = start(echoing, "--reuse-port")
    port = first.address[1]
    second, third = (start(echoing, "--reuse-port", f"-p{port}") for _ in range(2))
    for proxy in (second, third):
        proxy.line("start")
    leaves(first)
    fourth = start(echoing, "--reuse-port", f"-p{port}")
    sharing = [second, third, fourth]
    fourth.line("start")
    for _ in range(90):
        with fourth.connect() as client:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
    assert all(served(proxy) > 5 for proxy in sharing), [served(proxy) for proxy in sharing]


def test_the_only_listener_on_a_port_detaches_at_once(start: Start, echoing: Exchange) -> None:
    proxy = start(echoing, "--reuse-port", "--drain-timeout=10")
    with proxy.connect() as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        proxy.process.send_signal(signal.SIGTERM)
        proxy.line("drain")
        with pytest.raises(ConnectionRefusedError):
            proxy.connect()


# Files of routes: those that both instances have


@pytest.fixture
def run_routed(tmp_path: Path) -> Iterator[Callable[..., RoutedProxy]]:
    """Start one of several instances, each with a file of its own, and wait until it is ready."""
    with contextlib.ExitStack() as stack:
        numbers = itertools.count()

        def begin(words: Sequence[str], sections: Sections, *more: str, is_ready: bool = True) -> RoutedProxy:
            file = tmp_path / f"routes-{next(numbers)}.ini"
            proxy = RoutedProxy(words, file, sections, "--reuse-port", "--connection-log=off", *more)
            stack.callback(proxy.close)
            if is_ready:
                proxy.line("start")
            return proxy

        yield begin


def test_an_overlap_with_another_file_of_routes_loses_no_client_of_those_that_both_have(
    command: List[str], run_routed: Any
) -> None:
    """One is changed, one has another name, one goes, one comes."""
    with far_end() as target:
        orders, quotes, gone = ({"target": target, "port": free_port()} for _ in range(3))
        changed, new = {**orders, "idle-timeout": 9}, {"target": target, "port": 0}
        files = [{"orders": orders, "quotes": quotes, "gone": gone}, {"orders": changed, "renamed": quotes, "new": new}]
        old = run_routed(command, files[0])
        with storm(("127.0.0.1", orders["port"])), storm(("127.0.0.1", quotes["port"])):
            for turn in range(1, 3):
                stormed(old)
                new_one = run_routed(command, files[turn % 2])
                leaves(old)
                old = new_one
        leaves(old)


def test_a_start_that_fails_costs_the_instance_that_serves_no_client(run_routed: Any) -> None:
    """Though the port of one of its routes is shared, and it fails late: for another route's port, and for its target."""
    with far_end() as target, socket.create_server(("127.0.0.1", 0)) as other:
        orders = {"target": target, "port": free_port()}
        taken, circle = {"target": target, "port": other.getsockname()[1]}, {"target": f"127.0.0.1:{orders['port']}", "port": 0}
        old = run_routed(CHECKOUT, {"orders": orders}, "--workers=1")
        with storm(("127.0.0.1", orders["port"])):
            stormed(old)
            for code, second in 2 * [(69, taken), (2, circle)]:
                new = run_routed(CHECKOUT, {"orders": orders, "second": second}, is_ready=False)
                assert new.wait() == code
        leaves(old)


@pytest.mark.root
@pytest.mark.parametrize("comes_again", [False, True])
def test_a_route_that_a_reload_takes_from_one_of_two_instances_loses_no_client(
    comes_again: bool, wan: Wan, run_routed: Any
) -> None:
    """Some of those whose handshake is under way are its own. If it comes again meanwhile, its listener is the same."""
    with far_end(enter=wan.host.enter) as target, contextlib.ExitStack() as stack:
        kept, shared = ({"target": target, "port": 0, "bind": wan.ip} for _ in range(2))
        going = run_routed(wan.words, {"kept": kept, "shared": shared})
        port = going.port("shared")
        again = {"kept": kept, "again": {**shared, "port": port}}
        staying = run_routed(wan.words, {"shared": again["again"]})
        wan.clients.run("nft", "-f", "-", input=HOLD_BACK)
        with wan.clients:  # by the hash of their ports, half of them belong to the first one
            clients = [stack.enter_context(socket.create_connection((wan.ip, port), 20)) for _ in range(24)]
        assert going.good({"kept": kept}) == [0, 1, 0, 1]
        if comes_again:
            assert going.good(again) == [1, 0, 0, 1]
            assert listeners_of(going, port) == 1
        wan.clients.run("nft", "delete", "table", "ip", "late")
        for client in clients:
            client.sendall(b"late")
            assert receive_exactly(client, 4) == b"late"
            client.close()
        before = served(staying)
        assert 0 < before < len(clients)
        wait_until(lambda: listeners_of(going, port) == comes_again, "what is not needed is closed")
        for _ in range(24):
            with wan.clients, socket.create_connection((wan.ip, port), 20) as client:
                client.sendall(b"last")
                assert receive_exactly(client, 4) == b"last"
        assert (served(staying) < before + 24) == comes_again
        leaves(going)
        leaves(staying)


def listeners_of(proxy: Proxy, port: int) -> int:
    """How many sockets of the process itself listen on a port of IPv4."""
    pid = proxy.process.pid
    rows = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    inodes = {f"socket:[{row[9]}]" for row in rows if row[3] == "0A" and row[1].endswith(f":{port:04X}")}
    return sum(opened(fd) in inodes for fd in Path(f"/proc/{pid}/fd").iterdir())


@pytest.mark.root
def test_a_port_that_a_reload_has_bound_after_user_is_shared_by_the_next_start(run_routed: Any) -> None:
    """The kernel shares a port among sockets of one user alone: that one is not root's, as those of the start are."""
    with contextlib.ExitStack() as stack:
        readable = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        readable.chmod(0o755)
        far = stack.enter_context(contextlib.closing(Exchange(echo)))
        first, second = ({"target": far.target, "port": free_port()} for _ in range(2))
        words = [*CHECKOUT, "--user=nobody", "--reuse-port", "--workers=1"]
        old = stack.enter_context(contextlib.closing(RoutedProxy(words, readable / "old.ini", {"first": first})))
        assert old.good({"first": first, "second": second}) == [1, 0, 0, 1]
        both = {"first": first, "second": second}
        new = stack.enter_context(contextlib.closing(RoutedProxy(words, readable / "new.ini", both)))
        new.line("start")
        leaves(old)
        for name in both:
            new.ask(name)
        leaves(new)


def test_reuse_port_and_an_inherited_listener_contradict() -> None:
    with listeners(1) as socks:
        fd = socks[0].fileno()
        words = [sys.executable, "-c", HAND_OVER, str(fd), *CHECKOUT, *options("127.0.0.1:9"), "--reuse-port"]
        proxy = Proxy(words, env={**os.environ, "LISTEN_FDS": "1"}, pass_fds=(fd,))
    try:
        assert proxy.wait() == 2
        assert proxy.stderr().startswith("tsproxy.py: --reuse-port: given with LISTEN_FDS")
    finally:
        proxy.close()


# The group of listeners itself


def member(family: int, port: int = 0) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", port))
    sock.listen(64)
    return sock


@pytest.fixture(params=[socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"])
def group(request: pytest.FixtureRequest) -> Iterator[Callable[[int], List[socket.socket]]]:
    """Make so many listeners on one port."""
    with contextlib.ExitStack() as stack:

        def make(count: int) -> List[socket.socket]:
            made = [stack.enter_context(member(request.param))]
            port = made[0].getsockname()[1]
            return made + [stack.enter_context(member(request.param, port)) for _ in range(count - 1)]

        yield make


def clients_of(listener: socket.socket) -> List[socket.socket]:
    """Take all that have come."""
    found = []
    with contextlib.suppress(BlockingIOError):
        while True:
            found.append(listener.accept()[0])
    return found


def come(stack: contextlib.ExitStack, listener: socket.socket, count: int = 30) -> List[int]:
    """The ports of so many clients, which are connected."""
    clients = [stack.enter_context(socket.create_connection(listener.getsockname()[:2], 10)) for _ in range(count)]
    return [client.getsockname()[1] for client in clients]


def counted(stack: contextlib.ExitStack, group: List[socket.socket], count: int = 30) -> List[int]:
    """So many clients come: how many of them come to each. (One of before may be late.)"""
    ports, found = set(come(stack, group[0], count)), [0 for _ in group]

    def all_there() -> bool:
        for place, listener in enumerate(group):
            for client in clients_of(listener):
                found[place] += client.getpeername()[1] in ports
                client.close()
        return sum(found) == count

    wait_until(all_there, "every client has come to somebody")
    return found


def test_a_member_knows_how_many_there_are_and_whether_it_is_the_newest(group: Any) -> None:
    one, two, three = group(3)
    assert [Tables().group_of(sock) for sock in (one, two, three)] == [(3, False), (3, False), (3, True)]
    one.close()
    two.close()
    assert Tables().group_of(three) == (1, True)


def test_clients_are_sent_to_the_named_place_and_anywhere_when_there_is_none(group: Any) -> None:
    three = group(3)
    with contextlib.ExitStack() as stack:
        for place in range(3):
            reuseport.detach(three[0], place)
            assert counted(stack, three)[place] == 30
        reuseport.detach(three[0], 3)
        assert 0 not in counted(stack, three, 90)
        reuseport.detach(three[0], 1)
        reuseport.attach(three[2])
        assert 0 not in counted(stack, three, 90)


def left(stack: contextlib.ExitStack, leaving: ReuseportHandoff, peer: socket.socket) -> None:
    """Clients go on coming until it has left."""

    def has_left() -> bool:
        come(stack, peer, 2)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.close(leaving.accept4()[0])
        if not leaving.has_left:
            leaving.check(Tables())
        return leaving.has_left

    wait_until(has_left, "it has left")


@pytest.mark.parametrize("which", [0, 1, 2])
def test_no_client_comes_to_a_listener_that_has_detached(group: Any, which: int) -> None:
    members = group(3)
    going = members.pop(which)
    with contextlib.ExitStack() as stack:
        left(stack, ReuseportHandoff(going, True, Tables()), members[0])
        for sock in members:
            for client in clients_of(sock):
                client.close()
        assert sum(counted(stack, members)) == 30
        assert clients_of(going) == []


@pytest.mark.parametrize("which", [0, 1])
def test_a_member_finds_out_that_it_is_itself_at_the_place_that_it_named(group: Any, which: int) -> None:
    first, *members = group(3)
    first.close()  # the last takes its place: the order is no longer that of joining
    going = members.pop(which)
    with contextlib.ExitStack() as stack:
        left(stack, ReuseportHandoff(going, True, Tables()), members[0])
        for client in clients_of(members[0]):
            client.close()
        assert counted(stack, members) == [30]
        assert clients_of(going) == []


def test_nobody_is_sent_away_by_a_listener_that_may_not_share(group: Any) -> None:
    two = group(2)
    assert ReuseportHandoff(two[0], False, Tables()).has_left
    with contextlib.ExitStack() as stack:
        assert 0 not in counted(stack, two, 60)


def test_a_look_at_handshakes_without_a_descriptor_is_repeated(group: Any) -> None:
    two, tables = group(2), Tables()
    leaving = ReuseportHandoff(two[0], True, tables)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    deadline = time.monotonic() + 0.05
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        while time.monotonic() < deadline:
            leaving.check(Tables())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not leaving.has_left
    with contextlib.ExitStack() as stack:
        left(stack, leaving, two[1])


@pytest.mark.root
@pytest.mark.parametrize("family, host", [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_both_ways_to_see_who_is_in_the_handshake_agree(family: int, host: str) -> None:
    with contextlib.closing(Namespace()) as namespace, contextlib.ExitStack() as stack:
        namespace.run("nft", "-f", "-", input=HOLD_BACK.replace("table ip ", "table inet "))
        with namespace:
            listener, other = (
                stack.enter_context(socket.create_server((host, 0), family=socket.AddressFamily(family))) for _ in range(2)
            )
            ask, read = reuseport._ask_half_open, reuseport._read_half_open
            assert ask(family) == read(family) == {}
            assert (looked := Tables()).half_open(other) == frozenset()
            clients = [stack.enter_context(socket.create_connection(listener.getsockname()[:2], 20)) for _ in range(3)]
            also = stack.enter_context(socket.create_connection(other.getsockname()[:2], 20))
            ports, all_clients = [sock.getsockname()[1] for sock in (listener, other)], [clients, [also]]
            peers = [{client.getsockname()[1] for client in some} for some in all_clients]
            assert ask(family) == read(family) == dict(zip(ports, peers))
            assert Tables().half_open(listener) == peers[0]
            assert looked.half_open(listener) == frozenset()  # one look is for all listeners
