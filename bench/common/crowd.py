"""Clients that come, say something and leave in any way, and a local user who floods the loopback. Each is a process's work."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import select
import socket
import struct
import time
from typing import Dict, List, Set, Tuple

from common.networks import Network

_NOBODY = 65534
_LISTEN = "0A"  # include/net/tcp_states.h, as /proc/net/tcp shows it
_LINGER_ZERO = struct.pack("ii", 1, 0)
_PATIENCE_S = 8.0
_PACE_S = 0.005
_CLOSES = ("close", "close", "shut", "reset")


class Clients:
    """Some at the same time, each for a moment, until `end` on CLOCK_MONOTONIC."""

    def __init__(self, network: Network, port: int, seed: str, count: int, end: float) -> None:
        self._network, self._address = network, ("127.0.0.1", port)
        self._chance, self._count, self._end = random.Random(seed), count, end
        self._live: List[Tuple[float, socket.socket]] = []

    def run(self) -> Dict[str, int]:
        """How many came."""
        self._network.go_there()
        made = 0
        while time.monotonic() < self._end:
            if len(self._live) < self._count:
                made += self._come()
            self._tend()
            time.sleep(_PACE_S)  # the pace of it
        for _, client in self._live:
            client.close()
        return {"clients": made}

    def _come(self) -> int:
        client = socket.socket()
        client.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            client.connect(self._address)
        self._live.append((time.monotonic() + self._chance.expovariate(3), client))
        return 1

    def _tend(self) -> None:
        """Each may say something; whose time has come leaves."""
        now, kept = time.monotonic(), []
        for until, client in self._live:
            with contextlib.suppress(OSError):
                if self._chance.random() < 0.05:
                    client.send(self._chance.randbytes(self._chance.choice((1, 10, 1000, 20000))))
            with contextlib.suppress(OSError):
                client.recv(65536)
            if until > now:
                kept.append((until, client))
            else:
                self._leave(client)
        self._live = kept

    def _leave(self, client: socket.socket) -> None:
        how = self._chance.choice(_CLOSES)
        if how == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
        elif how == "shut":
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_WR)
                select.select([client], [], [], 0.02)
        client.close()

    def ask(self) -> bool:
        """Whether one client gets an echo."""
        self._network.go_there()
        with socket.create_connection(self._address, _PATIENCE_S) as client:
            client.sendall(b"order")
            return client.recv(5) == b"order"


def flood(network: Network, seed: int, end: float) -> Dict[str, int]:
    """Connect to all that listens on loopback, and to any address and port there, as fast as it goes, without any right."""
    network.go_there()
    os.setgroups([])
    os.setresgid(_NOBODY, _NOBODY, _NOBODY)
    os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    chance, made, found, look = random.Random(seed), 0, [], 0.0
    while time.monotonic() < end:
        if time.monotonic() > look:
            found, look = sorted(listening()), time.monotonic() + 0.2
        aims = [
            *found,
            (f"127.{chance.randrange(256)}.{chance.randrange(256)}.{chance.randrange(1, 255)}", chance.randrange(1, 65536)),
        ]
        for aim in [*aims, ("::1", chance.randrange(1, 65536))]:
            made += _knock(aim, chance.random() < 0.5)
    return {"floods": made}


def _knock(address: Tuple[str, int], is_reset: bool) -> int:
    """Connect and leave."""
    with socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET) as client:
        client.setblocking(False)
        if is_reset:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
        return int(client.connect_ex(address) in (0, errno.EINPROGRESS))


def listening() -> Set[Tuple[str, int]]:
    """The loopback addresses of this thread's namespace where somebody listens (proc(5), /proc/net/tcp)."""
    found = set()
    for name, host in (("tcp", "127.0.0.1"), ("tcp6", "::1")):
        with open(f"/proc/thread-self/net/{name}") as file:
            rows = [line.split() for line in list(file)[1:]]
        found |= {(host, int(row[1].rsplit(":", 1)[1], 16)) for row in rows if row[3] == _LISTEN}
    return found
