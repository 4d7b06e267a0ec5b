"""A capture file, whatever its format: told by its first bytes, read from its beginning to its end.

Knows the formats' readers. Knows nothing of what is in a frame.
"""

from __future__ import annotations

from typing import Callable, Dict

from _tsproxy.capture import pcap, pcapng
from _tsproxy.capture.records import Frames, NoCapture, Notes
from _tsproxy.capture.stream import Stream

_READERS: Dict[bytes, Callable[[Stream, bytes, Notes], Frames]] = {
    **dict.fromkeys(pcap.MAGIC, pcap.frames),
    pcapng.MAGIC: pcapng.frames,
}


def frames(path: str, notes: Notes) -> Frames:
    """Each frame of the capture; "-" is standard input. OSError if it can't be read, NoCapture if it is none."""
    stream = Stream(path)
    try:
        stream.open()
        head = stream.extend(b"", 0, 4)
        reader = _READERS.get(head[:4])
        if reader is None:
            raise NoCapture(stream.broken or ("empty" if not head else "neither pcap nor pcapng"))
        yield from reader(stream, head, notes)
        notes.problem = stream.broken or notes.problem
    finally:
        stream.close()
