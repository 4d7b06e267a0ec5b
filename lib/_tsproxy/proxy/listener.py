"""A listener in the loop of a worker that has no colleagues: it accepts by itself, and no socket changes hands.

Knows when to look at the listener: one client a readiness, and not while there is no room. Who may come in is the
acceptor's business, what becomes of a client the worker's.
"""

from __future__ import annotations

import contextlib
import socket

from _tsproxy.linux import sockets
from _tsproxy.loop.poller import READ
from _tsproxy.loop.posted import NEW
from _tsproxy.proxy.acceptor import Acceptor
from _tsproxy.proxy.context import WorkerContext


class Listener:
    """Owns the worker's descriptor of the listener. Shut until open() is called."""

    lane = NEW
    __slots__ = ("_acceptor", "_context", "_listener", "_take", "owner")

    def __init__(self, owner: object, context: WorkerContext, acceptor: Acceptor, listener: socket.socket) -> None:
        """`owner` is the worker: a bug here is a bug outside any connection."""
        self.owner, self._context, self._acceptor, self._listener = owner, context, acceptor, listener
        self._take = sockets.bind_accept4(listener)

    def open(self) -> None:
        """Accept from now on, as soon as there is room."""
        pause_s = self._acceptor.pause_s
        self._context.watch(self._listener.fileno(), 0 if pause_s else READ, self)
        if pause_s:
            self._context.timers.arm(self, self._context.loop_now + round(pause_s * 1e9))

    def readable(self) -> None:
        """Take one client; rest when there is no room for the next."""
        self._acceptor.accept(self._take)
        if self._acceptor.pause_s:
            self.open()

    def ready(self, mask: int) -> None:
        """Any other event: accept(2) tells what it is."""
        self.readable()

    def on_deadline(self, now_ns: int) -> None:
        """The rest is over: look whether there is room again."""
        self.open()

    def close(self) -> None:
        """Accept no more. Whoever else has the listener open goes on. Idempotent."""
        fd = self._listener.fileno()
        if fd >= 0:
            self._context.timers.disarm(self)
            with contextlib.suppress(KeyError):  # it was never open
                self._context.poller.unregister(fd)  # close(2) does not end the watch while another has the listener open
            self._context.close_later(self._listener)
