"""What a soak sends through a relay: every kind of connection that there is, each of them verified to the last byte.

Clients and far end are processes full of threads. What they count is in shared memory; what went wrong goes into a pipe.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import socket
import threading
import time
from typing import Callable, Dict, List, NamedTuple, Sequence

from common.load import Sample, percentile
from common.talk import HEADER_SIZE, Plan, Talk, Wrong, client_side, far_side

_KIB, _MIB = 1 << 10, 1 << 20
_BACKLOG = 4096
_LOOK_S = 5.0  # how soon it is noticed that the parent was killed
_LONGEST = 3000  # of a complaint: a write of up to 4,096 bytes to a pipe stays in one piece (pipe(7))


def _orders(rng: random.Random, seed: int) -> Plan:
    message = rng.randint(16, 512)
    total = message * rng.randint(20, 400)
    return Plan(seed, total, total, message=message)


def _upload(rng: random.Random, seed: int) -> Plan:
    return Plan(seed, rng.randint(_MIB, 8 * _MIB), rng.randint(0, 4 * _KIB))


def _download(rng: random.Random, seed: int) -> Plan:
    return Plan(seed, rng.randint(0, 4 * _KIB), rng.randint(_MIB, 8 * _MIB))


def _dripped(rng: random.Random, seed: int) -> Plan:
    return Plan(seed, rng.randint(0, 4 * _KIB), rng.randint(100 * _KIB, 200 * _KIB))


def _both_ways(rng: random.Random, seed: int) -> Plan:
    return Plan(seed, rng.randint(_MIB, 4 * _MIB), rng.randint(_MIB, 4 * _MIB))


def _short(rng: random.Random, seed: int) -> Plan:
    size = rng.randint(1, 2000)
    return Plan(seed, size, size)


def _half_closed(rng: random.Random, seed: int) -> Plan:
    return Plan(seed, rng.randint(0, _MIB), rng.randint(1, _MIB), after_eof=True)


def _aborted(rng: random.Random, seed: int) -> Plan:
    return Plan(seed, rng.randint(0, 2 * _MIB), rng.randint(0, 2 * _MIB), client_resets=True)


def _aborted_by_far_end(rng: random.Random, seed: int) -> Plan:
    up, down = rng.randint(1, 2 * _MIB), rng.randint(1, 2 * _MIB)
    return Plan(seed, up, down, far_resets_at=rng.randint(0, up + down - 1))


# Each is as frequent as its weight in _WEIGHTS says.
KINDS: Dict[str, Callable[[random.Random, int], Plan]] = {
    "orders": _orders,
    "upload": _upload,
    "download": _download,
    "both ways": _both_ways,
    "short": _short,
    "half-closed": _half_closed,
    "client aborts": _aborted,
    "far end aborts": _aborted_by_far_end,
    "slow reader": _download,
    "drip-fed reader": _dripped,
    "silent visit": _short,
}
_WEIGHTS = (20, 4, 4, 3, 80, 6, 6, 6, 2, 1, 12)
USER_TIMEOUT_MS = 500  # what the relay shall be told: a drip-fed reader does not read for longer, and is alive
_DRIP_S = 0.8
_PROBE_BYTES, _PROBE_PAUSE_S = 100, 0.005
_PROBED = {"p50": 0.5, "p99": 0.99, "max": 1.0}
_COUNTS = ("connected", "client_sent", "client_received", "far_sent", "far_received")
NAMES = (*KINDS, *_COUNTS)


class Tally(NamedTuple):
    """A row of counters for each process, in memory that forks share; and the flag that ends the traffic."""

    words: memoryview
    owner: int  # the process that made it

    @classmethod
    def create(cls, processes: int) -> Tally:
        """All zero."""
        return cls(memoryview(mmap.mmap(-1, 8 * (1 + processes * len(NAMES)))).cast("Q"), os.getpid())

    @property
    def is_over(self) -> bool:
        """Whether the traffic is to end; it does, too, when the owner is killed."""
        return bool(self.words[0]) or self.is_orphaned

    @property
    def is_orphaned(self) -> bool:
        """In a child: whether the owner is gone."""
        return os.getppid() != self.owner

    def end(self) -> None:
        """End the traffic: what has begun is finished."""
        self.words[0] = 1

    def again(self) -> None:
        """Let there be traffic again."""
        self.words[0] = 0

    def totals(self) -> Dict[str, int]:
        """All rows added up."""
        return {name: sum(self.words[1 + place :: len(NAMES)]) for place, name in enumerate(NAMES)}


class Scribe:
    """What the threads of one process write: its row, and complaints."""

    def __init__(self, tally: Tally, row: int, complaints: int) -> None:
        start = 1 + row * len(NAMES)
        self._row, self._complaints = tally.words[start : start + len(NAMES)], complaints
        self._lock = threading.Lock()
        self._place = {name: place for place, name in enumerate(NAMES)}

    def add(self, name: str, count: int = 1) -> None:
        """Count."""
        with self._lock:
            self._row[self._place[name]] += count

    def log_ratelimited(self, where: str, what: object) -> None:
        """Something that a relay must not do."""
        try:
            os.write(self._complaints, json.dumps(f"{where}: {what}"[:_LONGEST]).encode() + b"\n")
        except BlockingIOError:
            pass  # the pipe is full of complaints already


class Load(NamedTuple):
    """One client process. Each connection goes to one of the ports."""

    ports: Sequence[int]
    seed: str
    threads: int
    tally: Tally
    row: int
    complaints: int

    def run(self) -> None:
        """Until the traffic is over."""
        scribe = Scribe(self.tally, self.row, self.complaints)
        clients = [
            Client(self.ports, random.Random(f"{self.seed}/{self.row}/{number}"), scribe) for number in range(self.threads)
        ]
        threads = [threading.Thread(target=client.run, args=(self.tally,)) for client in clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


class Client:
    """One connection after the other, of a kind that chance chooses."""

    def __init__(self, ports: Sequence[int], rng: random.Random, scribe: Scribe) -> None:
        self.ports, self.rng, self.scribe = ports, rng, scribe

    def run(self, tally: Tally) -> None:
        """Until the traffic is over."""
        while not tally.is_over:
            kind = self.rng.choices(list(KINDS), _WEIGHTS)[0]
            plan = KINDS[kind](self.rng, self.rng.getrandbits(63))
            try:
                self.connect(kind, plan)
            except OSError as problem:
                self.scribe.log_ratelimited(kind, f"can't connect: {problem}")
                time.sleep(0.1)
            self.scribe.add(kind)

    def connect(self, kind: str, plan: Plan) -> None:
        """One connection, to its end. OSError if it can't be made."""
        with socket.socket() as sock:
            sock.connect(("127.0.0.1", self.rng.choice(self.ports)))
            self.scribe.add("connected")
            if kind != "silent visit":
                self._talk(kind, plan, sock)

    def _talk(self, kind: str, plan: Plan, sock: socket.socket) -> None:
        talk = client_side(sock, plan)
        if kind in ("slow reader", "drip-fed reader"):
            talk.piece, talk.pause_s = 1 << 15, 0.01 if kind == "slow reader" else _DRIP_S
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 15)
        if plan.client_resets:
            talk.resets_at = self.rng.randint(0, max(0, plan.up + plan.down - 1))
        try:
            sock.sendall(plan.encode())
            self.scribe.add("client_sent", HEADER_SIZE)
            _converse(talk, plan, kind, self.scribe)
        finally:
            self.scribe.add("client_sent", talk.out.at)
            self.scribe.add("client_received", talk.into.at)


