#!/usr/bin/env python3
"""Draw what the pages show: the pictures, in light and dark, and the state diagrams.

    python3 docs/draw.py            write them
    python3 docs/draw.py --check    say which of them are not what would be drawn now; exit code 1 if any

The state diagrams come from the transition tables, the benchmark's picture from the figures in bench/NOTES.md, drawn by the
benchmarks' own code. Needs the checkout and nothing else.
"""

from __future__ import annotations

import re
import sys
from enum import IntEnum
from pathlib import Path
from types import ModuleType
from typing import Callable, Dict, Iterator, List, Mapping, Tuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "lib"), str(ROOT / "bench")]

from _tsproxy.proxy import states  # noqa: E402 -- the path comes first
from common import charts, svg  # noqa: E402

PICTURES = ROOT / "docs/pictures"
ARCHITECTURE = ROOT / "docs/architecture.md"
NOTES = ROOT / "bench/NOTES.md"

# What is drawn for a white page, and what takes its place on a dark one.
PAPER, INK, FAINT, GRID = "#ffffff", svg.INK, svg.FAINT, svg.GRID
BLUE, BLUE_FILL, GREY_FILL, RED, GREEN = "#0072b2", "#eaf3fa", "#f6f6f6", "#b5452c", "#2f7d4f"
DARK = {
    PAPER: "#0d1117",
    INK: "#e6edf3",
    FAINT: "#9198a1",
    GRID: "#30363d",
    BLUE: "#4aa8e0",
    BLUE_FILL: "#12283a",
    GREY_FILL: "#161b22",
    RED: "#f0876b",
    GREEN: "#6cc592",
}

Table = Mapping[Tuple[IntEnum, IntEnum], IntEnum]  # (state, event) -> the state after it


# The state diagrams


def tables(module: ModuleType) -> List[Table]:
    """The transition tables of a module: its dictionaries from (state, event) to a state."""
    found = [value for value in vars(module).values() if isinstance(value, dict) and value]
    return [table for table in found if all(_is_transition(key, after) for key, after in table.items())]


def _is_transition(key: object, after: object) -> bool:
    return isinstance(key, tuple) and len(key) == 2 and all(isinstance(part, IntEnum) for part in (*key, after))


def diagram(table: Table) -> str:
    """A table as Mermaid: it begins in the first state of its kind, and ends in those that nothing leads out of."""
    kind = type(next(iter(table.values())))
    left = {state for state, _ in table}
    lines = [f"[*] --> {next(iter(kind)).name}"]
    lines += [f"{state.name} --> {after.name}: {event.name}" for (state, event), after in table.items()]
    lines += [f"{state.name} --> [*]" for state in kind if state not in left]
    body = "\n".join(f"    {line}" for line in ("direction LR", *lines))
    return f"{(kind.__doc__ or kind.__name__).strip()}\n\n```mermaid\nstateDiagram-v2\n{body}\n```"


def architecture() -> str:
    """The page with the diagrams of the tables as they are now."""
    drawn = "\n\n".join(map(diagram, tables(states)))
    head, begin, rest = ARCHITECTURE.read_text().partition("<!-- states: begin -->\n")
    tail = rest.partition("<!-- states: end -->")[2]
    return f"{head}{begin}\n{drawn}\n\n<!-- states: end -->{tail}"


# The benchmark's picture


def measured(title: str, text: str) -> Dict[str, Dict[str, float]]:
    """Relay -> column -> value, of the table with that title. Its columns stand in a line of their own; ratios are left out."""
    lines = text[text.index(title) :].splitlines()[1:]
    columns = re.split(r"\s{2,}", lines[0].strip())
    found: Dict[str, Dict[str, float]] = {}
    for line in lines[1:]:
        name, *cells = line.split()
        values = [float(cell.replace(",", "")) for cell in cells if re.fullmatch(r"[\d,.]+", cell)]
        if len(values) != len(columns):
            return found
        found[name] = dict(zip(columns, values))
    return found


