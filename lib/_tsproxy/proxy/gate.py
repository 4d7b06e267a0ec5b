"""The questions that the data path asks before it lets bytes through; who answers, and by what right, is not known here."""

from __future__ import annotations

import socket
from typing import Optional, Protocol

from _tsproxy.linux.sockets import TcpInfo


class PolicyGate(Protocol):
    """Asked before each SYN and once after the handshake, before the first byte is relayed. Never blocks."""

    witness: int  # what the answers rest on, as a number for the record
    for_rules: bool  # whether upstream sockets carry the mark that packet filter rules need
    proves_each_syn: bool  # whether the kernel may not send a SYN again by itself

    def may_connect(self, family: int) -> Optional[bool]:
        """Whether a SYN may leave now over this address family; None: not known yet, an answer comes soon."""
        ...

    def is_absent(self, family: int) -> bool:
        """Whether it may not because this host can't use the family at all."""
        ...

    def ends(self, family: int, established: bool) -> bool:
        """Whether a connection over this family, established or connecting, has to end by what is known now."""
        ...

    def may_relay(self, upstream: socket.SocketType, info: TcpInfo) -> bool:
        """Whether bytes may pass on this established connection, of which the kernel says `info`."""
        ...