class Probe(NamedTuple):
    """A client process that measures: from connect(2) to the last byte of a short answer, again and again."""

    load: Load

    def run(self) -> Sample:
        """Until the traffic is over."""
        scribe = Scribe(self.load.tally, self.load.row, self.load.complaints)
        client = Client(self.load.ports, random.Random(f"{self.load.seed}/probe"), scribe)
        took: List[int] = []
        while not self.load.tally.is_over:
            began = time.monotonic_ns()
            try:
                client.connect("short", Plan(client.rng.getrandbits(63), _PROBE_BYTES, _PROBE_BYTES))
            except OSError as problem:
                scribe.log_ratelimited("probe", f"can't connect: {problem}")
            took.append(time.monotonic_ns() - began)
            scribe.add("short")
            time.sleep(_PROBE_PAUSE_S)
        took.sort()
        return {f"probe_us_{name}": percentile(took, share) / 1000 for name, share in _PROBED.items()} if took else {}


def _converse(talk: Talk, plan: Plan, where: str, scribe: Scribe) -> None:
    """Talk; whatever ends it that the plan does not provide for is a complaint."""
    try:
        talk.run()
    except Wrong as problem:
        scribe.log_ratelimited(where, problem)
    except OSError as problem:
        if plan.ends_well:
            scribe.log_ratelimited(
                where, f"{problem}; sent {talk.out.at} of {talk.out.total}, received {talk.into.at} of {talk.into.total}"
            )


class FarEnd(NamedTuple):
    """One process of the far end."""

    listener: socket.socket
    tally: Tally
    row: int
    complaints: int

    def run(self) -> None:
        """Serve each connection in a thread of its own, until killed, or the parent was."""
        scribe = Scribe(self.tally, self.row, self.complaints)
        self.listener.settimeout(_LOOK_S)
        while not self.tally.is_orphaned:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                continue  # reset while it waited, or nobody came
            sock.settimeout(None)
            threading.Thread(target=_serve, args=(sock, scribe), daemon=True).start()


def _serve(sock: socket.socket, scribe: Scribe) -> None:
    with sock:
        try:
            header = sock.recv(HEADER_SIZE, socket.MSG_WAITALL)
        except OSError:
            return  # a client that left at once
        scribe.add("far_received", len(header))
        if len(header) == HEADER_SIZE:
            _answer(sock, Plan.decode(header), scribe)
        elif header:
            scribe.log_ratelimited("far end", f"an end of file after {len(header)} of {HEADER_SIZE} bytes of the header")


def _answer(sock: socket.socket, plan: Plan, scribe: Scribe) -> None:
    talk = far_side(sock, plan)
    try:
        _converse(talk, plan, "far end", scribe)
    finally:
        scribe.add("far_sent", talk.out.at)
        scribe.add("far_received", talk.into.at)


def listen() -> socket.socket:
    """The far end's listener."""
    return socket.create_server(("127.0.0.1", 0), backlog=_BACKLOG)


def told(complaints: int) -> List[str]:
    """What has been complained of since the last time; `complaints` is the pipe's other end, non-blocking."""
    found = b""
    try:
        while piece := os.read(complaints, 1 << 16):
            found += piece
    except BlockingIOError:
        pass
    return [json.loads(line) for line in found.splitlines()]
