"""A Config back as the words of a command line."""

from __future__ import annotations

from typing import Any, Iterator, List, Sequence, Tuple

from _tsproxy.cli.config import OPTIONS, REPEATED, Config, Route, usable_cpus

_DEFAULTS = {**Config._field_defaults, **Route._field_defaults}


def words(config: Config, without: Sequence[str] = ()) -> List[str]:
    """The options that make this Config and differ from their defaults, but for those in `without`.

    They name its one route, or the file of its routes; beside that file they are what holds where the file says nothing.
    """
    return [word for word in _words(config) if word.partition("=")[0] not in without]


def _words(config: Config) -> Iterator[str]:
    if config.routes_file is not None:
        yield f"--routes={config.routes_file}"
    route = config.defaults or config.routes[0]
    values = {**config._asdict(), **route._asdict()}
    for name, option in REPEATED.items():
        yield from (f"{name}={value}" for value in values[option.field])
    for name, option in OPTIONS.items():
        value = values[option.field]
        if value != _default(option.field, config):
            yield f"{name}={spelled(value)}"
    yield from (switch for switch, on in _switches(config, route) if on)


def _default(field: str, config: Config) -> Any:
    """What the field would be if its option had not been given."""
    if field == "workers":
        return len(config.cpus or usable_cpus())
    return _DEFAULTS[field]


def _switches(config: Config, route: Route) -> Iterator[Tuple[str, bool]]:
    yield "--timestamps=rewrite", config.rewrites_to_zero
    yield "--reuse-port", config.reuse_port
    yield "--trust-host", route.trust_host


def spelled(value: Any) -> str:
    """A field's value as its option takes it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:.9f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
