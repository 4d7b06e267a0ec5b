"""A connect storm, as programs of their own, so that it has a core of its own: an exchange, and clients that never rest.

storm.py exchange HOST       prints its port, answers each order of a storm and closes first; echoes whatever else comes
storm.py clients HOST PORT   connects, exchanges, verifies, again and again, until standard input ends; then prints JSON

The exchange closes first: TIME_WAIT takes no local port from the next connection.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import sys
import threading
import time
from typing import Any, Dict, List

_THREADS = 6
_SIZE = 32
_PATIENCE_S = 15


class Storm:
    """What all clients together have seen."""

    def __init__(self, address: Any) -> None:
        self.address = address
        self.served = 0
        self.slowest_s = 0.0
        self.failures: List[str] = []
        self.ending = False

    def rage(self) -> None:
        """One client's life."""
        while not self.ending:
            began = time.monotonic()
            try:
                self._trade()
                self.served += 1
            except (OSError, AssertionError) as problem:
                self.failures.append(repr(problem))
            self.slowest_s = max(self.slowest_s, time.monotonic() - began)

    def _trade(self) -> None:
        order = os.urandom(_SIZE)
        with socket.create_connection(self.address, _PATIENCE_S) as client:
            client.sendall(order)
            answer = b""
            while part := client.recv(_SIZE):
                answer += part
        assert answer == order, f"lost: {len(answer)} of {_SIZE} bytes came back"

    def report(self) -> Dict[str, Any]:
        """What the test reads."""
        return {"served": self.served, "slowest_s": round(self.slowest_s, 3), "failures": self.failures}


def clients(host: str, port: int) -> None:
    """Rage until standard input ends."""
    storm = Storm((host, port))
    threads = [threading.Thread(target=storm.rage) for _ in range(_THREADS)]
    for thread in threads:
        thread.start()
    sys.stdin.buffer.read()
    storm.ending = True
    for thread in threads:
        thread.join()
    print(json.dumps(storm.report()))


def exchange(host: str) -> None:
    """Serve until killed."""
    listener = socket.create_server((host, 0), backlog=4096)
    print(listener.getsockname()[1], flush=True)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                selector.register(listener.accept()[0], selectors.EVENT_READ)
            elif _answered(key.fileobj) in {0, _SIZE}:
                selector.unregister(key.fileobj)
                key.fileobj.close()  # type: ignore[union-attr]


def _answered(client: Any) -> int:
    """How many bytes came and went; 0 at the end, also where it failed: the other side tells the failure."""
    try:
        order = client.recv(_SIZE)
        client.sendall(order)
    except OSError:
        return 0
    return len(order)


if __name__ == "__main__":
    if sys.argv[1] == "exchange":
        exchange(*sys.argv[2:])
    else:
        clients(sys.argv[2], int(sys.argv[3]))
