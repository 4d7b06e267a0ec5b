"""Closing a listener at the end without resetting a client: those in its backlog are accepted before close(2).

Knows the loop, the acceptor and one listener. Knows nothing of the sessions, or of why the end has come.
"""

from __future__ import annotations

import socket
from typing import Callable

from _tsproxy.loop.event_loop import EventLoop
from _tsproxy.proxy.acceptor import Acceptor
from _tsproxy.supervisor.handoff import ReuseportHandoff

_PAUSE_NS = 5_000_000
_BATCH = 256  # clients between two looks at the loop's other events


class ListenerDrain:
    """Drains one listener after the other into an acceptor."""

    def __init__(self, loop: EventLoop, acceptor: Acceptor) -> None:
        self._loop, self._acceptor = loop, acceptor

    def close(self, listener: socket.socket, may_share: bool, may_wait: Callable[[], bool]) -> None:
        """Accept the clients of a listener, which must not be watched, and close it; on a shared port hand it off first.

        Once `may_wait` is false, who is still in the backlog is reset by close(2).
        """
        handoff = ReuseportHandoff(listener, may_share)
        self._accept_backlog(handoff, may_wait)
        while not handoff.has_left and may_wait():
            handoff.check()
            self._pause()
            self._accept_backlog(handoff, may_wait)
        listener.close()

    def _accept_backlog(self, handoff: ReuseportHandoff, may_wait: Callable[[], bool]) -> None:
        """Accept until EAGAIN. On a shared port those for whom there is no room now can wait: later ones are steered away."""
        while may_wait() and (handoff.is_alone or not self._acceptor.pause_s):
            has_more = all(self._acceptor.accept(handoff.accept4) for _ in range(_BATCH))
            if not has_more and not self._acceptor.is_held_up:
                return
            self._pause()

    def _pause(self) -> None:
        self._loop.run_for(_PAUSE_NS)
        self._acceptor.redispatch()
