"""What a set-up can't do, as one line: with the option of a command line, or with the file and its sections.

Knows where an option was given. Knows nothing of what is allowed.
"""

from __future__ import annotations

from typing import Sequence

from _tsproxy.cli import exits
from _tsproxy.cli.config import Config
from _tsproxy.cli.exits import Exit

_MOST_NAMES = 5


def refused(config: Config, names: Sequence[str], option: str, given: object, allowed: str) -> Exit:
    """Exit 2 for the value of an option of these routes, "" for none; `allowed` begins behind that word.

    In a file the line is that of the first of them.
    """
    problem = f"{option}: given {repr(str(given)) if given != '' else 'nothing'}; allowed {allowed}"
    if config.places is None:
        return Exit(exits.USAGE, f"--{problem}")
    return Exit(exits.USAGE, f"{config.places.of(names[0], option)}: {named([f'[{name}]' for name in names])} {problem}")


def named(names: Sequence[str]) -> str:
    """As many names as a line can have."""
    if len(names) <= _MOST_NAMES:
        return ", ".join(names)
    return f"{', '.join(names[:_MOST_NAMES])} and {len(names) - _MOST_NAMES} more"
