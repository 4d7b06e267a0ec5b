"""What the tests stand on: real processes, real sockets, waits with a deadline and no sleeps."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, NoReturn, Optional, Sequence, Tuple

import pytest
from hypothesis import settings

SUPPORT = Path(__file__).resolve().parent
ROOT = SUPPORT.parent.parent
CHECKOUT = [sys.executable, str(ROOT / "tsproxy.py")]
PATIENCE = float(os.environ.get("TSPROXY_TEST_PATIENCE", "20"))  # seconds; an emulated CPU needs more
Line = Dict[str, Any]


def leave_out(message: str) -> NoReturn:
    """Skip, loudly, what can't run on this machine; in CI, which brings what it needs, that is a failure."""
    if os.environ.get("CI"):
        pytest.fail(f"LOUD: {message}")
    pytest.skip(f"LOUD: {message}")


def examples(thorough: int) -> int:
    """Of a property: that many for a thorough run, fewer for a first look, by the profile that hypothesis has loaded."""
    return max(1, thorough * settings.default.max_examples // 100)


def wait_until(predicate: Callable[[], Any], what: str = "", deadline: float = PATIENCE, pace: float = 0.005) -> Any:
    """The predicate's first true value; AssertionError when it does not come in time."""
    end = time.monotonic() + deadline
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"did not happen within {deadline:g} s: {what or predicate}")
        time.sleep(pace)  # the pace of looking, not a guess at how long it takes


class Proxy:
    """A running tsproxy: its lines as they come, its port, its process."""

    def __init__(self, command: Sequence[str], *options: str, cwd: Optional[Path] = None, **popen: Any) -> None:
        self.command = [*command, *options]
        self.process = subprocess.Popen(
            self.command,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=popen.pop("stdout", subprocess.PIPE),
            stderr=popen.pop("stderr", subprocess.PIPE),
            **popen,
        )
        self.lines: List[Line] = []
        self._came: queue.Queue[Optional[bytes]] = queue.Queue()
        self._threads = []
        if self.process.stdout:
            self._threads.append(threading.Thread(target=self._read, name=f"lines-{self.process.pid}", daemon=True))
            self._threads[-1].start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self._came.put(line)
        self._came.put(None)

    def _take(self, timeout: float) -> bool:
        """Take one more line; False at the end of the output."""
        line = self._came.get(timeout=max(0.001, timeout))
        if line is None:
            self._came.put(None)
            return False
        assert len(line) <= 4096, f"{len(line)} bytes: {line!r}"
        self.lines.append(json.loads(line))
        return True

    def line(self, event: str, which: Callable[[Line], bool] = lambda _: True, after: int = 0) -> Line:
        """The first line of that event that fits, from line `after` on; waits for it."""
        end = time.monotonic() + PATIENCE
        seen = after
        while True:
            for line in self.lines[seen:]:
                if line["event"] == event and which(line):
                    return line
            seen = len(self.lines)
            try:
                more = self._take(end - time.monotonic())
            except queue.Empty:
                more = False
            if not more:
                raise AssertionError(f"no such {event!r} line; exit {self.process.poll()}; lines: {self.lines[-20:]}")

    def told(self) -> str:
        """The lines that have come until now, without the histograms; for people."""
        with contextlib.suppress(queue.Empty, ValueError, AssertionError):
            while self._take(0.001):
                pass
        shown = [{name: value for name, value in line.items() if "_us_le_" not in name} for line in self.lines[-50:]]
        return "\n".join([" ".join(self.command), *map(json.dumps, shown)])

    def count(self, event: str) -> int:
        return sum(line["event"] == event for line in self.lines)

    @property
    def address(self) -> Tuple[str, int]:
        start = self.line("start")
        return start["listen_address"], start["listen_port"]

    def metrics(self) -> Line:
        """A `metrics` line made now."""
        self.line("start")  # before it the signal would still have its default action
        while not self._came.empty():
            if not self._take(1):
                break
        before = len(self.lines)
        self.process.send_signal(signal.SIGUSR1)
        return self.line("metrics", after=before)

    def wait_metrics(self, predicate: Callable[[Line], bool], what: str = "") -> Line:
        found: List[Line] = []

        def fits() -> bool:
            found.append(self.metrics())
            return predicate(found[-1])

        try:
            wait_until(fits, what or "metrics")
        except AssertionError as late:
            raise AssertionError(f"{late}; {found[-1:]}; lines: {self.lines[-5:]}") from None
        return found[-1]

    def wait_lines(self, without_line: int = 0) -> Line:
        """Wait until each accepted connection has its line: the counters are ahead of the lines. The `metrics` line then.

        `without_line`: how many have none, since who would have written it is gone.
        """
        return self.wait_metrics(
            lambda line: bool(self.count("connection") + without_line == line["downstream_cx_total"]),
            "each connection has its line",
        )

    def connect(self, timeout: float = PATIENCE, **options: Any) -> socket.socket:
        client = socket.create_connection(self.address, timeout, **options)
        with contextlib.suppress(OSError):  # it may have been reset already: the test's own calls shall see that
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return client

    def expect_reset(self, **options: Any) -> None:
        """A new client is reset: while it connects, or when it first reads."""
        try:
            with self.connect(**options) as client:
                data = client.recv(1)
        except ConnectionResetError:
            return
        raise AssertionError(f"no reset, but {data!r}")

    def expect_end(self) -> None:
        """A new client is reset or sees the end of file, and gets nothing."""
        with contextlib.suppress(ConnectionResetError), self.connect() as client:
            assert client.recv(1) == b""

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Signal it, wait for its end and its last lines; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        code = self.process.wait(PATIENCE)
        if self._threads:
            while self._take(PATIENCE):
                pass
        return code

    def stderr(self) -> str:
        assert self.process.stderr
        return self.process.stderr.read().decode()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for thread in self._threads:
            thread.join()
        for stream in (self.process.stdout, self.process.stderr):
            if stream:
                stream.close()

    # What it and its worker processes hold and use, for tests that look for leaks and for loops that spin

    def family(self) -> List[int]:
        """The main process and all that came from it."""
        found = [self.process.pid]
        for pid in found:
            found += children(pid)
        return found

    def fds(self) -> int:
        return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in self.family())

    def rss_kib(self) -> int:
        statuses = [Path(f"/proc/{pid}/status").read_text() for pid in self.family()]
        return sum(int(status.split("VmRSS:")[1].split()[0]) for status in statuses)

    def cpu_seconds(self) -> float:
        stats = [Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split() for pid in self.family()]
        return sum(int(fields[11]) + int(fields[12]) for fields in stats) / os.sysconf("SC_CLK_TCK")


