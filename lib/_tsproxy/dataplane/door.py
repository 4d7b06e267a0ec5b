"""A listener in the loop of a worker that has no colleagues: it accepts by itself, and no socket changes hands.

Knows when to look at the listener: one client a readiness, and not while there is no room. Who may come in is the
acceptor's business, what becomes of a client the worker's.
"""

from __future__ import annotations

import contextlib
import socket

from _tsproxy.dataplane.acceptor import Acceptor
from _tsproxy.dataplane.poller import READ
from _tsproxy.dataplane.posted import NEW
from _tsproxy.dataplane.workbench import Workbench
from _tsproxy.host import sockets


class Door:
    """Owns the worker's descriptor of the listener. Shut until open() is called."""

    lane = NEW
    __slots__ = ("_acceptor", "_bench", "_listener", "_take", "owner")

    def __init__(self, owner: object, bench: Workbench, acceptor: Acceptor, listener: socket.socket) -> None:
        """`owner` is the worker: a bug here is a bug outside any connection."""
        self.owner, self._bench, self._acceptor, self._listener = owner, bench, acceptor, listener
        self._take = sockets.taker(listener)

    def open(self) -> None:
        """Accept from now on, as soon as there is room."""
        pause_s = self._acceptor.pause_s
        self._bench.watch(self._listener.fileno(), 0 if pause_s else READ, self)
        if pause_s:
            self._bench.timers.arm(self, self._bench.woke + round(pause_s * 1e9))

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
            self._bench.timers.disarm(self)
            with contextlib.suppress(KeyError):  # it was never open
                self._bench.poller.unregister(fd)  # close(2) does not end the watch while another has the listener open
            self._bench.bury(self._listener)
