"""Leaving a shared port without a client refused, reset or lost (--reuse-port: the old instance of a restart).

First later SYNs are steered to another member of the group. Then clients whose handshake with this listener is under way
get time to complete it, and are accepted. Once there are none, no client can come any more, and close(2) resets nobody.

Knows the group of one listener. Knows nothing of the loop, or of what becomes of a client.
"""

from __future__ import annotations

import contextlib
import socket
import time
from typing import FrozenSet, Optional, Tuple

from _tsproxy.linux import reuseport, sockets
from _tsproxy.linux.addresses import SockAddr
from _tsproxy.linux.reuseport import Group, Tables

_SETTLE_S = 0.01  # a SYN that the kernel was handling while the others were steered away is in the tables by then
_WATCH_S = 0.1  # how long no new client must come to show that the others are in fact steered away
_ALONE = Group(1, True)


class ReuseportHandoff:
    """One listener that is to be closed. Until `has_left`: accept4() until EAGAIN, check(), and again."""

    def __init__(self, listener: socket.socket, may_share: bool, tables: Tables) -> None:
        """`listener` stays the caller's to close. One that shares its port with no other has left at once."""
        self._listener, self._accept4 = listener, sockets.bind_accept4(listener)
        group = _group_of(listener, tables) if may_share else _ALONE
        self._members = group.members
        # The newest member is the one that is to go on; it is the last one, since members join at the end.
        self._place = 0 if group.is_newest else group.members - 1
        self._under_way: Optional[FrozenSet[int]] = None  # ports of the clients whose handshake was under way then
        self._is_checking = False
        self.is_alone = self.has_left = group.members < 2
        if not self.has_left:
            self._detach()

    def _detach(self) -> None:
        self._since, self._under_way, self._is_checking = time.monotonic(), None, False
        try:
            reuseport.detach(self._listener, self._place)
        except OSError:
            self.has_left = True  # before Linux 4.6: close(2) is the only way to leave

    def accept4(self) -> Tuple[int, SockAddr]:
        """See sockets.bind_accept4(). A client that was not under way shows that `place` is our own: try the one before."""
        client, address = self._accept4()
        if self._is_checking and address[1] not in (self._under_way or ()):
            self._place, self.has_left = (self._place - 1) % self._members, False
            self._detach()
        return client, address

    def check(self, tables: Tables) -> None:
        """Note who is under way; then, once the backlog of before is accepted, see whether they or new clients come.

        Without a descriptor to look with (EMFILE) nothing is known: the next check looks again.
        """
        with contextlib.suppress(OSError):
            self._check(tables, time.monotonic() - self._since)

    def _check(self, tables: Tables, passed: float) -> None:
        if self._under_way is None:
            if passed > _SETTLE_S:
                self._under_way = tables.half_open(self._listener)
        elif not self._is_checking:
            self._is_checking, self._since = True, time.monotonic()
        elif passed > _WATCH_S:
            self.has_left = not self._under_way or not self._under_way & tables.half_open(self._listener)


def _group_of(listener: socket.socket, tables: Tables) -> Group:
    try:
        return tables.group_of(listener)
    except OSError:
        return _ALONE  # no /proc
