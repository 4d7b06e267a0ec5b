"""The SYN witness: what this kernel really puts into a SYN from a socket like the upstream ones, read back on loopback.

TCP_INFO can't show it: it says what was negotiated, and a peer may refuse what our SYN has leaked. So a socket with
the same tag connects to an own listener that keeps the SYN (TCP_SAVE_SYN). It sees the sysctl and rules in the output
path; it does not see rules on addresses, other interfaces, or what happens behind this namespace.
"""

from __future__ import annotations

import errno
import os
import select
import socket
from typing import Dict, Iterable

from _tsproxy.host import linux, namespaces, sockets
from _tsproxy.host.addresses import Address, from_sockaddr
from _tsproxy.host.sockets import Tuning
from _tsproxy.timestamps import syn
from _tsproxy.timestamps.syn import Syn

_PATIENCE_S = 0.25
_LOOPBACK: Dict[int, str] = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
_LO_DOWN = frozenset({errno.ENETUNREACH, errno.EADDRNOTAVAIL, errno.EHOSTUNREACH, errno.ENETDOWN})
NAMES: Dict[int, str] = {socket.AF_INET: "IPv4", socket.AF_INET6: "IPv6"}


class NoWitness(Exception):
    """The witness could not be made; the text says why and what would help."""


class Witness:
    """One listener for each address family, kept open; look() costs one loopback connection."""

    def __init__(self, families: Iterable[int]) -> None:
        """`families`: those of the upstream addresses."""
        self._families = tuple(dict.fromkeys(families))
        self._listeners: Dict[int, socket.socket] = {}

    def look(self) -> Dict[int, Syn]:
        """Family -> the SYN as it left just now. NoWitness if it can't be made; blocks for a quarter second at most.

        OSError where there is no descriptor or memory for it (EMFILE and friends): that tells nothing of timestamps.
        """
        try:
            return {family: self._look(family) for family in self._families}
        except OSError as error:
            if error.errno in linux.CAPACITY:
                raise
            if error.errno in _LO_DOWN or not namespaces.is_up("lo"):
                raise NoWitness(f"the loopback interface is down ({error.strerror}); to raise it: ip link set lo up") from None
            raise NoWitness(f"the witness connection on loopback failed: {error.strerror or error}") from None
        except syn.Malformed as problem:
            raise NoWitness(f"the kernel kept no SYN that can be read: {problem}") from None

    def _look(self, family: int) -> Syn:
        listening = self._listener(family)
        address = from_sockaddr(family, listening.getsockname())
        client = sockets.dial(family, Tuning(), None)
        try:
            code = client.connect_ex(address.sockaddr)
            if code and code not in linux.RETRY:
                raise OSError(code, os.strerror(code))
            return self._accepted(listening, client.getsockname())
        finally:
            sockets.reset_on_close(client)
            client.close()

    def _accepted(self, listening: socket.socket, ours: object) -> Syn:
        """The SYN of our own connection; what somebody else sent to the port is closed and passed over."""
        while True:
            if not _readable(listening):
                raise TimeoutError(errno.ETIMEDOUT, "it was not accepted in time")
            accepted, peer = listening.accept()
            with accepted:
                sockets.reset_on_close(accepted)
                if peer == ours:
                    return syn.parse(sockets.saved_syn(accepted))

    def _listener(self, family: int) -> socket.socket:
        if family not in self._listeners:
            sock = sockets.listener(Address(family, _LOOPBACK[family], 0), 16, Tuning())
            sockets.save_syns(sock)
            self._listeners[family] = sock
        return self._listeners[family]

    def close(self) -> None:
        """Close the listeners."""
        for sock in self._listeners.values():
            sock.close()
        self._listeners.clear()


def _readable(sock: socket.socket) -> bool:
    """poll(2), since a descriptor may be beyond what select(2) can take."""
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    return bool(poller.poll(_PATIENCE_S * 1000))
