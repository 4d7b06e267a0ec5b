"""What all fault tests share: a host of the test's own, an exchange that errs when told to, and the look at what is left.

Every fault happens within `stand.unharmed(proxy)`. Before it the proxy has served, and it is noted what it holds; after
it everything must be as before: later connections are served, nothing is open, no descriptor, thread or memory is left
over, it sleeps, and what was received was acknowledged or counted as discarded.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import itertools
import os
import socket
import subprocess
import threading
from pathlib import Path
from typing import Any, Callable, Counter, Iterator, List, NamedTuple, Tuple

from harness import PATIENCE, Exchange, Line, Proxy, echo, of_threads, receive_exactly, reset, wait_until
from namespaces import Namespace
from program import RUNTIME, checkout_alone, python_for, slow_but

# Each runtime and each form once; the one that `auto` takes on the Python at hand for a first look.
WAYS = ["threads from checkout", "processes from bundle", "interpreters from checkout"]
EACH = slow_but([way for way in WAYS if way.startswith(RUNTIME)], WAYS)

CROWD = 20
IDLE = 0.01  # of one CPU
WATCHED_S = 0.25
ROUNDS = 8  # of asking, more than there are workers
GROWTH_KIB = 1024
ANSWER = bytes(range(256)) * 256
BULK = 16 << 20

Ends = Counter[Tuple[str, str]]


# The exchange


def play(client: socket.socket) -> None:
    """Do what the client's first byte asks for."""
    part = _PARTS.get(receive_exactly(client, 1))
    if part:
        part(client)


def keep_silent(client: socket.socket) -> None:
    """Take everything, answer nothing."""
    while client.recv(1 << 16):
        pass


def break_off(client: socket.socket) -> None:
    """Reset in the middle of the answer."""
    client.sendall(ANSWER)
    client.recv(1)  # the client says that it has got it: a reset would throw away what is under way
    reset(client)


def close_half(client: socket.socket) -> None:
    """Answer and close that direction at once; hear the other one out, to its end."""
    client.sendall(ANSWER)
    client.shutdown(socket.SHUT_WR)
    keep_silent(client)