def latency() -> str:
    """A round trip through each relay: its median, and the slowest of a hundred."""
    titles = {"p50 us": "p50: half of the round trips are faster", "p99 us": "p99: one of a hundred is slower"}
    about = "closed loop, 1 connection, 64 bytes; a virtual machine with 2 CPUs, Python 3.11; direct is no relay at all"
    bars = _bars(measured("closed loop, 1 connection, 64 bytes", NOTES.read_text()), titles, lambda value: f"{value:g} us")
    return charts.document("A round trip, in microseconds", about, bars)


_RATES = {
    "round trips/s": "32 connections: round trips a second (more is better)",
    "one after the other/s": "connections a second, one after the other (more is better)",
    "32 under way/s": "connections a second, 32 under way at once (more is better)",
}


def rates() -> str:
    """What a CPU of each relay does: messages, and connections of both kinds."""
    about = "one CPU for each relay; naked is a loop in C, the limit; before is the code of the morning; Debian's Python 3.11"
    return charts.document("What one CPU does", about, _bars(measured("versus, ten rounds", NOTES.read_text()), _RATES, _rate))


def pythons() -> str:
    """The same by Python, as Debian builds it."""
    found = measured("versus, five rounds", NOTES.read_text())
    ours = {name: of for name, of in found.items() if name[0].isdigit()}
    titles = {column: title for column, title in _RATES.items() if column != "one after the other/s"}
    about = "the bundle, one worker on one CPU, Debian's own builds"
    return charts.document("tsproxy by Python", about, _bars(ours, titles, _rate))


def _rate(value: float) -> str:
    return f"{value:,.0f}"


def _bars(relays: Dict[str, Dict[str, float]], titles: Mapping[str, str], label: Callable[[float], str]) -> List[charts.Bars]:
    """Bars for each of these columns, under its title."""
    found = []
    for column, title in titles.items():
        values = {name: figures[column] for name, figures in relays.items()}
        found.append(charts.Bars(title, values, {name: label(value) for name, value in values.items()}))
    return found


# The other pictures


def _frame(x: float, y: float, width: float, height: float, fill: str = GREY_FILL, edge: str = FAINT) -> str:
    return svg.element("rect", x=x, y=y, width=width, height=height, rx=8, fill=fill, stroke=edge, stroke_width=1.4)


def _arrow(x1: float, y1: float, x2: float, y2: float, colour: str = INK) -> Iterator[str]:
    """A straight one, along an axis."""
    yield svg.line(x1, y1, x2, y2, colour, stroke_width=1.6)
    right, down = _sign(x2 - x1), _sign(y2 - y1)
    back = (x2 - 7 * right, y2 - 7 * down)
    corners = [(back[0] + side * down, back[1] + side * right) for side in (-4, 4)]
    points = " ".join(f"{x:g},{y:g}" for x, y in ((x2, y2), *corners))
    yield svg.element("polygon", points=points, fill=colour)


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _lines(x: float, y: float, lines: str, anchor: str = "middle", **attributes: object) -> Iterator[str]:
    """Lines of text, the first one at y."""
    for number, words in enumerate(lines.split("\n")):
        yield svg.text(x, y + 17 * number, words, anchor, **attributes)


def overview() -> str:
    """Client, tsproxy with its lever and witness, exchange; and the SYN of each leg."""
    parts = [_frame(20, 40, 150, 84), _frame(325, 20, 270, 124, BLUE_FILL, BLUE), _frame(750, 40, 150, 84)]
    parts += _lines(95, 78, "client", font_size=16, font_weight="bold")
    parts += _lines(95, 99, "any TCP client", fill=FAINT)
    parts += _lines(825, 78, "exchange", font_size=16, font_weight="bold")
    parts += _lines(825, 99, "sees no clock", fill=FAINT)
    parts += _lines(460, 46, "tsproxy", font_size=16, font_weight="bold")
    parts += _lines(460, 66, "makes a connection of its own,\nand relays once this one is proved", fill=FAINT)
    parts += [_frame(345, 96, 110, 36, PAPER, BLUE), _frame(465, 96, 110, 36, PAPER, BLUE)]
    parts += [svg.text(400, 119, "witness", "middle", fill=BLUE), svg.text(520, 119, "gate", "middle", fill=BLUE)]
    parts += [*_arrow(170, 82, 325, 82), *_arrow(595, 82, 750, 82)]
    parts += _lines(247, 50, "SYN, sackOK,\nTS val 1603407770", fill=RED, font_size=12)
    parts += _lines(672, 50, "SYN, sackOK,\nno timestamp", fill=GREEN, font_size=12)
    parts += [_frame(325, 186, 575, 58), *_arrow(400, 144, 400, 186, BLUE), *_arrow(520, 186, 520, 144, BLUE)]
    parts += _lines(392, 169, "a SYN of its own, on loopback", "end", fill=FAINT)
    parts += _lines(530, 169, "sysctl, TCP_INFO: before each SYN, before the first byte", "start", fill=FAINT)
    parts += _lines(612, 210, "the lever, pulled once by an administrator", font_weight="bold")
    parts += _lines(612, 230, "net.ipv4.tcp_timestamps=0 in a network namespace, or nftables rules", fill=FAINT)
    return svg.document(920, 264, parts)


