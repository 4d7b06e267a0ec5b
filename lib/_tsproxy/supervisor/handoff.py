"""Leaving a shared port so that no client is refused, reset or lost (--reuse-port: the old instance of a restart).

First later SYNs go to another member of the group. Then clients that are in the middle of the handshake with us get the
time to finish it, and are accepted. When none is left, nothing can come any more, and the listener may be closed.
"""

from __future__ import annotations

import socket
import time
from typing import FrozenSet, Optional, Tuple

from _tsproxy.linux import reuseport, sockets
from _tsproxy.linux.addresses import SockAddr
from _tsproxy.linux.reuseport import Group

_SETTLE_S = 0.01  # a SYN that was under way in the kernel when the others were sent elsewhere has been taken by then
_WATCH_S = 0.1  # how long nobody new must come: the others are in fact sent elsewhere
_ALONE = Group(1, True)


class ReuseportHandoff:
    """One listener on its way out. Accept from it, as from a socket, all there is; look(); and again, until it has left."""

    def __init__(self, listener: socket.socket, may_share: bool) -> None:
        """`listener` stays the caller's to close. One that shares its port with nobody has left at once."""
        self._listener, self._accept = listener, sockets.bind_accept4(listener)
        group = _group_of(listener) if may_share else _ALONE
        self._members = group.members
        # A member joins at the end, so there is the newest: the one that is to go on.
        self._place = 0 if group.is_newest else group.members - 1
        self._under_way: Optional[FrozenSet[int]] = None  # ports of the clients that were in the handshake then
        self._judges = False
        self.is_alone = self.has_left = group.members < 2
        if not self.has_left:
            self._steer()

    def _steer(self) -> None:
        self._since, self._under_way, self._judges = time.monotonic(), None, False
        try:
            reuseport.detach(self._listener, self._place)
        except OSError:
            self.has_left = True  # before Linux 4.6: there is no way to leave but to close

    def take(self) -> Tuple[int, SockAddr]:
        """See sockets.taker(). A client that was not under way shows that its SYN came to us: then that place is ours."""
        client, address = self._accept()
        if self._judges and address[1] not in (self._under_way or ()):
            self._place, self.has_left = (self._place - 1) % self._members, False
            self._steer()
        return client, address

    def look(self) -> None:
        """See how far it is: who is under way, and, when those who had finished before are accepted, who still comes."""
        passed = time.monotonic() - self._since
        if self._under_way is None:
            if passed > _SETTLE_S:
                self._under_way = reuseport.half_open(self._listener)
        elif not self._judges:
            self._judges, self._since = True, time.monotonic()
        elif passed > _WATCH_S:
            self.has_left = not self._under_way or not self._under_way & reuseport.half_open(self._listener)


def _group_of(listener: socket.socket) -> Group:
    try:
        return reuseport.group_of(listener)
    except OSError:
        return _ALONE  # no /proc