def pour(client: socket.socket) -> None:
    """More than all buffers between hold, and the end."""
    block = ANSWER * 16
    for _ in range(BULK // len(block)):
        client.sendall(block)


_PARTS = {b"e": echo, b"s": keep_silent, b"r": break_off, b"h": close_half, b"p": pour}
BULK_DIGEST = hashlib.sha256(ANSWER * (BULK // len(ANSWER))).hexdigest()


# What a proxy holds


class Held(NamedTuple):
    """What a proxy and its processes hold."""

    fds: int
    threads: int
    rss_kib: int


def held(proxy: Proxy) -> Held:
    tasks = [task for pid in proxy.family() for task in Path(f"/proc/{pid}/task").iterdir()]
    return Held(proxy.fds(), len(tasks), proxy.rss_kib())


def cpu_ns(pids: List[int]) -> int:
    """Time on a CPU of all threads of these processes; schedstat counts nanoseconds where stat counts ticks."""
    return sum(int(text.split()[0]) for text in of_threads(pids, "schedstat"))


def lowest_free(pid: int) -> int:
    """The number that a process's next descriptor will have."""
    used = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    return next(number for number in itertools.count() if number not in used)


def share_of_cpu(proxy: Proxy) -> float:
    """How much of one CPU it takes while nobody wants anything of it. AssertionError if it ends meanwhile."""
    pids = proxy.family()
    before = cpu_ns(pids)
    with contextlib.suppress(subprocess.TimeoutExpired):
        raise AssertionError(f"it ended with {proxy.process.wait(WATCHED_S)}")
    return (cpu_ns(pids) - before) / 1e9 / WATCHED_S


def sleeps(proxy: Proxy) -> None:
    """It comes to rest, however busy the machine is meanwhile: a loop that spins never does."""
    shares: List[float] = []
    # Below 0 is a thread that ended meanwhile, and took its time along.
    wait_until(lambda: shares.append(share_of_cpu(proxy)) or 0 <= shares[-1] < IDLE, "idle below 1 % of a CPU")


def are_kept_at_rest(proxy: Proxy, clients: List[socket.socket]) -> None:
    """Nobody says anything: they cost nothing, are not ended, and end well when the clients shut down."""
    sleeps(proxy)
    assert proxy.metrics()["downstream_cx_active"] == len(clients)
    for client in clients:
        client.shutdown(socket.SHUT_WR)
    assert [fate_of(client) for client in clients] == [Fate(b"", False)] * len(clients)


# The stand


class Stand:
    """A namespace with an exchange in it, and proxies of one runtime and form."""

    def __init__(self, command: List[str], runtime: str, host: Namespace) -> None:
        self.command, self.runtime, self.host = command, runtime, host
        with host:
            self.exchange = Exchange(play, backlog=4096)
        self._proxies: List[Proxy] = []

    def start(self, *options: str, target: str = "", wrap: Tuple[str, ...] = (), **popen: Any) -> Proxy:
        """A proxy under the default policy, strip; `wrap` are words to start it with."""
        command = [*self.host.enter, *wrap, *self.command]
        words = ["-t", target or self.exchange.target, "-p0", "--metrics-interval=0", f"--runtime={self.runtime}"]
        if not any(option.startswith("--workers") for option in options):
            words.append("--workers=2")
        self._proxies.append(Proxy(command, *words, *options, **popen))
        return self._proxies[-1]

    def connect(self, proxy: Proxy, **options: Any) -> socket.socket:
        with self.host:
            return proxy.connect(**options)

    def crowd(self, proxy: Proxy, saying: bytes = b"") -> List[Client]:
        """Many clients, each of which has said something; what they see is for fate_of()."""
        address = proxy.address
        with self.host:
            clients = [Client() for _ in range(CROWD)]
        for client in clients:
            client.begin(address, saying)
        return clients

    def ask(self, proxy: Proxy) -> None:
        """One client that is served."""
        with self.connect(proxy) as client:
            client.sendall(b"e" + b"order")
            assert receive_exactly(client, 5) == b"order"

    @contextlib.contextmanager
    def rule(self, text: str) -> Iterator[None]:
        """An nftables rule for what comes in on this host, for so long."""
        chain = f"chain in {{ type filter hook input priority 0; {text}; }}"
        self.host.run("nft", "-f", "-", input=f"table inet fault {{ {chain}; }}")
        try:
            yield
        finally:
            self.host.run("nft", "delete", "table", "inet", "fault")

    def no_syn_arrives(self) -> contextlib.AbstractContextManager[None]:
        """The exchange's host drops what would make a connection."""
        return self.rule(f"tcp dport {self.exchange.port} tcp flags & (syn | ack) == syn drop")

    @contextlib.contextmanager
    def unharmed(
        self, proxy: Proxy, *, without_line: int = 0, growth_kib: int = GROWTH_KIB, spare_fds: int = 0
    ) -> Iterator[None]:
        """See the module. `without_line`: how many connections have no line, since who would have written it is gone.

        `growth_kib` and `spare_fds` are for what a worker keeps for the next time (buffers, pipes), if it needed many.
        """
        self._serve_some(proxy)
        wait_until(self.is_quiet, "nothing is open")
        before = held(proxy)
        yield
        self._serve_some(proxy)
        conserved(proxy, without_line)
        wait_until(lambda: held(proxy).fds - before.fds <= spare_fds, f"descriptors as before: {before}, {held(proxy)}")
        assert held(proxy).threads == before.threads
        assert held(proxy).rss_kib - before.rss_kib < growth_kib
        sleeps(proxy)

    def _serve_some(self, proxy: Proxy) -> None:
        for _ in range(ROUNDS):
            self.ask(proxy)
        proxy.wait_metrics(lambda line: line["downstream_cx_active"] == line["upstream_cx_active"] == 0)

    def is_quiet(self) -> bool:
        """Whether no connection of this host is open, by its kernel (states LISTEN and TIME_WAIT, tcp_states.h)."""
        with self.host, open("/proc/thread-self/net/tcp") as file:
            return {line.split()[3] for line in list(file)[1:]} <= {"0A", "06"}

    def close(self) -> None:
        for proxy in self._proxies:
            proxy.close()
        self.exchange.close()


def conserved(proxy: Proxy, without_line: int = 0) -> Line:
    """Each connection has its line, and what was received was acknowledged or counted as lost. The metrics' line."""
    metrics = proxy.wait_lines(without_line)
    received = metrics["downstream_cx_rx_bytes_total"] + metrics["upstream_cx_rx_bytes_total"]
    sent = metrics["downstream_cx_tx_bytes_total"] + metrics["upstream_cx_tx_bytes_total"]
    lines = [line for line in proxy.lines if line["event"] == "connection"]
    lost = sum(line["discarded_bytes"] + line["unacknowledged_bytes"] for line in lines)
    # A worker that was killed leaves no line, and what it had not yet seen acknowledged.
    assert received >= sent + lost if without_line else received == sent + lost
    assert metrics["internal_errors_total"] == metrics["log_lines_dropped_total"] == 0
    return metrics


def ends(proxy: Proxy) -> Ends:
    """How often each (reason, termination_state) but the good one has come, once all connections have ended."""
    if proxy.process.poll() is None:
        proxy.wait_lines()
    lines = [line for line in proxy.lines if line["event"] == "connection" and line["reason"] != "closed"]
    return collections.Counter((line["reason"], line["termination_state"]) for line in lines)


def make_stand(way: str, bundle: Path) -> Iterator[Stand]:
    """For the fixture `stand`; `way` is one of WAYS."""
    runtime, form = way.split(" from ")
    script = bundle if form == "bundle" else checkout_alone(bundle)
    with contextlib.closing(Namespace(tcp_timestamps="0")) as host:
        with contextlib.closing(Stand([python_for(runtime), "-I", "-S", str(script)], runtime, host)) as stand:
            yield stand


# Clients


class Fate(NamedTuple):
    """What one client saw."""

    answer: bytes
    was_reset: bool


class Client(socket.socket):
    """Remembers a reset that came while it connected or spoke: the kernel tells it once."""

    was_reset = False

    def begin(self, address: Tuple[str, int], saying: bytes) -> None:
        self.settimeout(PATIENCE)
        try:
            self.connect(address)
            self.sendall(saying)
        except (ConnectionResetError, BrokenPipeError):
            self.was_reset = True


def fate_of(client: Client) -> Fate:
    """Read to the end, and close."""
    got = b""
    with client:
        try:
            while data := client.recv(1 << 16):
                got += data
        except ConnectionResetError:
            client.was_reset = True
    return Fate(got, client.was_reset)


RESET = Fate(b"", True)


@contextlib.contextmanager
def storm(stand: Stand, proxy: Proxy, threads: int = 2) -> Iterator[Counter[str]]:
    """Clients that connect, ask and leave, again and again; how many saw what, by word."""
    seen: Counter[str] = collections.Counter()
    over, counting = threading.Event(), threading.Lock()
    address = proxy.address

    def run(ask: Callable[[], str]) -> None:
        with stand.host:
            while not over.is_set():
                what = ask()
                with counting:  # of two threads that count the first of a word, one would be lost: __missing__() is Python
                    seen[what] += 1

    workers = [threading.Thread(target=run, args=(lambda: ask_once(address),)) for _ in range(threads)]
    for worker in workers:
        worker.start()
    try:
        yield seen
    finally:
        over.set()
        for worker in workers:
            worker.join()


def ask_once(address: Tuple[str, int]) -> str:
    """What one client saw: served, reset, cut (an end of file instead of the answer) or refused."""
    try:
        with socket.create_connection(address, 20) as client:
            client.sendall(b"e" + b"order")
            return "served" if receive_exactly(client, 5) == b"order" else "cut"
    except ConnectionRefusedError:
        return "refused"
    except (ConnectionResetError, BrokenPipeError):
        return "reset"
