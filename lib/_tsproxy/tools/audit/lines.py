"""What tsproxy's own JSON lines say of its connections: a file that may be concatenated, rotated, packed by gzip, cut.

Knows the lines' events and fields, and that a file may hold anything. Knows nothing of captures.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import socket
from collections import Counter
from contextlib import closing
from typing import Any, Dict, Iterator, NamedTuple, Optional, Tuple

from _tsproxy.capture.stream import Stream
from _tsproxy.cli.config import DEFAULT_ROUTE, UsageError

End = Tuple[str, int]
_LONGEST = 1 << 16  # a line of tsproxy's has 4,096 bytes at most
_TIME = re.compile(r"(\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?Z", re.ASCII)
_EPOCH = datetime.datetime(1970, 1, 1)
CLEAN, STAMPED, EITHER, NOTHING = "clean", "stamped", "either", "nothing"  # what a line claims of its upstream leg


class Claim(NamedTuple):
    """A `connection` line: when it began and was closed, its upstream leg's ends, its client, and what it says of the leg.

    `clean`: no timestamp was negotiated, or under `rewrite` the constant one; `either`: one was negotiated, and the `start`
    line that would tell which is missing, as it is once a file was rotated; `nothing`: there was nothing to be seen.
    """

    begun_ns: int
    closed_ns: int
    local: End
    upstream: End
    client: Optional[End]
    leg: str


class Lines:
    """The claims of a file, one after the other; `skipped` counts the other lines by why."""

    def __init__(self, path: str) -> None:
        """`-` is standard input."""
        self.skipped: Counter[str] = Counter()
        self.path = path
        self._modes: Dict[str, Dict[Any, Any]] = {}  # of each pid by route, since its latest `start` line

    def refuse(self) -> None:
        """UsageError now, for what can be told without reading."""
        if self.path == "-":
            return
        if os.path.isdir(self.path):
            raise _unreadable(self.path, "it is a directory")
        if not os.access(self.path, os.R_OK):
            raise _unreadable(self.path, "it can't be read" if os.path.exists(self.path) else "no such file")

    def __iter__(self) -> Iterator[Claim]:
        """UsageError for a file that can't be read, or not to its end."""
        for line in _split(self.path):
            claim = self._claim(line)
            if claim:
                yield claim

    def _claim(self, line: bytes) -> Optional[Claim]:
        try:
            fields = json.loads(line)
            event = fields["event"]
        except (ValueError, TypeError, KeyError, RecursionError):
            self.skipped["unreadable"] += 1
            return None
        if event in ("start", "route"):
            self._note_mode(event, fields)
        if event != "connection":
            self.skipped["other"] += 1
            return None
        try:
            return _claim(fields, self._mode(fields))
        except (ValueError, TypeError, KeyError, AttributeError, OSError, OverflowError):
            self.skipped["without both ends" if fields.get("upstream_local_address") is None else "unreadable"] += 1
            return None

    def _note_mode(self, event: str, fields: Dict[str, Any]) -> None:
        """What a process, or one of its routes, was asked for. Only the `route` lines tell it where there are several."""
        of_process = self._modes.setdefault(str(fields.get("pid")), {})
        if event == "start":
            of_process.clear()
        of_process[str(fields.get("route", DEFAULT_ROUTE))] = fields.get("timestamps")

    def _mode(self, fields: Dict[str, Any]) -> Any:
        """The mode of a `connection` line's route; None where the line that has it is missing."""
        return self._modes.get(str(fields.get("pid")), {}).get(str(fields.get("route", DEFAULT_ROUTE)))


def _claim(fields: Dict[str, Any], mode: Any) -> Claim:
    """Raises what a field raises that is missing or of another kind."""
    closed_ns = _ns(fields["timestamp"])
    local, upstream = _end(fields, "upstream_local"), _end(fields, "upstream")
    client = _end(fields, "client") if fields.get("client_address") else None
    leg = _leg(fields.get("upstream_timestamps"), mode)
    return Claim(closed_ns - int(fields["duration_us"]) * 1000, closed_ns, local, upstream, client, leg)


def _leg(stamped: Any, mode: Any) -> str:
    if stamped is None:
        return NOTHING
    if not stamped or mode == "rewrite":
        return CLEAN
    return EITHER if mode is None else STAMPED


def _end(fields: Dict[str, Any], name: str) -> End:
    """In the spelling that a capture's addresses have."""
    address, port = fields[f"{name}_address"].partition("%")[0], fields[f"{name}_port"]
    if not isinstance(port, int):
        raise TypeError
    if ":" in address:
        packed = socket.inet_pton(socket.AF_INET6, address)
        mapped = packed[:12] == b"\0" * 10 + b"\xff\xff"
        address = socket.inet_ntop(*((socket.AF_INET, packed[12:]) if mapped else (socket.AF_INET6, packed)))
    return address, port


def _ns(text: str) -> int:
    """Nanoseconds since 1970 of RFC 3339, as tsproxy writes it."""
    found = _TIME.fullmatch(text)
    if not found:
        raise ValueError
    seconds = (datetime.datetime.fromisoformat(found[1]) - _EPOCH) // datetime.timedelta(seconds=1)
    return seconds * 1_000_000_000 + int((found[2] or "").ljust(9, "0"))


def _split(path: str) -> Iterator[bytes]:
    """Its lines, the empty ones left out; of one that is too long to be tsproxy's only the beginning, which is no JSON."""
    try:
        with closing(Stream(path)) as stream:
            stream.open()
            yield from _lines(stream)
            if stream.broken:
                raise _unreadable(path, stream.broken)
    except OSError as problem:
        raise _unreadable(path, problem.strerror or str(problem)) from None


def _unreadable(path: str, why: str) -> UsageError:
    return UsageError(
        f"--lines: given {path!r}: {why}; allowed: a file of tsproxy's JSON lines (gzip too), or - for standard input"
    )


def _lines(stream: Stream) -> Iterator[bytes]:
    rest = b""
    while True:
        piece = stream.extend(b"", 0, 1)
        *whole, rest = (rest + piece).split(b"\n")
        yield from filter(None, whole)
        rest = rest[:_LONGEST]
        if not piece:
            if rest:
                yield rest
            return
