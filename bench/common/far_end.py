"""The far end of a relay: what an exchange would be. Processes of their own, on the load's CPU."""

from __future__ import annotations

import contextlib
import os
import select
import socket
from functools import partial
from typing import Callable, Dict, FrozenSet, Iterator

from common.processes import tasks

_BACKLOG = 4096
_BUFFER = 1 << 20
_LOOK_S = 5.0  # how soon it is noticed that the parent was killed

Answer = Callable[[socket.socket], bool]  # takes what came; False at the end of it


@contextlib.contextmanager
def running(answer: Callable[[], Answer], cpus: FrozenSet[int], processes: int = 1, wake_at: int = 1) -> Iterator[int]:
    """Serve every connection with `answer`, until the end of the `with`; the port.

    With `wake_at`, the length of a message, it is not woken for a piece of one (SO_RCVLOWAT, socket(7)).
    """
    with socket.create_server(("127.0.0.1", 0), backlog=_BACKLOG) as listener:
        # What is accepted inherits both. Pieces of an answer must not wait for each other's ACK.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, wake_at)
        listener.setblocking(False)  # several processes may be woken for one connection
        with tasks([partial(_serve, listener, answer)] * processes, cpus):
            yield listener.getsockname()[1]


def echo() -> Answer:
    """Send back what comes."""
    buffer = memoryview(bytearray(_BUFFER))

    def answer(sock: socket.socket) -> bool:
        received = sock.recv_into(buffer)
        if received:
            sock.send(buffer[:received])
        return received > 0

    return answer


def echo_once() -> Answer:
    """Send back what comes first, and close. Who closes first keeps TIME_WAIT: here, it costs nobody a local port."""

    def answer(sock: socket.socket) -> bool:
        sock.send(sock.recv(1))
        return False

    return answer


def sink() -> Answer:
    """Drop what comes; MSG_TRUNC spares the copy out of the kernel (tcp(7)). Closes when all has come."""
    buffer = bytearray(_BUFFER)

    def answer(sock: socket.socket) -> bool:
        return sock.recv_into(buffer, _BUFFER, socket.MSG_TRUNC) > 0

    return answer


def _serve(listener: socket.socket, make: Callable[[], Answer]) -> None:
    """One process: epoll and blocking sockets, which are read only when they have something. Ends with its parent."""
    epoll, answer, listening, parent = select.epoll(), make(), listener.fileno(), os.getppid()
    epoll.register(listening, select.EPOLLIN)
    clients: Dict[int, socket.socket] = {}
    while True:
        events = epoll.poll(_LOOK_S)
        if not events and os.getppid() != parent:
            return
        for fd, _ in events:
            if fd == listening:
                _accept(listener, epoll, clients)
            elif not _answered(answer, clients[fd]):
                clients.pop(fd).close()


def _answered(answer: Answer, sock: socket.socket) -> bool:
    try:
        return answer(sock)
    except OSError:
        return False  # the relay was ended with the connection open


def _accept(listener: socket.socket, epoll: select.epoll, clients: Dict[int, socket.socket]) -> None:
    try:
        client, _ = listener.accept()
    except OSError:
        return
    client.setblocking(True)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    clients[client.fileno()] = client
    epoll.register(client.fileno(), select.EPOLLIN)