def children(pid: int) -> List[int]:
    """The processes that a process has started and not yet reaped; none of one that is gone."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def lives(pid: int) -> bool:
    """Whether there is such a process, and it is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def of_threads(pids: Iterable[int], name: str) -> List[str]:
    """The text of /proc/PID/task/TID/NAME of each thread, but for those that end meanwhile (ENOENT, or ESRCH by read(2))."""
    texts = []
    for task in [task for pid in pids for task in Path(f"/proc/{pid}/task").iterdir()]:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            texts.append((task / name).read_text())
    return texts


def statuses(proxy: Proxy) -> List[Dict[str, str]]:
    """/proc/PID/task/TID/status of each thread of each process that came from it."""
    texts = of_threads(proxy.family(), "status")
    return [{name: value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())} for text in texts]


def pause(pid: int) -> None:
    """SIGSTOP, and wait: another thread of the process may run on for a moment after kill(2) has returned."""

    def is_stopped() -> bool:
        return all(stat.rpartition(")")[2].split()[0] == "T" for stat in of_threads([pid], "stat"))

    os.kill(pid, signal.SIGSTOP)
    wait_until(is_stopped, f"process {pid} is stopped")


class Exchange:
    """The far end: a listener whose accepted connections are the test's to serve, or served by a handler in threads."""

    def __init__(
        self,
        handler: Optional[Callable[[socket.socket], None]] = None,
        host: str = "127.0.0.1",
        backlog: int = 128,
        port: int = 0,
    ) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.listener = socket.create_server((host, port), family=family, backlog=backlog)
        self.host, self.port = host, self.listener.getsockname()[1]
        self.target = f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"
        self._handler = handler
        self._threads: List[threading.Thread] = []
        self._open: List[socket.socket] = []
        if handler:
            self._spawn(self._serve)

    def _spawn(self, work: Callable[..., None], *args: Any) -> None:
        thread = threading.Thread(target=work, args=args, name="exchange", daemon=True)
        thread.start()
        self._threads.append(thread)

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            self._open.append(client)
            self._spawn(self._handle, client)

    def _handle(self, client: socket.socket) -> None:
        assert self._handler
        with contextlib.suppress(OSError), client:
            self._handler(client)

    def accept(self, timeout: float = PATIENCE) -> socket.socket:
        self.listener.settimeout(timeout)
        client, _ = self.listener.accept()
        client.settimeout(timeout)
        self._open.append(client)
        return client

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self.listener.close()
        for accepting in self._threads[:1]:
            accepting.join(PATIENCE)  # whom it has accepted last is known then, and sees the end like all others
        for client in self._open:
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(PATIENCE)
        for client in self._open:
            client.close()


