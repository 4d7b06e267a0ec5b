"""Records from workers to the reporter through a pipe: one frame for each record, one write(2) for each frame.

A frame has at most PIPE_BUF (4,096) bytes, so that write(2) is atomic (pipe(7)) and several workers can share the pipe. The
pipe is non-blocking: on EAGAIN the record is dropped and counted.
"""

from __future__ import annotations

import fcntl
import os
import struct
import sys
import termios
import time
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple, Union

from _tsproxy.linux import uapi
from _tsproxy.linux.addresses import PACKED_SIZE, is_packed, unpack
from _tsproxy.linux.needs import needing
from _tsproxy.stats.counters import Counter
from _tsproxy.stats.endings import ENDING_FIELDS, Ending

_HEADER = struct.Struct("=HB")  # size of the whole frame, kind
_CONNECTION, _NOTICE = 1, 2
_BODY = struct.Struct(f"=HQq{PACKED_SIZE}sqBBbq{PACKED_SIZE}sqb{PACKED_SIZE}sqqQQQQQ")
_NOTICE_BODY = struct.Struct("=HqB")
_PIPE_BYTES = 1 << 20  # fs.pipe-max-size, what an unprivileged process may ask for
_READ_BYTES = 1 << 16
_INT = struct.Struct("i")  # what FIONREAD answers (ioctl_tty(2))
_NO_ADDRESS = bytes(PACKED_SIZE)
NOTICE_LEVELS = ("debug", "info", "warning", "error")


class ConnectionRecord(NamedTuple):
    """The access-log entry of one session. Addresses are packed; None: not known."""

    worker: int
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
    rx_bytes: int = 0
    tx_bytes: int = 0  # acknowledged by the client's kernel
    upstream_tx_bytes: int = 0  # acknowledged by the upstream one's
    discarded_bytes: int = 0  # received, not acknowledged by the other side, and discarded
    unacknowledged_bytes: int = 0  # received, not acknowledged by the other side, and left to the kernel to deliver

    def fields(self) -> Dict[str, object]:
        """The fields of its JSON line, in order, without `witness`."""
        client, codes = unpack(self.client), ENDING_FIELDS[self.ending]
        upstream = unpack(self.upstream) if self.upstream else None
        local = unpack(self.upstream_local) if self.upstream_local else None
        return {
            "connection_id": self.connection_id,
            "worker": self.worker,
            "client_address": client.ip,
            "client_port": client.port,
            "upstream_address": upstream and upstream.ip,
            "upstream_port": upstream and upstream.port,
            "upstream_local_address": local and local.ip,
            "upstream_local_port": local and local.port,
            "duration_us": self.duration_us,
            "connect_us": self.connect_us,
            "rx_bytes": self.rx_bytes,
            "tx_bytes": self.tx_bytes,
            "upstream_tx_bytes": self.upstream_tx_bytes,
            "discarded_bytes": self.discarded_bytes,
            "unacknowledged_bytes": self.unacknowledged_bytes,
            "client_timestamps": self.client_timestamps,
            "client_syn_tsval": self.client_syn_tsval,
            "upstream_timestamps": self.upstream_timestamps,
            "upstream_rtt_us": self.upstream_rtt_us,
            "upstream_retransmits": self.upstream_retransmits,
            "reason": codes.reason,
            "termination_state": codes.termination_state,
        }


class Notice(NamedTuple):
    """A log line of a worker, e.g. a bug's traceback. `level` is one of NOTICE_LEVELS, and the line's event."""

    worker: int
    at_ns: int
    level: str
    message: str


Record = Union[ConnectionRecord, Notice]
_POSITIONS = {name: position for position, name in enumerate(ConnectionRecord._fields)}
_OPTIONAL_ADDRESSES = (_POSITIONS["upstream"], _POSITIONS["upstream_local"])
_BOOLEANS = (_POSITIONS["client_timestamps"], _POSITIONS["upstream_timestamps"])
# Numbers that may be None, which is -1 in a frame, and their maximum.
_OPTIONAL_NUMBERS = {
    **dict.fromkeys(_BOOLEANS, 1),
    _POSITIONS["connect_us"]: 2**63 - 1,
    **{_POSITIONS[name]: 2**32 - 1 for name in ("client_syn_tsval", "upstream_rtt_us", "upstream_retransmits")},
}


def _without_none(record: ConnectionRecord) -> List[Any]:
    values: List[Any] = list(record)
    for position in _OPTIONAL_ADDRESSES:
        values[position] = values[position] or _NO_ADDRESS
    for position in _OPTIONAL_NUMBERS:
        if values[position] is None:
            values[position] = -1
    return values


def encode(record: Record) -> bytes:
    """The frame of one record."""
    if isinstance(record, ConnectionRecord):
        body, kind = _BODY.pack(*_without_none(record)), _CONNECTION
    else:
        text = record.message.encode("utf-8", "backslashreplace")[: uapi.PIPE_BUF - _HEADER.size - _NOTICE_BODY.size]
        body = _NOTICE_BODY.pack(record.worker, record.at_ns, NOTICE_LEVELS.index(record.level)) + text
        kind = _NOTICE
    return _HEADER.pack(_HEADER.size + len(body), kind) + body


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
        found.append(_decode_one(kind, data[start + _HEADER.size : start + size]))
        start += size
    return found, data[start:]


def _decode_one(kind: int, body: bytes) -> Record:
    try:
        return _notice(body) if kind == _NOTICE else _connection(kind, body)
    except (IndexError, ValueError, struct.error):
        return _malformed(kind, body)


def _malformed(kind: int, body: bytes) -> Notice:
    worker = int.from_bytes(body[:2], sys.byteorder)  # first in either body
    return Notice(worker, time.time_ns(), "error", f"a record can't be read: kind {kind}, {len(body)} bytes: {body[:64].hex()}")


def _notice(body: bytes) -> Notice:
    worker, at_ns, level = _NOTICE_BODY.unpack_from(body)
    if at_ns < 0:
        raise ValueError
    return Notice(worker, at_ns, NOTICE_LEVELS[level], body[_NOTICE_BODY.size :].decode("utf-8", "replace"))


def _connection(kind: int, body: bytes) -> ConnectionRecord:
    """The record in a frame. ValueError if it is malformed: a worker whose memory is corrupt may write any bytes."""
    values = list(_BODY.unpack(body))
    for position in _OPTIONAL_ADDRESSES:
        values[position] = None if values[position] == _NO_ADDRESS else values[position]
    addresses = [values[position] for position in (_POSITIONS["client"], *_OPTIONAL_ADDRESSES) if values[position] is not None]
    if kind != _CONNECTION or not all(map(is_packed, addresses)):
        raise ValueError
    if values[_POSITIONS["closed_at_ns"]] < 0 or values[_POSITIONS["duration_us"]] < 0:
        raise ValueError
    for position, maximum in _OPTIONAL_NUMBERS.items():
        if values[position] == -1:
            values[position] = None
        elif not 0 <= values[position] <= maximum:
            raise ValueError
        elif position in _BOOLEANS:
            values[position] = bool(values[position])
    values[_POSITIONS["ending"]] = Ending(values[_POSITIONS["ending"]])
    return ConnectionRecord(*values)


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

    def put(self, record: Record) -> None:
        """Write one record. EAGAIN (the pipe is full) and EPIPE (no reader) drop it."""
        try:
            os.write(self._fd, encode(record))
        except (BlockingIOError, BrokenPipeError):
            self._row[Counter.LINES_DROPPED] += 1
