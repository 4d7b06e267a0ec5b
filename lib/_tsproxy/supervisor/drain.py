"""Closing listeners at the end without resetting a client: those in a backlog are accepted before close(2).

Knows the loop, listeners and their acceptors. Knows nothing of the sessions, or of why the end has come.
"""

from __future__ import annotations

import socket
from typing import Callable, List, NamedTuple

from _tsproxy.loop.event_loop import EventLoop
from _tsproxy.proxy.acceptor import Acceptor
from _tsproxy.supervisor.handoff import ReuseportHandoff

_PAUSE_NS = 5_000_000
_BATCH = 256  # clients between two looks at the loop's other events


class _Closing(NamedTuple):
    """A listener that is to be closed, and what accepts its clients until then."""

    listener: socket.socket
    acceptor: Acceptor
    handoff: ReuseportHandoff


class ListenerDrain:
    """Drains listeners into their acceptors, side by side."""

    def __init__(self, loop: EventLoop, may_share: bool) -> None:
        """`may_share`: the ports may be shared with another instance."""
        self._loop, self._may_share = loop, may_share
        self._closing: List[_Closing] = []

    def add(self, listener: socket.socket, acceptor: Acceptor) -> None:
        """A listener to close, which must not be watched. On a shared port later SYNs go to the other instance from now on."""
        self._closing.append(_Closing(listener, acceptor, ReuseportHandoff(listener, self._may_share)))

    def close_all(self, may_wait: Callable[[], bool]) -> None:
        """Accept their clients, and close them. Once `may_wait` is false, who is still in a backlog is reset by close(2)."""
        while self._closing:
            for closing in list(self._closing):
                is_empty = self._accept_backlog(closing, may_wait)
                if not may_wait() or (is_empty and closing.handoff.has_left):
                    self._closing.remove(closing)
                    closing.listener.close()
                elif not closing.handoff.has_left:
                    closing.handoff.check()
            if self._closing:
                self._pause()

    def _accept_backlog(self, closing: _Closing, may_wait: Callable[[], bool]) -> bool:
        """Accept until EAGAIN: True. On a shared port those for whom there is no room can wait: later ones are steered away."""
        handoff, acceptor = closing.handoff, closing.acceptor
        if may_wait() and (handoff.is_alone or not acceptor.pause_s):
            return not all(acceptor.accept(handoff.accept4) for _ in range(_BATCH)) and not acceptor.is_held_up
        return not handoff.is_alone

    def _pause(self) -> None:
        self._loop.run_for(_PAUSE_NS)
        for closing in self._closing:
            closing.acceptor.redispatch()
