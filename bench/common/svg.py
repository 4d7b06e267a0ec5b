"""A few SVG elements as text, escaped; nothing but the standard library."""

from __future__ import annotations

from typing import List, Sequence, Tuple
from xml.sax.saxutils import escape, quoteattr

FONT = "system-ui, 'Segoe UI', 'DejaVu Sans', Helvetica, Arial, sans-serif"
INK, FAINT, GRID = "#222222", "#666666", "#e4e4e4"


def element(name: str, content: str = "", /, **attributes: object) -> str:
    """Any element: `stroke_width` becomes stroke-width. `content` is taken as it is."""
    words = "".join(f" {key.rstrip('_').replace('_', '-')}={quoteattr(str(value))}" for key, value in attributes.items())
    return f"<{name}{words}>{content}</{name}>" if content else f"<{name}{words}/>"


def text(x: float, y: float, words: str, anchor: str = "start", **attributes: object) -> str:
    """One line of text; `anchor` is start, middle or end."""
    look = {"fill": INK, "font_size": 12, **attributes}
    return element("text", escape(words), x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, **look)


def line(x1: float, y1: float, x2: float, y2: float, colour: str = GRID, **attributes: object) -> str:
    """A straight line."""
    ends = {"x1": f"{x1:.1f}", "y1": f"{y1:.1f}", "x2": f"{x2:.1f}", "y2": f"{y2:.1f}"}
    return element("line", **ends, stroke=colour, **attributes)


def path(points: Sequence[Tuple[float, float]], colour: str, width: float, dashes: str = "") -> str:
    """A line through all points."""
    dashed = {"stroke_dasharray": dashes} if dashes else {}
    at = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return element("polyline", points=at, fill="none", stroke=colour, stroke_width=width, stroke_linejoin="round", **dashed)


def dot(x: float, y: float, colour: str) -> str:
    """A point that was measured."""
    return element("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=2.6, fill=colour)


def box(x: float, y: float, width: float, height: float, colour: str) -> str:
    """A filled rectangle."""
    return element("rect", x=f"{x:.1f}", y=f"{y:.1f}", width=f"{width:.1f}", height=f"{height:.1f}", fill=colour)


def document(width: float, height: float, parts: List[str]) -> str:
    """The whole file, on white."""
    size = {"width": f"{width:.0f}", "height": f"{height:.0f}", "viewBox": f"0 0 {width:.0f} {height:.0f}"}
    content = "\n".join(["", box(0, 0, width, height, "#ffffff"), *parts, ""])
    return element("svg", content, xmlns="http://www.w3.org/2000/svg", **size, font_family=FONT) + "\n"
