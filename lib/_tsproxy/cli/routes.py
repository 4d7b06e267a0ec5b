"""A file of routes into Routes: one section each, whose keys are the long names of the options of a route.

Each value is checked by the validator of its option, so a file and a command line say the same of the same mistake; a file says
file, line and section before it. Knows options and text. Knows nothing of sockets, or of which route is in use.
"""

from __future__ import annotations

import difflib
import os
import re
from typing import Any, Callable, Collection, Dict, List, Mapping, NamedTuple, Optional, Tuple

from _tsproxy.cli import config, ini
from _tsproxy.cli.config import OPTIONS, REPEATED, ROUTE_FIELDS, SWITCH, BadOption, BadValue, Config, Places, Route, UsageError
from _tsproxy.cli.ini import BadFile, Section, shown

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}", re.ASCII)
_NAMES = "1 to 63 of a-z, 0-9, dot, underscore and dash, the first a letter or digit"
_MODES = ("strip", "preserve")
_REWRITING = "strip or preserve (to rewrite is for all routes: --timestamps=rewrite on the command line)"
_LONGEST = 1000  # characters of a value that the line about it repeats: a JSON line has 4,096 bytes
_ANY = frozenset({"0.0.0.0", "::"})


class _Entry(NamedTuple):
    """The field of Route for a key, the parser of one value, and whether it takes several."""

    field: str
    parse: Callable[[str, str], Any]
    repeats: bool = False


def _switch(key: str, given: str) -> bool:
    return config.one_of(SWITCH)(key, given) == "on"


def _mode(key: str, given: str) -> str:
    if given not in _MODES:
        raise BadValue(key, given, _REWRITING)
    return given


def _of_route() -> Dict[str, _Entry]:
    given = {name: _Entry(*option) for name, option in OPTIONS.items()}
    given.update({name: _Entry(*option, True) for name, option in REPEATED.items()})
    entries = {name[2:]: entry for name, entry in given.items() if entry.field in ROUTE_FIELDS}
    return {**entries, "timestamps": _Entry("timestamps", _mode), "trust-host": _Entry("trust_host", _switch)}


KEYS: Mapping[str, _Entry] = _of_route()
"""What may stand in a section."""
OF_PROCESS = frozenset({name[2:] for name in OPTIONS} - KEYS.keys() | {"reuse-port", "spoof-timestamps"})
"""The long names of options that are of the process, so that they stand on the command line alone."""


_IN_THE_FILE = ("--target", "--port", "--bind", "--source", "--interface", "--allow")


def config_of(options: Mapping[str, Any], inherited: Optional[Collection[str]] = ()) -> Config:
    """docopt's dictionary into a Config with the one route of the command line, or those of --routes. UsageError as load()."""
    settings = config.parse(options)
    path = options.get("--routes")
    if path is None:
        return settings
    for name in _IN_THE_FILE:
        if options.get(name):
            raise UsageError(f"{name}: given with --routes; allowed: only in the file, for each route")
    (base,) = settings.routes
    found = load(path, base, inherited)
    _all_named(path, inherited or (), [route.name for route in found.routes])
    return settings._replace(routes=found.routes, places=found.places, routes_file=_absolute(path), defaults=base)


def _absolute(path: str) -> str:
    """The same file from any working directory. Not os.path.abspath(): a/../b is no b where a is a symbolic link."""
    try:
        return os.path.join(os.getcwd(), path) if not os.path.isabs(path) else path
    except FileNotFoundError:
        raise UsageError(f"--routes: given {path!r}; allowed: an absolute path, where the working directory is gone") from None


class Loaded(NamedTuple):
    """What a file says, and where."""

    routes: Tuple[Route, ...]
    places: Places


def load(path: str, base: Route, inherited: Optional[Collection[str]] = ()) -> Loaded:
    """The routes of a file. UsageError with the one line to print.

    `base` has what holds where the file says nothing. `inherited` are the names of sockets that a service manager has handed
    over: a route of such a name listens there, and has neither port nor bind. None: not known, so any route may have none.
    """
    try:
        data = ini.contents(path)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UsageError(f"--routes: given {path!r}; allowed: a file that can be read ({why})") from None
    if len(data) > ini.MOST_BYTES:
        raise UsageError(f"--routes: given {path!r}; allowed: a file of up to {ini.MOST_BYTES >> 20} MiB")
    return parse(data, path, base, inherited)


def parse(data: bytes, file: str, base: Route, inherited: Optional[Collection[str]] = ()) -> Loaded:
    """The same for a file that has been read. `file` is its name in messages."""
    sections = ini.read(data, file)
    shared = next((section for section in sections if section.name == ini.DEFAULT), Section(ini.DEFAULT, 0, {}))
    defaults = _Read(file, shared, base).values()
    found = [(one, _route(_Read(file, one, base), shared, defaults, inherited)) for one in sections if one is not shared]
    if not found:
        raise UsageError(f"{file}: given no route; allowed: at least one section, e.g. [oe-primary]")
    _distinct(file, found)
    return Loaded(tuple(route for _, route in found), Places(file, {one.name: _lines(one, shared) for one, _ in found}))


def _lines(section: Section, shared: Section) -> Dict[str, int]:
    return {"": section.line, **{name: key.line for name, key in {**shared.keys, **section.keys}.items()}}


