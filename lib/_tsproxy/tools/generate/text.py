"""What the kinds share: templates that are filled in, and the Config back as words of a command line."""

from __future__ import annotations

import dataclasses
import re
import shlex
from typing import Any, Iterator, List, Sequence

import _tsproxy
from _tsproxy.cli.config import OPTIONS, REPEATED, Config, usable_cpus
from _tsproxy.tools.generate import fields

DIRECTORY = "/var/log/tsproxy"
LINES_FILE = f"{DIRECTORY}/tsproxy.json"  # where a shipper finds the lines
ECS_FILE = f"{DIRECTORY}/ecs.json"  # and where it puts them
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Config)}


def fill(template: str, **values: object) -> str:
    """The template with each @NAME@ replaced, as autoconf does it: shells, units, nftables and YAML have no such word.

    A line that holds nothing but a name whose value is empty goes away. KeyError for a name that has no value.
    """
    values["VERSION"] = _tsproxy.__version__
    for name in [name for name, value in values.items() if value == ""]:
        template = re.sub(rf"^[ \t]*@{name}@\n", "", template, flags=re.MULTILINE)
    return re.sub(r"@([A-Z_]+)@", lambda match: str(values[match[1]]), template)


def fill_shipper(template: str, **values: object) -> str:
    """fill() with what the shippers' configurations share: where the lines are and go, and the version of ECS."""
    shared = {"DIR": DIRECTORY, "LINES_FILE": LINES_FILE, "ECS_FILE": ECS_FILE, "ECS_VERSION": fields.ECS_VERSION}
    return fill(template, **shared, **values)


def words(config: Config, without: Sequence[str] = ()) -> List[str]:
    """The options that make this Config and differ from their defaults, but for those in `without`."""
    return [word for word in _words(config) if word.partition("=")[0] not in without]


def command(kind: str, config: Config) -> str:
    """The command line that prints this set-up again, for a shell."""
    return shlex.join(["tsproxy.py", "generate", kind, *words(config)])


def targets(config: Config) -> str:
    """The targets for people."""
    return ", ".join(str(target) for target in config.targets)


def _words(config: Config) -> Iterator[str]:
    for name, option in REPEATED.items():
        yield from (f"{name}={value}" for value in getattr(config, option.field))
    for name, option in OPTIONS.items():
        value = getattr(config, option.field)
        if value != _default(option.field, config):
            yield f"{name}={_spelled(value)}"
    yield from (switch for switch, on in _switches(config) if on)


def _default(field: str, config: Config) -> Any:
    """What the field would be if its option had not been given."""
    if field == "workers":
        return len(config.cpus or usable_cpus())
    return _DEFAULTS[field]


def _switches(config: Config) -> Iterator[tuple[str, bool]]:
    yield "--reuse-port", config.reuse_port
    yield "--trust-host", config.trust_host


def _spelled(value: Any) -> str:
    """A field's value as its option takes it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:.9f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
