"""How to write for people: which characters and colours standard output can take, and text that fits 80 columns."""

from __future__ import annotations

import os
import re
from typing import Iterator, List, Mapping, NamedTuple, TextIO

from _tsproxy.linux.printable import printable

WIDTH = 80
GREEN, RED, YELLOW, BOLD, DIM = "32", "31", "33", "1", "2"
_PLAIN = str.maketrans("┌┐└┘─│├┤▶→█▏▁▂▃▄▅▆▇≤…", "++++-|++>>#._.:-=+*<~")


class Style(NamedTuple):
    """What the output can show."""

    wide: bool  # characters beyond ASCII
    coloured: bool

    def paint(self, text: str, code: str) -> str:
        """The text in that colour, or as it is."""
        return f"\x1b[{code}m{text}\x1b[0m" if self.coloured and text else text

    def fit(self, text: str) -> str:
        """The text with each wide character that we use turned into ASCII where it must be."""
        return text if self.wide else text.translate(_PLAIN).encode("ascii", "replace").decode()


def style_of(stream: TextIO, environment: Mapping[str, str] = os.environ) -> Style:
    """Wide characters on UTF-8; colours on a terminal unless NO_COLOR (https://no-color.org) or a dumb one says no.

    LC_ALL=C means ASCII, though Python takes it for UTF-8 (PEP 540).
    """
    encoding = (stream.encoding or "").lower().replace("-", "").replace("_", "")
    ascii_only = environment.get("LC_ALL") in ("C", "POSIX") and "PYTHONIOENCODING" not in environment
    plain = environment.get("NO_COLOR") or environment.get("TERM") == "dumb"
    return Style(encoding == "utf8" and not ascii_only, stream.isatty() and not plain)


def wrapped(text: str, width: int) -> List[str]:
    """Lines of at most `width`, broken behind spaces and commas; a longer word stays whole, for it may be copied.

    Nothing in them acts on a terminal.
    """
    return list(_lines(printable(text), width)) or [""]


def _lines(text: str, width: int) -> Iterator[str]:
    line = ""
    for piece in re.findall(r"[^ ,]*(?:[ ,]+|$)", text):
        if line and len((line + piece).rstrip()) > width:
            yield line.rstrip()
            line = ""
        line += piece
    if line:
        yield line.rstrip()
