"""Listeners that tsproxy inherits, as systemd hands them over (sd_listen_fds(3))."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from typing import Iterator, List, Sequence

from harness import CHECKOUT, Proxy

HAND_OVER = """
import os, sys
for number, fd in enumerate(map(int, sys.argv[1].split(","))):
    os.dup2(fd, 3 + number)
os.environ.update(LISTEN_PID=str(os.getpid()))
os.execv(sys.argv[2], sys.argv[2:])
"""


def hand_over(listeners: List[socket.socket], *options: str, pass_also: Sequence[int] = (), **environment: str) -> Proxy:
    """A proxy with inherited listeners, at 3 and on."""
    fds = [listener.fileno() for listener in listeners]
    command = [sys.executable, "-c", HAND_OVER, ",".join(map(str, fds)), *CHECKOUT]
    env = {**os.environ, "LISTEN_FDS": str(len(fds)), **environment}
    return Proxy(command, *options, env=env, pass_fds=[*fds, *pass_also])


@contextlib.contextmanager
def listeners(count: int) -> Iterator[List[socket.socket]]:
    """Listening sockets whose numbers do not clash with the places that they are to be put at."""
    made, spare = [], [os.open(os.devnull, os.O_RDONLY) for _ in range(8)]
    try:
        made = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
        yield made
    finally:
        for sock in made:
            sock.close()
        for fd in spare:
            os.close(fd)
