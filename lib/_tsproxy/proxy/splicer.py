"""The zero-copy way of a direction: while a source keeps filling the buffer, its bytes go through a pipe by splice(2).

Knows a direction and a pipe. Counting, backpressure, EOF and errors are the direction's own: only the moving differs.
"""

from __future__ import annotations

import errno
import socket
from typing import Any, Protocol

from _tsproxy.linux import uapi
from _tsproxy.loop.posted import BULK
from _tsproxy.proxy.context import WorkerContext
from _tsproxy.proxy.pending import Pending
from _tsproxy.proxy.pipes import Pipe

_SMALL = 16384  # bytes in one turn that copying moves as fast ...
_PATIENCE = 4  # ... and how many such turns in a row end the stream


class SplicedDirection(Protocol):
    """What a stream asks of the direction that it stands in for."""

    context: WorkerContext
    fd: int  # of the source
    owner: Any
    source: socket.SocketType
    sink: socket.SocketType

    def ready(self, mask: int) -> None:
        """Any event of the source's descriptor that is not just "readable"."""

    def receive_failed(self, error: OSError) -> None:
        """Nothing was there after all, or never will be again."""

    def is_full(self, error: OSError) -> bool:
        """Whether the sink takes nothing just now."""

    def readable(self) -> None:
        """Receive once, by copying."""

    def account(self, received: int, sent: int) -> None:
        """Count what came and what of it is withheld."""

    def keep_pending(self, pending: Pending) -> None:
        """Keep what the sink did not take, and pause the source."""

    def lose(self, received: int, error: OSError) -> None:
        """The sink failed with all of this unsent."""

    def note_relayed(self, since_ns: int) -> None:
        """All that was received at `since_ns` is sent now."""

    def stop_splicing(self) -> None:
        """Back to copying."""


class Splicer:
    """Handles its direction's events in the direction's place."""

    lane = BULK
    __slots__ = ("_direction", "_pipe", "_small")

    def __init__(self, direction: SplicedDirection, pipe: Pipe) -> None:
        """`pipe` is empty, and goes back with close()."""
        self._direction, self._pipe = direction, pipe
        self._small = 0

    @property
    def owner(self) -> Any:
        """The direction's."""
        return self._direction.owner

    def ready(self, mask: int) -> None:
        """Any event of the source's descriptor that is not just "readable"."""
        self._direction.ready(mask)

    def readable(self) -> None:
        """Fill the pipe once and empty it once; what the sink does not take stays in it, held."""
        direction = self._direction
        try:
            received = 0 if self._pipe.refused else self._pipe.fill(direction.source)
        except OSError as error:
            if error.errno not in uapi.RETRY:
                direction.receive_failed(error)
                return
            received = 0
        if not received:  # EOF, the mark of urgent data, where splice(2) stops for ever, or a refusal: recv(2) tells which
            self._tell_of_refusal()
            direction.stop_splicing()
            direction.readable()
            return
        try:
            sent = self._pipe.send(direction.sink)
        except OSError as error:
            if not direction.is_full(error):
                direction.lose(received, error)
                return
            sent = 0
        self._moved(received, sent)

    def _tell_of_refusal(self) -> None:
        code = self._pipe.refused
        if code:
            text = f"splice(2) is refused: {errno.errorcode[code]}; long streams are copied instead"
            self._direction.context.log_ratelimited("warning", "splice", text)

    def _moved(self, received: int, sent: int) -> None:
        direction = self._direction
        direction.account(received, sent)
        self._small = 0 if received >= _SMALL else self._small + 1
        if sent != received:
            direction.keep_pending(self._pipe)
            return
        direction.note_relayed(direction.context.loop_now)
        direction.context.poller.again(direction.fd)  # how much splice(2) took does not tell whether there is more
        if self._small >= _PATIENCE:
            direction.stop_splicing()

    def close(self) -> None:
        """Give the pipe back, with what is left in it."""
        self._direction.context.pipes.give(self._pipe)
