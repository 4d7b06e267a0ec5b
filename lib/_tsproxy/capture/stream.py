"""The bytes of a capture, in pieces: a file, a pipe, standard input; gzip is unpacked on the way (RFC 1952).

Knows descriptors and gzip. Knows nothing of what the bytes mean. Holds a piece at a time, however long the file is.
"""

from __future__ import annotations

import os
import zlib
from typing import Any

_PIECE = 1 << 18
_GZIP = b"\x1f\x8b"
_WITH_HEADER = 16 + zlib.MAX_WBITS  # zlib(3), inflateInit2(): a gzip header and trailer are expected


class Stream:
    """An open capture. `broken` says why its bytes ended before the capture did, "" if they did not."""

    def __init__(self, path: str) -> None:
        """OSError if `path` can't be opened; "-" is standard input, which close() leaves open."""
        self._fd = 0 if path == "-" else os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._packed = b""
        self._unzip: Any = None  # what zlib.decompressobj() returns, once the file is known for gzip
        self._inside = False  # a member of the gzip file has begun and has not ended
        self.broken = ""
        self._head = b""

    def open(self) -> None:
        """Read the first two bytes, which tell gzip. OSError, e.g. EISDIR."""
        while len(self._head) < len(_GZIP):
            piece = os.read(self._fd, len(_GZIP) - len(self._head))
            if not piece:
                return
            self._head += piece
        if self._head == _GZIP:
            self._packed, self._head = self._head, b""
            self._unzip = zlib.decompressobj(_WITH_HEADER)

    def extend(self, data: bytes, at: int, size: int) -> bytes:
        """`data` from `at` on with more behind it: at least `size` bytes, fewer only at the end."""
        pieces = [data[at:]]
        have = len(pieces[0])
        while have < size:
            pieces.append(self._piece())
            have += len(pieces[-1])
            if not pieces[-1]:
                break
        return b"".join(pieces)

    def _piece(self) -> bytes:
        """The next bytes as soon as there are any, b"" at the end. Where gzip can't be unpacked is an end, too."""
        if self._head:
            head, self._head = self._head, b""
            return head
        return os.read(self._fd, _PIECE) if self._unzip is None else self._unpacked()

    def _unpacked(self) -> bytes:
        data = b""
        while not data and not self.broken:
            self._packed = self._packed or os.read(self._fd, _PIECE)
            at_end = not self._packed
            data = self._inflate()
            if at_end and not data:
                self.broken = "the gzip file is cut short" if self._inside else ""
                break
        return data

    def _inflate(self) -> bytes:
        """At most a piece out of what is packed. A member may follow another one (RFC 1952, section 2.2)."""
        try:
            data: bytes = self._unzip.decompress(self._packed, _PIECE)
        except zlib.error:
            self.broken = "the gzip file is damaged"
            return b""
        self._inside = self._inside or bool(self._packed)
        self._packed = self._unzip.unconsumed_tail
        if self._unzip.eof:
            self._packed, self._inside = self._unzip.unused_data, False
            self._unzip = zlib.decompressobj(_WITH_HEADER)
        return data

    def close(self) -> None:
        """Close the file."""
        if self._fd:
            os.close(self._fd)
