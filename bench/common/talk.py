"""A conversation whose every byte is known beforehand: what comes is compared with what its place says it must be.

Both ends run the same code; a Plan, sent ahead as a header, tells the far end its part. A byte stream is made from a seed
and a position alone, so a byte that is lost, doubled, changed or swapped shows, and so does one of another connection.
"""

from __future__ import annotations

import random
import select
import socket
import struct
import time
from typing import NamedTuple, Optional

_PERIOD = 65521  # a prime: no buffer size divides it
_PIECE = 1 << 16
_STALLED_MS = 30_000
_HEADER = struct.Struct("!QQQQIBB")
_NEVER = (1 << 64) - 1
_RESET = struct.pack("ii", 1, 0)


class Wrong(Exception):
    """What a relay must not do; the text says what it did."""


class Plan(NamedTuple):
    """What both ends do. Positions and sizes in bytes."""

    seed: int
    up: int  # from the client
    down: int
    far_resets_at: int = _NEVER  # of all that it sent and received
    message: int = 0  # the next one only when the last has been answered; 0: as fast as it goes
    client_resets: bool = False
    after_eof: bool = False  # the far end says nothing before the client's FIN

    def encode(self) -> bytes:
        """The header."""
        resets, after = int(self.client_resets), int(self.after_eof)
        return _HEADER.pack(self.seed, self.up, self.down, self.far_resets_at, self.message, resets, after)

    @classmethod
    def decode(cls, header: bytes) -> Plan:
        """From a header of HEADER_SIZE bytes."""
        seed, up, down, far_resets_at, message, resets, after = _HEADER.unpack(header)
        return cls(seed, up, down, far_resets_at, message, bool(resets), bool(after))

    @property
    def ends_well(self) -> bool:
        """Whether nobody is to reset it."""
        return not self.client_resets and self.far_resets_at == _NEVER


HEADER_SIZE = _HEADER.size


class Stream:
    """One direction's bytes, and how far it has come."""

    def __init__(self, seed: int, total: int) -> None:
        period = random.Random(seed).randbytes(_PERIOD)
        self._bytes = memoryview(period * 3)
        self.total, self.at = total, 0

    def next(self, limit: int) -> memoryview:
        """The bytes that come next, at most so many."""
        start = self.at % _PERIOD
        return self._bytes[start : start + max(0, min(limit, self.total - self.at, _PIECE))]

    def check(self, data: bytes) -> None:
        """Wrong if this is not what comes next."""
        if self.next(len(data)) != data:
            raise Wrong(f"{len(data)} bytes at position {self.at} of {self.total} are not those that were sent")
        self.at += len(data)

    @property
    def is_done(self) -> bool:
        """Whether all of it has gone by."""
        return self.at == self.total


class Talk:
    """One end of a conversation, from after the header to its end."""

    def __init__(self, sock: socket.socket, outgoing: Stream, incoming: Stream) -> None:
        self.sock, self.out, self.into = sock, outgoing, incoming
        self.lead: Optional[int] = None  # how far it may be ahead of the other; None: as far as it likes
        self.waits_for_eof = False
        self.resets_at = _NEVER
        self.piece, self.pause_s = _PIECE, 0.0  # a slow reader takes small pieces, and pauses after each
        self._eof = self._shut = False

    def run(self) -> None:
        """Talk until both directions have ended. Wrong if a byte is; OSError as the sockets give it."""
        self.sock.setblocking(False)
        poller = select.poll()
        while not (self._eof and self._shut):
            if self.out.at + self.into.at >= self.resets_at:
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                return
            poller.register(self.sock, self._interest())
            events = poller.poll(_STALLED_MS)
            if not events:
                raise Wrong(f"nothing moved for {_STALLED_MS // 1000} s; sent {self.out.at}, received {self.into.at}")
            self._act(events[0][1])

    def _interest(self) -> int:
        reading = 0 if self._eof else select.POLLIN
        return reading | (select.POLLOUT if self._may_send or self._may_shut else 0)

    @property
    def _may_send(self) -> int:
        """How many bytes may be sent now."""
        if self.out.is_done or (self.waits_for_eof and not self._eof):
            return 0
        return _PIECE if self.lead is None else max(0, self.into.at + self.lead - self.out.at)

    @property
    def _may_shut(self) -> bool:
        return not self._shut and self.out.is_done and (self._eof or not self.waits_for_eof)

    def _act(self, events: int) -> None:
        if events & (select.POLLIN | select.POLLHUP | select.POLLERR) and not self._eof:
            self._receive()
        if self._may_shut:
            self.sock.shutdown(socket.SHUT_WR)
            self._shut = True
        elif events & select.POLLOUT and self._may_send:
            self.out.at += self.sock.send(self.out.next(self._may_send))

    def _receive(self) -> None:
        try:
            data = self.sock.recv(self.piece)
        except BlockingIOError:
            return
        if data:
            self.into.check(data)
        else:
            self._eof = True
            if not self.into.is_done:
                raise Wrong(f"an end of file after {self.into.at} of {self.into.total} bytes: a cut stream looks complete")
        if self.pause_s:
            time.sleep(self.pause_s)


def client_side(sock: socket.socket, plan: Plan) -> Talk:
    """The end that has sent the header."""
    talk = Talk(sock, Stream(plan.seed, plan.up), Stream(plan.seed + 1, plan.down))
    talk.lead = plan.message or None
    return talk


def far_side(sock: socket.socket, plan: Plan) -> Talk:
    """The end that has read it."""
    talk = Talk(sock, Stream(plan.seed + 1, plan.down), Stream(plan.seed, plan.up))
    talk.lead = 0 if plan.message else None
    talk.waits_for_eof, talk.resets_at = plan.after_eof, plan.far_resets_at
    return talk