def processes() -> str:
    """Who runs where, and what passes between them."""
    parts = [_frame(20, 20, 330, 372), _frame(560, 20, 340, 130, BLUE_FILL, BLUE), _frame(560, 172, 340, 100, BLUE_FILL, BLUE)]
    parts += [_frame(560, 300, 340, 92)]
    parts += _lines(40, 46, "main process", "start", font_size=15, font_weight="bold")
    threads = ("main: listeners, signals, timers", "evidence-IPv4, evidence-IPv6", "resolver", "reporter")
    for number, name in enumerate(threads):
        parts += [_frame(40, 62 + 82 * number, 290, 62, PAPER), *_lines(185, 98 + 82 * number, name)]
    parts += _lines(580, 46, "worker 0", "start", font_size=15, font_weight="bold")
    parts += _lines(580, 68, "a thread with an interpreter of its own, a process,\nor a thread: --runtime", "start", fill=FAINT)
    parts += _lines(580, 112, "loop: poller, timers, sessions", "start")
    parts += _lines(580, 132, "relay buffer, pipes: its own", "start", fill=FAINT)
    parts += _lines(580, 200, "worker 1 ...", "start", font_size=15, font_weight="bold")
    parts += _lines(580, 224, "the same", "start", fill=FAINT)
    parts += _lines(580, 328, "fork server", "start", font_size=15, font_weight="bold")
    parts += _lines(580, 350, "under processes only: forks workers,\nreaps them", "start", fill=FAINT)
    for y, words in ((84, "inbox: clients, commands"), (148, "evidence, a memfd"), (196, "asks for evidence")):
        forth = words != "asks for evidence"
        parts += [*_arrow(*((350, y, 560, y) if forth else (560, y, 350, y))), *_lines(455, y - 8, words, fill=FAINT)]
    for y, words in ((240, "counters, a memfd"), (268, "records, a pipe")):
        parts += [*_arrow(560, y, 350, y), *_lines(455, y - 8, words, fill=FAINT)]
    parts += [*_arrow(350, 346, 560, 346), *_lines(455, 338, "worker arguments", fill=FAINT)]
    parts += [*_arrow(185, 392, 185, 424), *_lines(200, 414, "JSON lines, to standard output", "start", fill=FAINT)]
    return svg.document(920, 436, parts)


# All of it

DRAWN: Mapping[str, Callable[[], str]] = {
    "overview": overview,
    "processes": processes,
    "latency": latency,
    "rates": rates,
    "pythons": pythons,
}


def files() -> Dict[Path, str]:
    """Each file that is drawn, and its content as it should be."""
    found = {ARCHITECTURE: architecture()}
    for name, draw in DRAWN.items():
        light = draw()
        dark = re.sub("#[0-9a-f]{6}", lambda match: DARK.get(match[0], match[0]), light)
        found.update({PICTURES / f"{name}-light.svg": light, PICTURES / f"{name}-dark.svg": dark})
    return found


def stale() -> List[Path]:
    """Those that are not as they should be."""
    return [path for path, text in files().items() if not path.exists() or path.read_text() != text]


def main(words: List[str]) -> int:
    """Write, or only compare; the exit code."""
    if words not in ([], ["--check"]):
        print(__doc__, file=sys.stderr)
        return 2
    found = stale()
    for path in found:
        print(path.relative_to(ROOT))
        if not words:
            PICTURES.mkdir(exist_ok=True)
            path.write_text(files()[path])
    return 1 if words and found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
