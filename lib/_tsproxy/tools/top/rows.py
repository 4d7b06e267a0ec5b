"""A row of the screen: texts with colours, cut or filled to a width, and the rules between parts that name columns.

Knows columns. Knows nothing of what stands in them.
"""

from __future__ import annotations

from typing import List, NamedTuple, Sequence, Tuple

from _tsproxy.tools.terminal import BOLD, DIM

Segment = Tuple[str, str]  # text, colour
Row = Sequence[Segment]
PLAIN, REVERSE = "", "7"


class Column(NamedTuple):
    """Of a table."""

    name: str
    width: int
    need: int  # how wide the screen must be


def fit(row: Row, columns: int) -> Row:
    """The row cut or filled to that width."""
    out: List[Segment] = []
    left = columns
    for text, code in row:
        if left and text:
            out.append((text[:left], code))
            left -= len(out[-1][0])
    return [*out, (" " * left, PLAIN)] if left else out


def ends(left: str, right: str, columns: int) -> str:
    """One text at each end; the right one only as far as there is room."""
    if len(left) >= columns:
        return shorten(left, columns)
    right = shorten(right, columns - len(left) - 2)
    return f"{left}{right:>{max(0, columns - len(left))}}"


def shorten(text: str, width: int) -> str:
    """Its end cut off, and a mark there."""
    if len(text) <= width:
        return text
    return f"{text[: width - 1]}…" if width > 0 else ""


def middle(text: str, width: int) -> str:
    """Cut in the middle: of an address both its beginning and its port tell something."""
    if len(text) <= width:
        return text
    return f"{text[: width - 9]}…{text[-8:]}" if width > 9 else text[:width]


def heading(columns: int, *names: Tuple[int, str]) -> Row:
    """A rule with the names of columns in it: (the column that a name begins at, or if negative ends before; name)."""
    row = ["─"] * columns
    for at, name in names:
        begin = at if at >= 0 else -at - len(name)
        if begin < columns:
            row[begin - 1 : begin + 1 + len(name)] = f" {name} "
    title = len(names[0][1]) + 3
    return [("".join(row[:2]), DIM), ("".join(row[2:title]), BOLD), ("".join(row[title:columns]), DIM)]
