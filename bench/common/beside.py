"""What keeps a relay busy while one client's orders are timed through it; and a far end that serves both apart.

The orders' end and the rest are processes of their own: the first takes one connection and lets go of the listener, and
only then the second begins. What an order waits for shall be the relay, not the load: so client and far end of the
orders are sessions of their own, and all else is one that yields the CPU: SCHED_IDLE where Linux does not group processes by
session, a nice value of 5 for its group where it does (sched(7), "The autogroup feature").
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from functools import partial
from pathlib import Path
from time import monotonic_ns
from typing import Callable, Dict, FrozenSet, Iterator, List, Sequence

from common.load import Sample, Span, dial
from common.processes import run, tasks
from common.trouble import Failed

Work = Callable[[], Sample]

ORDER, FLOOD, POUR = b"o", b"x", b"p"  # what a client says first; a bulk sender's bytes are zeros
_BACKLOG = 4096
_PIECE = 1 << 16
_LOOK_S = 5.0  # how soon it is noticed that the parent was killed
_SLOW_PIECE, _SLOW_PACE_S, _SLOW_ROOM = 1 << 12, 0.01, 1 << 14


def apart(work: Work) -> Sample:
    """Do it in a session of our own: then the CPU that others took is not counted against us."""
    os.setsid()
    return work()


def yielding(work: Work) -> Sample:
    """Do it in a session of our own that leaves the CPU to others who want it."""
    os.setsid()
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    with contextlib.suppress(OSError):  # a kernel without autogroups
        Path("/proc/self/autogroup").write_text("5")
    return work()


def crowd(works: Sequence[Work], cpus: FrozenSet[int], patience_s: float) -> Sample:
    """Several loads side by side; what they got, added up."""
    total: Sample = {}
    for sample in run(works, cpus, patience_s):
        for name, value in sample.items():
            total[name] = total.get(name, 0) + value
    return total


# The far end


@contextlib.contextmanager
def running(cpus: FrozenSet[int]) -> Iterator[int]:
    """Echo the first connection that says something; then, elsewhere, serve the flood, sink and pour. The port."""
    began, begin = os.pipe()
    with socket.create_server(("127.0.0.1", 0), backlog=_BACKLOG) as listener, os.fdopen(began), os.fdopen(begin, "w") as ours:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # what is accepted inherits it
        orders, rest = partial(_serve_orders, listener, begin), partial(_serve_rest, listener, began, begin)
        with tasks([partial(apart, orders), partial(yielding, rest)], cpus):
            ours.close()
            yield listener.getsockname()[1]


def _serve_orders(listener: socket.socket, begin: int) -> Sample:
    sock = _first_to_speak(listener, os.getppid())
    listener.close()
    os.close(begin)
    buffer = memoryview(bytearray(_PIECE))
    while received := sock.recv_into(buffer):
        sock.sendall(buffer[:received])
    return {}


def _first_to_speak(listener: socket.socket, parent: int) -> socket.socket:
    """Connections that come and go without a word were looks whether the relay is there."""
    listener.settimeout(_LOOK_S)
    while os.getppid() == parent:
        with contextlib.suppress(OSError):
            sock, _ = listener.accept()
            if sock.recv(1, socket.MSG_PEEK):
                return sock
    raise Failed("nobody came")


def _serve_rest(listener: socket.socket, began: int, begin: int) -> Sample:
    """Begin when nobody has `begin` open any more. One loop; ends with its parent."""
    os.close(begin)
    os.read(began, 1)
    listener.setblocking(False)
    epoll, parent, clients = select.epoll(), os.getppid(), {listener.fileno(): listener}
    epoll.register(listener.fileno(), select.EPOLLIN)
    buffer = memoryview(bytearray(1 << 20))
    while os.getppid() == parent:
        for fd, events in epoll.poll(_LOOK_S):
            with contextlib.suppress(BlockingIOError):
                if fd == listener.fileno():
                    _accept(listener, epoll, clients)
                elif not _served(clients[fd], events, epoll, buffer):
                    clients.pop(fd).close()
    return {}


def _accept(listener: socket.socket, epoll: select.epoll, clients: Dict[int, socket.socket]) -> None:
    client, _ = listener.accept()
    client.setblocking(False)
    clients[client.fileno()] = client
    epoll.register(client.fileno(), select.EPOLLIN)


def _served(sock: socket.socket, events: int, epoll: select.epoll, buffer: memoryview) -> bool:
    """False: close it. Who closes first keeps TIME_WAIT: for the flood that is here, where it costs no local port."""
    try:
        if events & select.EPOLLOUT:
            return sock.send(buffer) > 0
        received = sock.recv_into(buffer)
        if buffer[:received] == FLOOD:
            sock.send(FLOOD)
            return False
        if buffer[:received] == POUR:
            buffer[:1] = b"\0"
            epoll.modify(sock.fileno(), select.EPOLLOUT)
        return received > 0
    except BlockingIOError:
        raise
    except OSError:
        return False  # the relay was ended with the connection open


# The load


def flood(port: int, span: Span) -> Sample:
    """One client: connect, a byte there and back, end of file, close, and again, as fast as it can."""
    done, address = 0, ("127.0.0.1", port)
    while monotonic_ns() < span.end:
        with socket.socket() as sock:
            sock.connect(address)
            sock.send(FLOOD)
            if sock.recv(1) != FLOOD or sock.recv(1):
                raise Failed("the flood got no answer")
        done += monotonic_ns() >= span.begin
    return {"flood_per_s": done / span.seconds}


def bulk(port: int, senders: int, span: Span) -> Sample:
    """So many connections of one process, each as fast as it is taken."""
    piece, sent, epoll = bytes(_PIECE), 0, select.epoll()
    socks = _several(port, senders)
    for sock in socks.values():
        sock.setblocking(False)
        epoll.register(sock.fileno(), select.EPOLLOUT)
    while (now := monotonic_ns()) < span.end:
        for fd, _ in epoll.poll(0.1):
            with contextlib.suppress(BlockingIOError):
                taken = socks[fd].send(piece)
                sent += taken if now >= span.begin else 0
    return {"bulk_gbit_per_s": sent * 8 / 1e9 / span.seconds}


def slow(port: int, readers: int, span: Span) -> Sample:
    """So many connections whose far end pours, and of which each takes 4 KiB every 10 ms from a receive buffer of 16."""
    socks: List[socket.socket] = list(_several(port, readers, _SLOW_ROOM).values())
    for sock in socks:
        sock.send(POUR)
        sock.settimeout(_LOOK_S)
    while monotonic_ns() < span.end:
        for sock in socks:
            if not sock.recv(_SLOW_PIECE):
                raise Failed("a slow reader was cut off")
        time.sleep(_SLOW_PACE_S)
    return {}


def _several(port: int, count: int, room: int = 0) -> Dict[int, socket.socket]:
    socks = [dial(port) for _ in range(count)]
    for sock in socks:
        if room:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
    return {sock.fileno(): sock for sock in socks}
