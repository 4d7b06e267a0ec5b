"""The question that the data path asks before it lets bytes through; who answers it, and by what right, is not known here."""

from __future__ import annotations

import socket
from typing import Protocol


class Gate(Protocol):
    """Asked once before each connect() and once after it, before the first byte is relayed."""

    witness: int  # what the answers rest on, as a number for the record

    def may_connect(self) -> bool:
        """Whether a SYN may leave now. False: none is sent, and the client is reset. OSError: no room to find out."""
        ...

    def may_relay(self, upstream: socket.SocketType, timestamps: bool) -> bool:
        """Whether bytes may pass on this established connection; `timestamps`: TSopt was negotiated on it."""
        ...
