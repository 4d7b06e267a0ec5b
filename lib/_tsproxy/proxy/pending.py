"""The pending bytes of a paused direction: received, and not accepted by the sink's send(2) yet.

They stay where they arrived, in the relay buffer or in a pipe. Knows a buffer and its pool. Knows nothing of sessions.
"""

from __future__ import annotations

import socket
from typing import Protocol

from _tsproxy.proxy.buffers import Buffers


class Pending(Protocol):
    """Bytes to send, in order."""

    @property
    def left(self) -> int:
        """How many bytes are unsent."""
        ...

    def send(self, sink: socket.SocketType) -> int:
        """One send; how many bytes were sent. OSError as sendto(2) raises it: EAGAIN if the sink is full."""
        ...

    def release(self) -> None:
        """Release the memory. Unsent bytes are discarded."""
        ...


class PendingBuffer:
    """The unsent part of a relay buffer. The buffer is returned to its pool by release()."""

    __slots__ = ("_buffer", "_buffers", "_unsent")

    def __init__(self, buffers: Buffers, buffer: memoryview, start: int, end: int) -> None:
        self._buffers, self._buffer = buffers, buffer
        self._unsent = buffer[start:end]

    @property
    def left(self) -> int:
        """See Pending."""
        return len(self._unsent)

    def send(self, sink: socket.SocketType) -> int:
        """See Pending."""
        sent = sink.send(self._unsent)
        self._unsent = self._unsent[sent:]
        return sent

    def release(self) -> None:
        """See Pending. Call it once."""
        del self._unsent
        self._buffers.release(self._buffer)
