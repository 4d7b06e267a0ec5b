"""A listening socket in an event loop: the main thread's, or that of a worker which is the only one.

Knows when to call accept4(2): once for each event, and not during a pause. Knows nothing of which clients are admitted (the
acceptor), or of sessions.
"""

from __future__ import annotations

import socket

from _tsproxy.linux import sockets
from _tsproxy.loop.event_loop import EventLoop
from _tsproxy.loop.poller import READ
from _tsproxy.loop.posted import NEW
from _tsproxy.proxy.acceptor import Acceptor


class Listener:
    """Owns the socket. Accepts nothing until start_accepting()."""

    lane = NEW
    __slots__ = ("_accept4", "_acceptor", "_loop", "_socket")

    def __init__(self, loop: EventLoop, acceptor: Acceptor, sock: socket.socket) -> None:
        """Several listeners may share an acceptor, and so its limits."""
        self._loop, self._acceptor, self._socket = loop, acceptor, sock
        self._accept4 = sockets.bind_accept4(sock)

    def start_accepting(self) -> None:
        """Watch the socket, now or after the acceptor's pause."""
        pause_s = self._acceptor.pause_s
        self._loop.watch(self._socket.fileno(), 0 if pause_s else READ, self)
        if pause_s:
            self._loop.timers.arm(self, self._loop.now + round(pause_s * 1e9))

    def readable(self) -> None:
        """EPOLLIN: accept one client; then pause if the acceptor has to."""
        self._acceptor.accept(self._accept4)
        if self._acceptor.pause_s:
            self.start_accepting()

    def ready(self, mask: int) -> None:
        """Any other event: accept4(2) reports it."""
        self.readable()

    def on_deadline(self, now_ns: int) -> None:
        """The pause is over: dispatch the client that was accepted before, and accept again."""
        self._acceptor.redispatch()
        self.start_accepting()

    def on_bug(self, bug: Exception) -> None:
        """A bug outside any session ends the loop."""
        raise bug

    def stop_accepting(self) -> None:
        """Stop watching the socket. New clients wait in its backlog. Idempotent."""
        self._loop.timers.disarm(self)
        self._loop.unwatch(self._socket.fileno())

    @property
    def socket(self) -> socket.socket:
        """For who listens on it after stop_accepting()."""
        return self._socket

    def accept_backlog(self) -> None:
        """Accept who waits in the backlog, as long as the acceptor has no need to pause: before a close."""
        while self._acceptor.accept(self._accept4):
            pass

    def close(self) -> None:
        """Stop accepting, and close the socket. Other processes that have it open are not affected. Idempotent."""
        if self._socket.fileno() >= 0:
            self.stop_accepting()
            self._loop.close_later(self._socket)
