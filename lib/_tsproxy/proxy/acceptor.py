"""Accepting: one client a time, checked for room and right, handed on with the addresses to try.

Knows the listener and the limits. Knows nothing of what becomes of a connection, or of who accepts: the main thread for
several workers, or the one worker there is for itself. When the host or the workers have no room it pauses by the clock;
it never spins (compare trio's _highlevel_serve_listeners.py).
"""

from __future__ import annotations

import os
import socket
import time
from typing import Callable, Optional

from _tsproxy.cli.config import Config
from _tsproxy.linux import sockets, uapi
from _tsproxy.linux.addresses import pack, raw_ip
from _tsproxy.proxy.clients import Clients
from _tsproxy.proxy.inbox import ACCEPTED, Message
from _tsproxy.stats import metrics
from _tsproxy.stats.counters import Counter, SharedCounters

_PAUSE_S = 0.1
_LOOK_AGAIN_S = 0.005  # how soon a freed place is noticed: in an inbox, or under --on-full=queue
_COMPLAINT_S = 1.0
_FULL_SAID_S = 60.0
# By the length of the address in Python's form: to ask the client's socket object makes an enum each time.
_FAMILIES = {2: socket.AF_INET, 4: socket.AF_INET6}

# accept(2): "treat these errors like EAGAIN by retrying": they are the new connection's, not the listener's.
_THEIRS = uapi.NEW_CONNECTION_GONE | uapi.RETRY


class Acceptor:
    """Turns the clients of listening sockets into inbox entries. A loop calls it; it has no thread of its own."""

    def __init__(
        self,
        config: Config,
        shared_counters: SharedCounters,
        row: memoryview,
        clients: Clients,
        *,
        upstreams: Callable[[], bytes],
        dispatch: Callable[[Message], bool],
        log_ratelimited: Callable[[str, str], None],
    ) -> None:
        """Count in `row`, which the caller's loop owns.

        `upstreams` gives the packed addresses to try, `hand` takes a client (False: there is no room for it now),
        `complain` level and text of a line. Connection ids go on where those of the shared counters's earlier acceptor ended.
        """
        self._config, self._counters_of_all, self._counters, self._clients = config, shared_counters, row, clients
        self._upstreams, self._dispatch, self._log_ratelimited = upstreams, dispatch, log_ratelimited
        self._allowed = [(net.version, int(net.network_address), int(net.netmask)) for net in config.allow]
        self._queues = config.on_full == "queue"
        self._resume_at = 0.0
        self._complained_at = -_COMPLAINT_S
        self._full_said_at = -_FULL_SAID_S
        self._connection_id = shared_counters.total(Counter.ACCEPTED)
        self._waiting: Optional[Message] = None

    @property
    def pause_s(self) -> float:
        """How long accepting must rest from now on: 0 while there is room."""
        if self._must_wait:
            return _LOOK_AGAIN_S
        return max(0.0, self._resume_at - time.monotonic()) if self._resume_at else 0.0

    def _is_full(self) -> bool:
        """Whether there is no room; then that is said, once a minute."""
        active = metrics.active(self._counters_of_all)
        if active < self._config.max_connections:
            return False
        now = time.monotonic()
        if now - self._full_said_at >= _FULL_SAID_S:
            self._full_said_at = now
            then = "wait in the backlog" if self._queues else "are reset"
            about = f"{active} connections, all that --max-connections allows"
            self._log_ratelimited("warning", f"{about}: new clients {then} until one ends")
        return True

    @property
    def _must_wait(self) -> bool:
        return self._waiting is not None or (self._queues and self._is_full())

    @property
    def is_held_up(self) -> bool:
        """Whether a client waits for room in a worker's inbox."""
        return self._waiting is not None

    def accept(self, take: sockets.Accept4) -> bool:
        """Take one client, if there is one; False if there was none to take, or if they have to wait."""
        if self._must_wait:
            return False
        try:
            fd, sockaddr = take()
        except OSError as error:
            self._refused(error)
            return False
        accepted_ns = time.monotonic_ns()
        packed = pack(_FAMILIES[len(sockaddr)], sockaddr)
        if self._allowed and not self._may_enter(packed):
            self._turn_away(fd, Counter.DENIED)
        elif self._is_full():
            self._turn_away(fd, Counter.OVERFLOW)
        else:
            self._take(fd, packed, accepted_ns)
        return True

    def _may_enter(self, packed: bytes) -> bool:
        family, number = raw_ip(packed)
        version = 6 if family == socket.AF_INET6 else 4
        return any(version == of and number & mask == net for of, net, mask in self._allowed)

    def _turn_away(self, fd: int, counter: Counter) -> None:
        """Reset at once: the client must not think that anybody listens to it."""
        self._counters[counter] += 1
        client = sockets.from_fd(fd, socket.AF_INET)
        sockets.reset_on_close(client)
        client.close()

    def _take(self, fd: int, packed: bytes, accepted_ns: int) -> None:
        """It may come in: if its address has not its share already."""
        client_slot = self._clients.enter(packed)
        if client_slot is None:
            self._turn_away(fd, Counter.CLIENT_OVERFLOW)
        else:
            self._dispatch_client(fd, packed, accepted_ns, client_slot)

    def _dispatch_client(self, fd: int, packed: bytes, accepted_ns: int, client_slot: int) -> None:
        """Give the descriptor away. While no worker has room for it, it waits, and so do those behind it in the backlog."""
        self._connection_id += 1
        self._counters[Counter.ACCEPTED] += 1
        self._waiting = Message(ACCEPTED, fd, self._connection_id, accepted_ns, packed, self._upstreams(), client_slot)
        self.redispatch()

    def redispatch(self) -> None:
        """Hand over the client that waits, if there is room by now. Call it by the clock of pause_s."""
        if self._waiting is None:
            return
        if self._dispatch(self._waiting):
            self._waiting = None
        elif time.monotonic_ns() - self._waiting.accepted_ns > _COMPLAINT_S * 1e9:
            self._log_ratelimited_error("no worker takes connections: their inboxes are full; clients wait")

    def give_up(self) -> None:
        """Reset the client that waits, if there is one: no worker will take it any more."""
        if self._waiting is not None:
            self._counters[Counter.ACCEPTED] -= 1
            self._clients.leave(self._waiting.client)
            self._turn_away(self._waiting.fd, Counter.OVERFLOW)
            self._waiting = None

    def _refused(self, error: OSError) -> None:
        """No client: the peer's doing, the host's lack of room, or something that only a person can mend."""
        if error.errno in _THEIRS:
            return
        room = " (raise LimitNOFILE)" if error.errno in uapi.CAPACITY else ""
        self._rest(f"accept: {os.strerror(error.errno or 0)}{room}; trying again every {_PAUSE_S:g} s")

    def _rest(self, why: str) -> None:
        self._resume_at = time.monotonic() + _PAUSE_S
        self._log_ratelimited_error(why)

    def _log_ratelimited_error(self, why: str) -> None:
        now = time.monotonic()
        if now - self._complained_at >= _COMPLAINT_S:
            self._complained_at = now
            self._log_ratelimited("error", why)
