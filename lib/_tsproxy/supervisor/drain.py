"""Closing listeners without resetting a client: those in a backlog are accepted before close(2).

Knows the loop, listeners and their acceptors. Knows nothing of the sessions, or of why the end has come.
"""

from __future__ import annotations

import contextlib
import socket
import time
from typing import Callable, List, NamedTuple

from _tsproxy.linux import reuseport
from _tsproxy.linux.reuseport import Tables
from _tsproxy.loop.event_loop import EventLoop
from _tsproxy.proxy.acceptor import Acceptor
from _tsproxy.supervisor.handoff import ReuseportHandoff

HANDSHAKE_S = 3.0  # a client of a shared port whose handshake takes longer is reset
PAUSE_S = 0.005  # between two looks
_BATCH = 256  # clients between two looks at the loop's other events


class _Closing(NamedTuple):
    """A listener that is to be closed, and what accepts its clients until then."""

    listener: socket.socket
    acceptor: Acceptor
    handoff: ReuseportHandoff
    deadline: float  # of time.monotonic()


class ListenerDrain:
    """Drains listeners into their acceptors, side by side."""

    def __init__(self, loop: EventLoop, may_share: bool) -> None:
        """`may_share`: the ports may be shared with another instance."""
        self._loop, self._may_share = loop, may_share
        self._closing: List[_Closing] = []
        self._tables, self._read_at = Tables(), 0.0

    def add(self, listener: socket.socket, acceptor: Acceptor, deadline: float) -> None:
        """A listener to close, which must not be watched. On a shared port later SYNs go to the other instance from now on.

        Who is still in its backlog at the deadline is reset by close(2).
        """
        self._closing.append(_Closing(listener, acceptor, self._handoff(listener), deadline))

    def add_shared(self, listener: socket.socket, acceptor: Acceptor) -> bool:
        """The same, if its port is shared with another listener; else False, with nothing done."""
        handoff = self._handoff(listener)
        if not handoff.has_left:
            self._closing.append(_Closing(listener, acceptor, handoff, time.monotonic() + HANDSHAKE_S))
        return not handoff.has_left

    def _handoff(self, listener: socket.socket) -> ReuseportHandoff:
        """Those that come together share one look at the tables."""
        if time.monotonic() - self._read_at > PAUSE_S:
            self._tables, self._read_at = Tables(), time.monotonic()
        return ReuseportHandoff(listener, self._may_share, self._tables)

    def take_back(self, bind: str, port: int, undo: contextlib.ExitStack) -> List[socket.socket]:
        """The listener at that place, if it is not closed yet: clients come to it again, unless this is undone."""
        found = [closing for closing in self._closing if closing.listener.getsockname()[:2] == (bind, port)]
        for closing in found:
            self._closing.remove(closing)
            reuseport.attach(closing.listener)
            undo.callback(self.add, closing.listener, closing.acceptor, closing.deadline)
        return [closing.listener for closing in found]

    def needs(self, acceptor: Acceptor) -> bool:
        """Whether a listener of that acceptor is to be closed still."""
        return any(closing.acceptor is acceptor for closing in self._closing)

    def close_all(self, is_hurried: Callable[[], bool]) -> None:
        """Accept their clients, and close them: once `is_hurried`, without waiting for more."""
        while self.step(is_hurried()):
            self._loop.run_for(round(PAUSE_S * 1e9))

    def step(self, is_hurried: bool = False) -> bool:
        """Accept who has come, and close those listeners to which nobody can come any more. Whether there are others."""
        tables = Tables()
        for closing in list(self._closing):
            closing.acceptor.redispatch()
            may_wait = not is_hurried and time.monotonic() < closing.deadline
            is_empty = self._accept_backlog(closing, may_wait)
            if not may_wait or (is_empty and closing.handoff.has_left):
                self._closing.remove(closing)
                closing.listener.close()
            elif not closing.handoff.has_left:
                closing.handoff.check(tables)
        return bool(self._closing)

    def _accept_backlog(self, closing: _Closing, may_wait: bool) -> bool:
        """Accept until EAGAIN: True. On a shared port those for whom there is no room can wait: later ones are steered away."""
        handoff, acceptor = closing.handoff, closing.acceptor
        if may_wait and (handoff.is_alone or not acceptor.pause_s):
            return not all(acceptor.accept(handoff.accept4) for _ in range(_BATCH)) and not acceptor.is_held_up
        return not handoff.is_alone