def echo(client: socket.socket) -> None:
    """Send back what comes; pass the end of it on."""
    buffer = memoryview(bytearray(65536))
    while received := client.recv_into(buffer):
        client.sendall(buffer[:received])
    client.shutdown(socket.SHUT_WR)
    while client.recv_into(buffer):
        pass


def reset(sock: socket.socket) -> None:
    """Close with RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sock.close()


def receive_all(sock: socket.socket) -> bytes:
    """All bytes up to the end of file."""
    return b"".join(iter(lambda: sock.recv(1 << 16), b""))


def receive_exactly(sock: socket.socket, count: int) -> bytes:
    """`count` bytes, or fewer at the end of file."""
    parts: List[bytes] = []
    while count and (part := sock.recv(min(count, 1 << 16))):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def free_port() -> int:
    """A port that nobody has now, for a listener of later on, or for a target that refuses.

    It is none that the kernel chooses by itself (ip_local_port_range): of those, a neighbour's next socket may get the one
    that was free a moment ago.
    """
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        with socket.socket(socket.AF_INET6) as probe, contextlib.suppress(OSError):
            probe.bind(("::", random.SystemRandom().randrange(first // 2, first) if first > 4096 else 0))
            return int(probe.getsockname()[1])


def pythons() -> Iterator[Tuple[str, str]]:
    """(version, path) of each CPython from 3.9 on that this machine has, the running one included."""
    places = [Path.home() / ".pyenv/versions", Path("/opt/python")]
    found = {f"{sys.version_info[0]}.{sys.version_info[1]}": sys.executable}
    candidates = [p for place in places if place.is_dir() for p in sorted(place.glob("*/bin/python3"))]
    candidates += [Path(d) / f"python3.{minor}" for minor in range(9, 20) for d in ("/usr/bin", "/usr/local/bin")]
    for path in candidates:
        if not path.exists():
            continue
        code = "import sys; print('%d.%d' % sys.version_info[:2])"
        version = subprocess.run([str(path), "-c", code], capture_output=True, text=True, check=False).stdout.strip()
        if version and tuple(map(int, version.split("."))) >= (3, 9):
            found.setdefault(version, str(path))
    yield from sorted(found.items(), key=lambda item: tuple(map(int, item[0].split("."))))


def fill(sock: socket.socket) -> int:
    """Send until nothing more fits for a while; how much went."""
    sock.settimeout(0.3)
    sent = 0
    with contextlib.suppress(socket.timeout):
        while True:
            sent += sock.send(bytes(1 << 16))
    sock.settimeout(20)
    return sent


def choke(proxy: Proxy, sock: socket.socket) -> int:
    """Send until the proxy has paused reading and nothing more fits; how much went. One stall alone may be the machine's."""
    sent = [0]

    def is_choked() -> bool:
        sent.append(fill(sock))
        metrics = proxy.metrics()
        return not sent[-1] and any(value for name, value in metrics.items() if name.endswith("paused_reading_total"))

    wait_until(is_choked, "the proxy has paused reading")
    return sum(sent)


def target(fd: Path) -> str:
    """What a descriptor of another process is; "" if it has just been closed."""
    with contextlib.suppress(FileNotFoundError):
        return os.readlink(fd)
    return ""


def first_free(pid: int, sockets: int) -> int:
    """The lowest free descriptor of a process, once it has no more sockets than its own (listeners, an inbox)."""
    fds = Path(f"/proc/{pid}/fd")
    wait_until(lambda: sum("socket:" in target(fd) for fd in fds.iterdir()) == sockets, "its connections are closed")
    used = {int(fd.name) for fd in fds.iterdir()}
    return next(number for number in range(1000) if number not in used)


@contextlib.contextmanager
def asking(clients: List[socket.socket]) -> Iterator[None]:
    """Each client sends an order and waits for its echo, again and again."""
    ended = threading.Event()

    def ask() -> None:
        while not ended.is_set():
            for client in clients:
                client.sendall(b"order")
                assert receive_exactly(client, 5) == b"order"

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
