"""What a paused direction holds: bytes that were received and that the sink has not taken yet.

They wait where they arrived, in the relay buffer or in a pipe. Knows nothing of why they wait.
"""

from __future__ import annotations

import socket
from typing import Protocol

from _tsproxy.proxy.buffers import Buffers


class Pending(Protocol):
    """Bytes to send, in order."""

    @property
    def left(self) -> int:
        """How many are not sent yet."""
        ...

    def send(self, sink: socket.SocketType) -> int:
        """Send what the sink takes; how many bytes. OSError as sendto(2) gives it: EAGAIN if the sink is full."""
        ...

    def release(self) -> None:
        """Give the room back; what is left is lost."""
        ...


class PendingBuffer:
    """The rest of a session buffer, with the whole of it, which goes back to its pool."""

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
