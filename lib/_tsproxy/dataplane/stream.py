"""The zero-copy way of a half: while a source keeps filling the buffer, its bytes go through a pipe by splice(2).

Knows a direction and a pipe. Counting, backpressure, EOF and errors are the half's own: only the moving differs.
"""

from __future__ import annotations

import errno
import socket
from typing import Any, Protocol

from _tsproxy.dataplane.held import Held
from _tsproxy.dataplane.pipes import Pipe
from _tsproxy.dataplane.posted import BULK
from _tsproxy.dataplane.workbench import Workbench
from _tsproxy.host import linux

_SMALL = 16384  # bytes in one turn that copying moves as fast ...
_PATIENCE = 4  # ... and how many such turns in a row end the stream


class Direction(Protocol):
    """What a stream asks of the half that it stands in for."""

    bench: Workbench
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

    def hold(self, held: Held) -> None:
        """Keep what the sink did not take, and pause the source."""

    def lose(self, received: int, error: OSError) -> None:
        """The sink failed with all of this unsent."""

    def delivered(self, since_ns: int) -> None:
        """All that was received at `since_ns` is sent now."""

    def end_stream(self) -> None:
        """Back to copying."""


class Stream:
    """Handles its half's events in the half's place."""

    lane = BULK
    __slots__ = ("_half", "_pipe", "_small")

    def __init__(self, half: Direction, pipe: Pipe) -> None:
        """`pipe` is empty, and goes back with close()."""
        self._half, self._pipe = half, pipe
        self._small = 0

    @property
    def owner(self) -> Any:
        """The half's."""
        return self._half.owner

    def ready(self, mask: int) -> None:
        """Any event of the source's descriptor that is not just "readable"."""
        self._half.ready(mask)

    def readable(self) -> None:
        """Fill the pipe once and empty it once; what the sink does not take stays in it, held."""
        half = self._half
        try:
            received = 0 if self._pipe.refused else self._pipe.fill(half.source)
        except OSError as error:
            if error.errno not in linux.RETRY:
                half.receive_failed(error)
                return
            received = 0
        if not received:  # EOF, the mark of urgent data, where splice(2) stops for ever, or a refusal: recv(2) tells which
            self._tell_of_refusal()
            half.end_stream()
            half.readable()
            return
        try:
            sent = self._pipe.send(half.sink)
        except OSError as error:
            if not half.is_full(error):
                half.lose(received, error)
                return
            sent = 0
        self._moved(received, sent)

    def _tell_of_refusal(self) -> None:
        code = self._pipe.refused
        if code:
            text = f"splice(2) is refused: {errno.errorcode[code]}; long streams are copied instead"
            self._half.bench.complain("warning", "splice", text)

    def _moved(self, received: int, sent: int) -> None:
        half = self._half
        half.account(received, sent)
        self._small = 0 if received >= _SMALL else self._small + 1
        if sent != received:
            half.hold(self._pipe)
            return
        half.delivered(half.bench.woke)
        half.bench.poller.again(half.fd)  # how much splice(2) took does not tell whether there is more
        if self._small >= _PATIENCE:
            half.end_stream()

    def close(self) -> None:
        """Give the pipe back, with what is left in it."""
        self._half.bench.pipes.give(self._pipe)
