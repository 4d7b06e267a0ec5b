"""What each set-up says and counts: what was asked for, the command that prints it again, limits for all routes together."""

from __future__ import annotations

import math
import shlex
from typing import Dict, List

from _tsproxy.cli import program
from _tsproxy.cli.config import Config, Route
from _tsproxy.cli.refusal import named
from _tsproxy.cli.words import words
from _tsproxy.linux.limits import descriptors_for
from _tsproxy.tools.generate import templates

NONE_INSIDE = "in there no connection has any, so neither have theirs.\n#         Run such a route elsewhere to have them."

_PRINT_ROUTES = """
routes() {{
    cat <<'END'
{}END
}}"""


def filled(name: str, kind: str, config: Config, **values: object) -> str:
    """The template with what each heading says, too: what was asked for, and the command that prints this again."""
    return templates.fill(name, COMMAND=command(kind, config), TARGETS=_asked_for(config), **values)


def command(kind: str, config: Config) -> str:
    """What prints that set-up."""
    return shlex.join([program.name(), "generate", kind, *words(config)])


def printing(file: str) -> Dict[str, str]:
    """What a script has to print this file of routes for the word `routes`; nothing without one."""
    return {"ROUTES": _PRINT_ROUTES.format(file) if file else "", "PRINT_ROUTES": "routes) routes ;;" if file else ""}


def _asked_for(config: Config) -> str:
    if config.routes_file is None:
        return ", ".join(str(target) for route in config.routes for target in route.targets)
    count = len(config.routes)
    return f"the {count} routes of {config.routes_file}" if count > 1 else f"the route of {config.routes_file}"


def preserved(config: Config, why: str) -> List[str]:
    """The comment on routes that preserve timestamps beside others that have none; no line if there are none of these."""
    names = [route.name for route in config.routes if route.timestamps == "preserve"]
    return [f"# Note:   timestamps = preserve ({named(names)}):", f"#         {why}"] if names else []


def listening(route: Route) -> str:
    """Where clients connect, as systemd and Docker write it: 127.0.0.1:8080 or [::1]:8080."""
    return f"[{route.bind}]:{route.port}" if ":" in route.bind else f"{route.bind}:{route.port}"


def stopping_s(config: Config, grace_s: int) -> int:
    """How long a stop may take: the drain, and `grace_s` for what does not end by itself, and the last lines."""
    return math.ceil(config.drain_timeout_s) + grace_s


def descriptors(config: Config) -> int:
    """For the connections of all routes, together."""
    connections = sum(route.max_connections for route in config.routes)
    return descriptors_for(connections, config.workers, len(config.routes))
