"""Records from workers to the reporter through a pipe: one frame for each record, one write(2) for each frame.

A frame has at most PIPE_BUF (4,096) bytes, so that write(2) is atomic (pipe(7)) and several workers can share the pipe. The
pipe is non-blocking: on EAGAIN the record is dropped and counted.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import sys
import termios
import time
from typing import Iterator, List, NamedTuple, Optional, Tuple, Union

from _tsproxy.linux import uapi
from _tsproxy.linux.addresses import PACKED_SIZE, is_packed
from _tsproxy.linux.needs import needing
from _tsproxy.stats.counters import Counter
from _tsproxy.stats.endings import Ending

_HEADER = struct.Struct("=HB")  # size of the whole frame, kind
_CONNECTION, _NOTICE, _WAKE = 1, 2, 3
_WAKE_FRAME = _HEADER.pack(_HEADER.size, _WAKE)
_WAKE_NS = 1_000_000_000
_BODY = struct.Struct(f"=HIQq{PACKED_SIZE}sqBBbq{PACKED_SIZE}sqb{PACKED_SIZE}sqqqqQQQQQ")
_CONNECTION_FRAME = struct.Struct(_HEADER.format + _BODY.format[1:])
_NOTICE_BODY = struct.Struct("=HqBi")
_PIPE_BYTES = 1 << 20  # fs.pipe-max-size, what an unprivileged process may ask for
_READ_BYTES = 1 << 16
_INT = struct.Struct("i")  # what FIONREAD answers (ioctl_tty(2))
_NO_ADDRESS = bytes(PACKED_SIZE)
NOTICE_LEVELS = ("debug", "info", "warning", "error")


class ConnectionRecord(NamedTuple):
    """The access-log entry of one session. Addresses are packed; None: not known."""

    worker: int
    route: int  # its number, by which the reporter knows its name
    connection_id: int
    closed_at_ns: int  # CLOCK_REALTIME
    client: bytes
    duration_us: int
    ending: Ending
    witness: int
    client_timestamps: Optional[bool] = None
    client_syn_tsval: Optional[int] = None
    upstream: Optional[bytes] = None
    connect_us: Optional[int] = None
    upstream_timestamps: Optional[bool] = None
    upstream_local: Optional[bytes] = None
    upstream_rtt_us: Optional[int] = None
    upstream_retransmits: Optional[int] = None
    upstream_segments_sent: Optional[int] = None
    upstream_segments_received: Optional[int] = None
    rx_bytes: int = 0
    tx_bytes: int = 0  # acknowledged by the client's kernel
    upstream_tx_bytes: int = 0  # acknowledged by the upstream one's
    discarded_bytes: int = 0  # received, not acknowledged by the other side, and discarded
    unacknowledged_bytes: int = 0  # received, not acknowledged by the other side, and left to the kernel to deliver


class Notice(NamedTuple):
    """A log line of a worker, e.g. a bug's traceback. `level` is one of NOTICE_LEVELS, and the line's event."""

    worker: int
    at_ns: int
    level: str
    message: str
    route: Optional[int] = None  # the number of the one that it is about


Record = Union[ConnectionRecord, Notice]
_ENDINGS = tuple(Ending)
_BOOLEANS = {0: False, 1: True, -1: None}


def _number(route: Optional[int]) -> int:
    return -1 if route is None else route


def encode(record: Record) -> bytes:
    """The frame of one record."""
    if isinstance(record, ConnectionRecord):
        return _encode_connection(record)
    text = record.message.encode("utf-8", "backslashreplace")[: uapi.PIPE_BUF - _HEADER.size - _NOTICE_BODY.size]
    body = _NOTICE_BODY.pack(record.worker, record.at_ns, NOTICE_LEVELS.index(record.level), _number(record.route)) + text
    return _HEADER.pack(_HEADER.size + len(body), _NOTICE) + body


def _encode_connection(record: ConnectionRecord) -> bytes:
    """None is -1, or an address of zeros. Written out: it is done for each connection."""
    (worker, route, connection_id, closed_at_ns, client, duration_us, ending, witness, client_timestamps, client_syn_tsval,
     upstream, connect_us, upstream_timestamps, local, rtt_us, retransmits, segments_sent, segments_received,
     *counts) = record  # fmt: skip
    return _CONNECTION_FRAME.pack(
        _CONNECTION_FRAME.size,
        _CONNECTION,
        worker,
        route,
        connection_id,
        closed_at_ns,
        client,
        duration_us,
        ending,
        witness,
        -1 if client_timestamps is None else client_timestamps,
        -1 if client_syn_tsval is None else client_syn_tsval,
        upstream or _NO_ADDRESS,
        -1 if connect_us is None else connect_us,
        -1 if upstream_timestamps is None else upstream_timestamps,
        local or _NO_ADDRESS,
        -1 if rtt_us is None else rtt_us,
        -1 if retransmits is None else retransmits,
        -1 if segments_sent is None else segments_sent,
        -1 if segments_received is None else segments_received,
        *counts,
    )


def decode(data: bytes) -> Tuple[List[Record], bytes]:
    """The complete records in `data`, and the bytes of an incomplete last one.

    A malformed frame becomes a Notice that says so. After a frame of an impossible size the rest of `data` is discarded.
    """
    found: List[Record] = []
    start = 0
    while len(data) - start >= _HEADER.size:
        size, kind = _HEADER.unpack_from(data, start)
        if not _HEADER.size <= size <= uapi.PIPE_BUF:
            return [*found, _malformed(kind, data[start + _HEADER.size :])], b""
        if len(data) - start < size:
            break
        if kind != _WAKE:
            found.append(_decode_one(kind, data[start + _HEADER.size : start + size]))
        start += size
    return found, data[start:]


def _decode_one(kind: int, body: bytes) -> Record:
    try:
        return _notice(body) if kind == _NOTICE else _connection(kind, body)
    except (IndexError, KeyError, ValueError, struct.error):
        return _malformed(kind, body)


def _malformed(kind: int, body: bytes) -> Notice:
    worker = int.from_bytes(body[:2], sys.byteorder)  # first in either body
    return Notice(worker, time.time_ns(), "error", f"a record can't be read: kind {kind}, {len(body)} bytes: {body[:64].hex()}")


def _notice(body: bytes) -> Notice:
    worker, at_ns, level, route = _NOTICE_BODY.unpack_from(body)
    if at_ns < 0 or route < -1:
        raise ValueError
    text = body[_NOTICE_BODY.size :].decode("utf-8", "replace")
    return Notice(worker, at_ns, NOTICE_LEVELS[level], text, None if route == -1 else route)


def _connection(kind: int, body: bytes) -> ConnectionRecord:
    """The record in a frame. ValueError, or the like, if it is malformed: a corrupt worker may write any bytes."""
    (worker, route, connection_id, closed_at_ns, client, duration_us, ending, witness, client_timestamps, client_syn_tsval,
     upstream, connect_us, upstream_timestamps, local, rtt_us, retransmits, segments_sent, segments_received,
     *counts) = _BODY.unpack(body)  # fmt: skip
    if kind != _CONNECTION or closed_at_ns < 0 or duration_us < 0 or not is_packed(client):
        raise ValueError
    return ConnectionRecord(
        worker,
        route,
        connection_id,
        closed_at_ns,
        client,
        duration_us,
        _ENDINGS[ending],
        witness,
        _BOOLEANS[client_timestamps],
        None if client_syn_tsval == -1 else _checked(client_syn_tsval, 2**32),
        None if upstream == _NO_ADDRESS else _checked_address(upstream),
        None if connect_us == -1 else _checked(connect_us, 2**63),
        _BOOLEANS[upstream_timestamps],
        None if local == _NO_ADDRESS else _checked_address(local),
        None if rtt_us == -1 else _checked(rtt_us, 2**32),
        None if retransmits == -1 else _checked(retransmits, 2**32),
        None if segments_sent == -1 else _checked(segments_sent, 2**63),
        None if segments_received == -1 else _checked(segments_received, 2**63),
        *counts,
    )


def _checked(number: int, end: int) -> int:
    if not 0 <= number < end:
        raise ValueError
    return number


def _checked_address(packed: bytes) -> bytes:
    if not is_packed(packed):
        raise ValueError
    return packed


class RecordPipe(NamedTuple):
    """The two ends of the pipe, both non-blocking. Plain numbers, so the writer can be passed to another interpreter."""

    reader: int
    writer: int

    @classmethod
    def create(cls) -> RecordPipe:
        """A new pipe, of 1 MiB if F_SETPIPE_SZ allows it."""
        with needing("pipe2(2)", "for what workers report"):
            pipe = cls(*os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC))
        try:
            fcntl.fcntl(pipe.writer, uapi.F_SETPIPE_SZ, _PIPE_BYTES)
        except OSError:
            pass  # EPERM, beyond fs.pipe-user-pages-soft: with the default size records are dropped, and counted, earlier
        return pipe

    def read(self) -> Iterator[bytes]:
        """The bytes that FIONREAD reports now, in chunks. Later ones wait for the next call: a busy writer must not keep it."""
        remaining = _INT.unpack(fcntl.ioctl(self.reader, termios.FIONREAD, bytes(_INT.size)))[0]
        while remaining:
            data = os.read(self.reader, min(remaining, _READ_BYTES))
            remaining -= len(data)
            yield data


class RecordWriter:
    """A worker's end of the pipe: writes a record, or counts it as dropped in the worker's own row."""

    def __init__(self, fd: int, row: memoryview) -> None:
        self._fd = fd
        self._row = row
        self._woke_ns = -_WAKE_NS

    def wake(self, now_ns: int) -> None:
        """Wake the reader, which sleeps while no session is open, by a frame that says nothing. Once a second at most."""
        if now_ns - self._woke_ns >= _WAKE_NS:
            self._woke_ns = now_ns
            with contextlib.suppress(BlockingIOError, BrokenPipeError):  # full: the reader has been woken by what is in it
                os.write(self._fd, _WAKE_FRAME)

    def put(self, record: Record) -> None:
        """Write one record. EAGAIN (the pipe is full) and EPIPE (no reader) drop it."""
        try:
            os.write(self._fd, encode(record))
        except (BlockingIOError, BrokenPipeError):
            self._row[Counter.LINES_DROPPED] += 1
