"""Accepts clients, one for each call: checks --allow and the limits, dispatches the client with the upstream addresses to try.

Knows the limits. Knows nothing of sessions, or of the thread that accepts: the main thread for several workers, or the only
worker. On EMFILE and the like, or if all inboxes are full, accepting pauses by a timer; it never spins (compare trio's
_highlevel_serve_listeners.py).
"""

from __future__ import annotations

import os
import socket
import time
from typing import Callable, Iterator, Optional

from _tsproxy.cli.config import Route
from _tsproxy.linux import sockets, uapi
from _tsproxy.linux.addresses import pack, raw_ip
from _tsproxy.proxy.clients import Clients
from _tsproxy.proxy.inbox import Command, Message
from _tsproxy.stats.counters import Counter

_PAUSE_S = 0.1
_LOOK_AGAIN_S = 0.005  # poll interval while an inbox, or --max-connections under --on-full=queue, is full
_LOG_S = 1.0
_FULL_LOG_S = 60.0
# By the length of the sockaddr tuple: socket.family would make an enum each time.
_FAMILIES = {2: socket.AF_INET, 4: socket.AF_INET6}

# accept(2): "treat these errors like EAGAIN by retrying": they are the new connection's, not the listener's.
_PEER_ERRORS = uapi.ACCEPT_PEER_ERRORS | uapi.RETRY

Dispatch = Callable[[Message], bool]


class Acceptor:
    """Accepts the clients of listening sockets and makes messages of them. Called by Listener, in its loop's thread."""

    def __init__(
        self,
        route: Route,
        row: memoryview,
        clients: Clients,
        *,
        number: int,
        ids: Iterator[int],
        active: Callable[[], int],
        dispatch: Dispatch,
        log_ratelimited: Callable[[str, str], None],
        has_room: Callable[[], bool] = lambda: True,
    ) -> None:
        """Count in `row`, which the caller's loop owns.

        `number` is the route's, `ids` has the connections', `active` tells how many are open of those that its limit is for.
        `dispatch` owns the client's descriptor if it returns True; False: no inbox has room. `log_ratelimited` gets level and
        text of a line. `has_room` tells whether there are descriptors for one more: a worker without would lose the client.
        """
        self._route, self._counters, self.clients = route, row, clients
        self._number, self._ids, self._active = number, ids, active
        self._dispatch, self._log_ratelimited, self._has_room = dispatch, log_ratelimited, has_room
        self.upstreams = b""  # packed addresses to try, one after the other; set by the owner
        self._allowed = [(net.version, int(net.network_address), int(net.netmask)) for net in route.allow]
        self._queues = route.on_full == "queue"
        self._resume_at = 0.0
        self._logged_at = -_LOG_S
        self._full_logged_at = -_FULL_LOG_S
        self._most_active = route.max_connections  # what is active now, or more: as last read, and what came since
        self._waiting: Optional[Message] = None

    @property
    def pause_s(self) -> float:
        """How long accepting has to pause from now on; 0: not at all."""
        if self._must_wait:
            return _LOOK_AGAIN_S
        return max(0.0, self._resume_at - time.monotonic()) if self._resume_at else 0.0

    def _is_full(self) -> bool:
        """Whether --max-connections is reached; logged once a minute."""
        limit = self._route.max_connections
        if self._most_active < limit:
            return False
        self._most_active = active = self._active()
        if active < limit:
            return False
        now = time.monotonic()
        if now - self._full_logged_at >= _FULL_LOG_S:
            self._full_logged_at = now
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

    def accept(self, accept4: sockets.Accept4) -> bool:
        """Accept one client; False if accept4(2) returned none, or if accepting has to pause."""
        if self._must_wait:
            return False
        if not self._has_room():
            self._pause("no descriptors for more connections of all routes (raise LimitNOFILE)")
            return False
        try:
            fd, sockaddr = accept4()
        except OSError as error:
            self._accept_failed(error)
            return False
        accepted_ns = time.monotonic_ns()
        packed = pack(_FAMILIES[len(sockaddr)], sockaddr)
        if self._allowed and not self._is_allowed(packed):
            self._reject(fd, Counter.DENIED)
        elif self._is_full():
            self._reject(fd, Counter.OVERFLOW)
        else:
            self._admit(fd, packed, accepted_ns)
        return True

    def _is_allowed(self, packed: bytes) -> bool:
        family, number = raw_ip(packed)
        version = 6 if family == socket.AF_INET6 else 4
        return any(version == of and number & mask == net for of, net, mask in self._allowed)

    def _reject(self, fd: int, counter: Counter) -> None:
        """Close with RST: FIN would look like a session that was relayed and has ended."""
        self._counters[counter] += 1
        client = sockets.from_fd(fd)
        sockets.reset_on_close(client)
        client.close()

    def _admit(self, fd: int, packed: bytes, accepted_ns: int) -> None:
        """Admit the client unless its address is at its limit."""
        client_slot = self.clients.enter(packed)
        if client_slot is None:
            self._reject(fd, Counter.CLIENT_OVERFLOW)
            return
        self._most_active += 1
        self._counters[Counter.ACCEPTED] += 1
        upstreams, number = self.upstreams, self._number
        message = Message(Command.CLIENT, fd, next(self._ids), accepted_ns, packed, upstreams, client_slot, number)
        if not self._dispatch(message):
            self._waiting = message

    def redispatch(self) -> None:
        """Dispatch the client that waits for room, if there is one. Called by a timer of pause_s."""
        if self._waiting is None:
            return
        if self._dispatch(self._waiting):
            self._waiting = None
        elif time.monotonic_ns() - self._waiting.accepted_ns > _LOG_S * 1e9:
            self._log_error("no worker takes connections: their inboxes are full; clients wait")

    def give_up(self) -> None:
        """Reset the client that waits for room, if there is one. Called in a drain, once the listeners are closed."""
        if self._waiting is not None:
            self._counters[Counter.ACCEPTED] -= 1
            self.clients.leave(self._waiting.client)
            self._reject(self._waiting.fd, Counter.OVERFLOW)
            self._waiting = None

    def _accept_failed(self, error: OSError) -> None:
        """accept4(2) failed: the peer's error, out of resources, or persistent. The last two pause accepting."""
        if error.errno in _PEER_ERRORS:
            return
        room = " (raise LimitNOFILE)" if error.errno in uapi.CAPACITY else ""
        self._pause(f"{os.strerror(error.errno or 0)}{room}")

    def _pause(self, why: str) -> None:
        self._resume_at = time.monotonic() + _PAUSE_S
        self._log_error(f"accept: {why}; trying again every {_PAUSE_S:g} s")

    def _log_error(self, why: str) -> None:
        now = time.monotonic()
        if now - self._logged_at >= _LOG_S:
            self._logged_at = now
            self._log_ratelimited("error", why)
