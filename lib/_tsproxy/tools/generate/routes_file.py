"""Routes back as a file of routes: what a set-up puts where tsproxy runs, with the listeners that it has there.

Knows the keys of a section and how their values are spelled. Knows nothing of the set-ups.
"""

from __future__ import annotations

from typing import Callable, Iterator, List, Sequence

from _tsproxy.cli.config import Config, Route
from _tsproxy.cli.routes import KEYS
from _tsproxy.cli.words import spelled

LISTENING = ("port", "bind")
_ORDER = ("target", *LISTENING)  # the others follow


def text(config: Config, remark: Callable[[Route], str], without: Sequence[str] = ()) -> str:
    """The file: each section has all that [DEFAULT] said for it, and under its heading the remark as a comment.

    Where a section says nothing `config.defaults` holds: the file is read beside the options of the same command line.
    """
    keys = [key for key in dict.fromkeys((*_ORDER, *KEYS)) if key not in without]
    sections = [[f"[{route.name}]", f"# {remark(route)}", *_lines(config, route, keys)] for route in config.routes]
    return "\n\n".join("\n".join(section) for section in sections) + "\n"


def _lines(config: Config, route: Route, keys: Sequence[str]) -> Iterator[str]:
    for key in keys:
        entry = KEYS[key]
        value = getattr(route, entry.field)
        if key in ("target", "port") or value != getattr(config.defaults, entry.field):
            values: List[str] = list(map(str, value)) if entry.repeats else [spelled(value)]
            yield f"{key} = " + f"\n{' ' * len(key)}   ".join(values)
