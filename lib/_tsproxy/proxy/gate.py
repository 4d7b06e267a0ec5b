"""The interface between data path and policy: what is asked before a SYN and before the first byte. Knows no implementation."""

from __future__ import annotations

import socket
from typing import Optional, Protocol

from _tsproxy.linux.sockets import TcpInfo


class PolicyGate(Protocol):
    """Called before each SYN, and once after the handshake, before the first byte is relayed. Never blocks."""

    witness: int  # for the record: the number of the lever
    for_rules: bool  # whether upstream sockets set the DSCP mark that packet filter rules need
    tagged: bool  # whether they set the tag by which such rules know them
    proves_each_syn: bool  # whether the kernel must not retransmit a SYN without a call of may_connect()

    def may_connect(self, family: int) -> Optional[bool]:
        """Whether a SYN may leave now over this address family; None: not known yet, an EVIDENCE command will come."""
        ...

    def is_absent(self, family: int) -> bool:
        """Whether the reason is that this host has no address of the family."""
        ...

    def ends(self, family: int, established: bool) -> bool:
        """Whether a session over this family, established or connecting, has to end, since the policy fails."""
        ...

    def may_relay(self, upstream: socket.SocketType, info: TcpInfo) -> bool:
        """Whether bytes may be relayed on this established connection; `info` is its TCP_INFO."""
        ...