class _Read(NamedTuple):
    """A section that is read."""

    file: str
    section: Section
    base: Route

    def bad(self, line: int, problem: object) -> BadFile:
        return BadFile(self.file, line, self.section.name, str(problem))

    def values(self) -> Dict[str, Any]:
        """Fields of a Route for its keys. BadFile for the first that is none, or has a bad value."""
        keys = self.section.keys.items()
        return {KEYS[name].field: self._value(name, key) for name, key in keys if self._is_known(name, key)}

    def _is_known(self, name: str, key: ini.Key) -> bool:
        if name in OF_PROCESS:
            raise self.bad(key.line, _refused(name, key, f"only as --{name} on the command line, for the whole process"))
        if name not in KEYS:
            close = difflib.get_close_matches(name.lower(), list(KEYS), 1, 0.7)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise self.bad(key.line, f"unknown key '{shown(name)}'{hint}; allowed: {', '.join(sorted(KEYS))}")
        if name == "timestamps" and self.base.timestamps == "rewrite":
            raise self.bad(key.line, _refused(name, key, "nothing: --timestamps=rewrite is for all routes"))
        return True

    def _value(self, name: str, key: ini.Key) -> Any:
        entry, given = KEYS[name], key.values or [ini.Value("", key.line)]
        if len(given) > 1 and not entry.repeats:
            raise self.bad(given[1].line, f"{name}: given {len(given)} values, one a line; allowed: one")
        values = tuple(self._parsed(name, value) for value in given)
        return values if entry.repeats else values[0]

    def _parsed(self, name: str, value: ini.Value) -> Any:
        if len(value.text) > _LONGEST:
            raise self.bad(value.line, f"{name}: given '{shown(value.text)}'; allowed: up to {_LONGEST} characters")
        try:
            return KEYS[name].parse(name, value.text)
        except BadOption as problem:
            raise self.bad(value.line, problem) from None


def _refused(name: str, key: ini.Key, allowed: str) -> str:
    """The problem with a key that may not stand there, whatever its value."""
    return f"{name}: given '{shown(' '.join(value.text for value in key.values))}'; allowed: {allowed}"


def _route(read: _Read, shared: Section, defaults: Dict[str, Any], inherited: Optional[Collection[str]]) -> Route:
    """The route of a section, with what [DEFAULT] and `base` say where the section says nothing."""
    section = read.section
    if not _NAME.fullmatch(section.name):
        raise read.bad(section.line, f"given as a route's name; allowed: {_NAMES}")
    keys = {**shared.keys, **section.keys}
    listening = tuple(name for name in ("port", "bind") if name in keys)
    found = {**defaults, **read.values(), "name": section.name, "listen_options": listening}
    _require_listener(read, keys, inherited)
    if not found.get("targets"):
        raise read.bad(section.line, "target: given nothing; allowed: at least one, e.g. target = exchange.example:443")
    route = read.base._replace(**found)
    try:
        config.require_reachable(route._asdict(), "")
    except BadOption as problem:
        raise read.bad(keys[problem.option].line if problem.option in keys else section.line, problem) from None
    return route


def _require_listener(read: _Read, keys: Mapping[str, ini.Key], inherited: Optional[Collection[str]]) -> None:
    """A socket that was handed over, or a port, but not both. Not known: it was, if there is neither key."""
    if inherited is None:
        inherited = () if "bind" in keys or "port" in keys else (read.section.name,)
    if read.section.name not in inherited:
        if "port" not in keys:
            named = ", or a socket that is handed over by the route's name (FileDescriptorName=)" if inherited else ""
            allowed = f"a port from 0 to 65535 (0: any that is free){named}"
            raise read.bad(read.section.line, f"port: given nothing; allowed: {allowed}")
        return
    for name in ("port", "bind"):
        if name in keys:
            allowed = "nothing: a socket of the route's name was handed over (LISTEN_FDNAMES)"
            raise read.bad(keys[name].line, _refused(name, keys[name], allowed))


def _distinct(file: str, found: List[Tuple[Section, Route]]) -> None:
    """BadFile for two routes that would listen in the same place. Port 0 is another one each time."""
    taken: Dict[int, List[Tuple[Section, Route]]] = {}
    for section, route in found:
        same_port = taken.setdefault(route.port, []) if route.port and route.listen_options else []
        for before, other in same_port:
            if overlap(route.bind, other.bind):
                line = section.keys["port"].line if "port" in section.keys else section.line
                place = f"[{route.bind}]:{route.port}" if ":" in route.bind else f"{route.bind}:{route.port}"
                problem = f"port: given '{route.port}'; allowed: one that [{before.name}] (line {before.line}) does not have"
                raise BadFile(file, line, section.name, f"{problem}: both would listen on {place}")
        same_port.append((section, route))


def overlap(bind: str, other: str) -> bool:
    """Whether one of the addresses is the other one, or any of its family. Whether :: takes IPv4 too is the host's to say."""
    return bind == other or ((":" in bind) == (":" in other) and not _ANY.isdisjoint((bind, other)))


def _all_named(file: str, inherited: Collection[str], routes: Collection[str]) -> None:
    for name in inherited:
        if name not in routes:
            raise UsageError(f"LISTEN_FDNAMES: given {name!r}; allowed: the name of a route of {file}")
