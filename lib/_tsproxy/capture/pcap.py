"""Frames of a pcap file, in us or ns and either byte order (draft-ietf-opsawg-pcap).

Knows the file's and the records' headers. Knows nothing of what is in a frame.
"""

from __future__ import annotations

import struct

from _tsproxy.capture.records import LONGEST, Frames, NoCapture, Notes
from _tsproxy.capture.stream import Stream

# The magic number as it stands in the file -> byte order, ns in a unit of the fraction
MAGIC = {
    b"\xd4\xc3\xb2\xa1": ("<", 1000),
    b"\xa1\xb2\xc3\xd4": (">", 1000),
    b"\x4d\x3c\xb2\xa1": ("<", 1),
    b"\xa1\xb2\x3c\x4d": (">", 1),
}
_FILE_HEADER, _RECORD_HEADER = 24, 16


def frames(stream: Stream, data: bytes, notes: Notes) -> Frames:
    """Each frame of a file whose first bytes are `data`. Where it is cut or damaged it ends, and the notes say so."""
    data = stream.extend(data, 0, _FILE_HEADER)
    if len(data) < _FILE_HEADER:
        raise NoCapture("a pcap file that is cut in its header")
    order, fraction_ns = MAGIC[data[:4]]
    link = struct.unpack_from(order + "I", data, 20)[0] & 0xFFFF  # above it: whether frames end with a checksum
    header = struct.Struct(order + "IIII").unpack_from
    at = _FILE_HEADER
    while True:
        if at + _RECORD_HEADER > len(data):
            data, at = stream.extend(data, at, _RECORD_HEADER), 0
            if len(data) < _RECORD_HEADER:
                notes.problem = "it is cut in its last record" if data else ""
                return
        seconds, fraction, size, length = header(data, at)
        if size > LONGEST:
            notes.problem = f"a record of {size} bytes: it is damaged from there on"
            return
        end = at + _RECORD_HEADER + size
        if end > len(data):
            data, at, end = stream.extend(data, at, _RECORD_HEADER + size), 0, _RECORD_HEADER + size
            if end > len(data):
                notes.problem = "it is cut in its last record"
                return
        yield seconds * 1_000_000_000 + fraction * fraction_ns, link, data[at + _RECORD_HEADER : end], length
        at = end
