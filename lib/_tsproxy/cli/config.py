"""Parses options into one frozen Config with its Route: each value is checked here, once.

An error names the option, value and allowed range. Knows the options' meanings and ranges, and which CPUs this process may
use. Knows nothing of sockets or workers.
"""

from __future__ import annotations

import ipaddress
import os
import re
from typing import Any, Callable, Dict, FrozenSet, List, Mapping, NamedTuple, Optional, Tuple, Union

IPNetwork = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]

MODES = ("strip", "rewrite", "preserve")
FULL_ACTIONS = ("reject", "queue")
ZERO_COPY = ("auto", "never")
RUNTIMES = ("auto", "interpreters", "processes", "threads")
DEFAULT_ROUTE = "default"  # of the command line
SWITCH = ("on", "off")
LEVELS = ("debug", "info", "warning", "error")

_DURATIONS = {"us": 1, "ms": 1000, "s": 1_000_000, "m": 60_000_000, "h": 3_600_000_000}
_SIZES = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
_LABEL = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)", re.ASCII)
_INTERFACE = re.compile(r"(?!\.{1,2}$)[\w.-]{1,15}", re.ASCII)  # IFNAMSIZ is 16, with the NUL
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*", re.ASCII | re.IGNORECASE)  # a part of an address for inet_aton(3)
_IPV4_MAPPED_BITS = 96  # ::ffff:0:0/96, RFC 4291, section 2.5.5.2


class UsageError(ValueError):
    """A command line that is not valid; its text is the one line to print before exit 2."""


class BadOption(UsageError):
    """What is wrong with one option; its text begins with the option's name, as it is spelled where it was given."""

    def __init__(self, option: str, problem: str) -> None:
        super().__init__(f"{option}: {problem}")
        self.option = option


class BadValue(BadOption):
    """An option's value that is not allowed: names the option, what was given, what is allowed."""

    def __init__(self, option: str, given: object, allowed: str) -> None:
        super().__init__(option, f"given {given!r}; allowed: {allowed}")


class Target(NamedTuple):
    """An upstream as the user wrote it: `host` is a name or a bare address, `scope` an IPv6 zone or empty."""

    host: str
    port: int
    scope: str = ""

    @property
    def is_literal(self) -> bool:
        """Whether it is an address, so that no resolver is needed."""
        return is_address(self.host)

    def __str__(self) -> str:
        zone = f"%{self.scope}" if self.scope else ""
        return f"[{self.host}{zone}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Route(NamedTuple):
    """What is accepted where, and relayed to which targets, validated. Times are in the unit of the name; 0 means off."""

    targets: Tuple[Target, ...]
    name: str = DEFAULT_ROUTE
    listen_options: Tuple[str, ...] = ()  # which of --port and --bind were given
    port: int = 8080
    bind: str = "127.0.0.1"
    timestamps: str = "strip"
    trust_host: bool = False
    max_connections: int = 1000
    max_connections_per_client: int = 0
    on_full: str = "reject"
    buffer_size: int = 65536
    zero_copy: str = "auto"
    connect_timeout_s: float = 5.0
    idle_timeout_s: float = 0.0
    half_close_timeout_s: float = 300.0
    user_timeout_ms: int = 10000
    keepalive_s: int = 30
    sources: Tuple[str, ...] = ()
    interface: Optional[str] = None
    dscp: Optional[int] = None
    allow: Tuple[IPNetwork, ...] = ()
    segments_warning: int = 0


class Places(NamedTuple):
    """Where in their file the routes say what: of each route the line of each key, and of its section as the key ""."""

    file: str  # as it was given
    lines: Mapping[str, Mapping[str, int]]

    def of(self, route: str, key: str) -> str:
        """File and line for a message; those of the section where the key is nowhere in the file."""
        lines = self.lines[route]
        return f"{self.file}:{lines.get(key, lines[''])}"


class Config(NamedTuple):
    """The options of the process, validated, and its routes."""

    routes: Tuple[Route, ...]
    routes_file: Optional[str] = None  # absolute: where the routes are read from, also by a reload
    places: Optional[Places] = None  # in that file
    defaults: Optional[Route] = None  # of the file's routes: what the command line says
    static_timestamp: int = 0
    rewrites_to_zero: bool = False  # asked for rewrite with this TSval, which is strip
    workers: int = 1
    runtime: str = "auto"
    cpus: Tuple[int, ...] = ()
    busy_poll_us: int = 0
    drain_timeout_s: float = 30.0
    reuse_port: bool = False
    user: Optional[str] = None
    metrics_interval_s: float = 10.0
    connection_log: bool = True
    log_level: str = "info"


def is_address(text: str) -> bool:
    """True for a bare IPv4 or IPv6 address."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def one_of(choices: Tuple[str, ...]) -> Callable[[str, str], str]:
    """A parser for an option that has one of a few values."""

    def parse(option: str, given: str) -> str:
        if given not in choices:
            raise BadValue(option, given, " or ".join(choices))
        return given

    return parse


def whole(low: int, high: int, what: str = "") -> Callable[[str, str], int]:
    """A parser for whole decimal numbers from `low` to `high`, both included."""
    allowed = f"{what or 'a whole number'} from {low} to {high}"

    def parse(option: str, given: str) -> int:
        if not re.fullmatch(r"[0-9]{1,12}", given, re.ASCII) or not low <= int(given) <= high:
            raise BadValue(option, given, allowed)
        return int(given)

    return parse


def duration(low: float, high: float, unit: str = "s", zero: bool = False) -> Callable[[str, str], float]:
    """A parser for a time in `unit`, or with a unit of its own (us, ms, s, m, h); the result is in `unit`."""
    off = ", or 0 for off" if zero else ""
    allowed = f"a number of {unit} from {low:.15g} to {high:.15g}{off} (units: {', '.join(_DURATIONS)})"

    def parse(option: str, given: str) -> float:
        match = re.fullmatch(r"([0-9]{1,12})(?:\.([0-9]{1,9}))?(us|ms|s|m|h)?", given, re.ASCII)
        if not match:
            raise BadValue(option, given, allowed)
        billionths = int(match[1] + (match[2] or "").ljust(9, "0"))
        # One division of whole numbers, so that 32.337s is 32337ms, not a bit more, which would be rounded up.
        value = billionths * _DURATIONS[match[3] or unit] / (_DURATIONS[unit] * 10**9)
        if not (low <= value <= high or (zero and value == 0)):
            raise BadValue(option, given, allowed)
        return value

    return parse


def rounded(parse: Callable[[str, str], float]) -> Callable[[str, str], int]:
    """The same parser for an option that is an integer in the kernel; a fraction is rounded up, never to 0, which is off."""
    return lambda option, given: int(-(-parse(option, given) // 1))


def size(low: int, high: int) -> Callable[[str, str], int]:
    """A parser for a number of bytes, or of KiB, MiB, GiB with the suffix k, m or g."""

    def parse(option: str, given: str) -> int:
        match = re.fullmatch(r"([0-9]{1,12})([kmgKMG]?)", given, re.ASCII)
        value = int(match[1]) * _SIZES[match[2].lower()] if match else -1
        if not low <= value <= high:
            raise BadValue(option, given, f"bytes from {low} to {high} (units: k, m, g)")
        return value

    return parse


def address(option: str, given: str) -> str:
    """A bare unicast IPv4 or IPv6 address without a zone. Brackets are removed, and an IPv4-mapped one becomes IPv4."""
    bare = given[1:-1] if given.startswith("[") and given.endswith("]") else given
    if not is_address(bare) or "%" in bare or not is_unicast(_plain(bare)):
        raise BadValue(option, given, "an IPv4 or IPv6 address of this host")
    return _plain(bare)


def _plain(text: str) -> str:
    """The address in its usual spelling."""
    found = ipaddress.ip_address(text)
    return str(getattr(found, "ipv4_mapped", None) or found)


def is_unicast(text: str) -> bool:
    """False for groups and the limited broadcast address (RFC 919): connect(2) of TCP takes none of them."""
    return not ipaddress.ip_address(text).is_multicast and text != "255.255.255.255"


def network(option: str, given: str) -> IPNetwork:
    """A CIDR block; an address alone is a block of one. Host bits must be 0: a typo there would allow more than meant."""
    bare, slash, bits = given.partition("/")
    allowed = "an address or CIDR block{}, e.g. 10.1.0.0/16 or 2001:db8::/32"
    if "%" in bare or (slash and not re.fullmatch("[0-9]{1,3}", bits, re.ASCII)):
        raise BadValue(option, given, allowed.format(""))
    try:
        return _unmapped(ipaddress.ip_network(given))
    except ValueError as error:
        zero = " with host bits 0" if "host bits" in str(error) else ""
        raise BadValue(option, given, allowed.format(zero)) from None


def _unmapped(block: IPNetwork) -> IPNetwork:
    """A block of IPv4-mapped addresses as an IPv4 block: client addresses are compared as IPv4."""
    mapped = getattr(block.network_address, "ipv4_mapped", None)
    bits = block.prefixlen - _IPV4_MAPPED_BITS
    return block if mapped is None or bits < 0 else ipaddress.ip_network((mapped, bits))


def host_name(text: str) -> bool:
    """True for a DNS name (RFC 1123, section 2.1; underscores too, for container names); False for a number of inet_aton(3)."""
    name = text[:-1] if text.endswith(".") else text
    labels = name.split(".")
    return len(name) <= 253 and all(_LABEL.fullmatch(label) for label in labels) and not _NUMBER.fullmatch(labels[-1])


def target(option: str, given: str) -> Target:
    """HOST:PORT, 192.0.2.1:443 or [2001:db8::1]:443."""
    allowed = "HOST:PORT with a port from 1 to 65535, e.g. exchange.example:443, 192.0.2.1:443 or [2001:db8::1]:443"
    match = re.fullmatch(r"(?:\[([^\]%]*)(?:%([\w.-]{1,15}))?\]|([^:\[\]]*)):([0-9]{1,5})", given, re.ASCII)
    bracketed, scope, bare, port = match.groups() if match else (None, None, "", "0")
    sound = is_address(bare) or host_name(bare) if bracketed is None else _is_ipv6(bracketed, scope)
    if not sound or not 1 <= int(port) <= 65535:
        raise BadValue(option, given, allowed)
    host = bare if bracketed is None else _plain(bracketed)
    if is_address(host) and not is_unicast(host):
        raise BadValue(option, given, "a unicast address: TCP connects to no multicast or broadcast address")
    return Target(host, int(port), scope or "")


def _is_ipv6(text: str, scope: Optional[str]) -> bool:
    """Also for an IPv4-mapped address, but that one has no zone."""
    return ":" in text and is_address(text) and (scope is None or ":" in _plain(text))


def interface(option: str, given: str) -> str:
    """The name of a network interface. Whether there is one of that name is for the kernel to say."""
    if not _INTERFACE.fullmatch(given):
        raise BadValue(option, given, "an interface's name: 1 to 15 letters, digits, dots, dashes and underscores, e.g. eth1")
    return given


def usable_cpus() -> FrozenSet[int]:
    """The CPUs of this process's affinity mask; all that are online if a sandbox refuses sched_getaffinity(2)."""
    try:
        return frozenset(os.sched_getaffinity(0))
    except OSError:
        return frozenset(range(os.cpu_count() or 1))


def cpu_list(option: str, given: str) -> Tuple[int, ...]:
    """CPU numbers in taskset's form, e.g. 2-5,8; each must be one that this process may run on."""
    usable = usable_cpus()
    found: List[int] = []
    for part in given.split(","):
        match = re.fullmatch(r"([0-9]{1,4})(?:-([0-9]{1,4}))?", part, re.ASCII)
        span = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
        if not span or not usable.issuperset(span) or set(span) & set(found):
            raise BadValue(option, given, f"CPUs of this process, each once, e.g. 2-5,8; usable here: {compact(usable)}")
        found += span
    return tuple(found)


def compact(numbers: Any) -> str:
    """{0, 1, 2, 5} as "0-2,5"."""
    spans: List[List[int]] = []
    for number in sorted(numbers):
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(f"{low}-{high}" if high > low else f"{low}" for low, high in spans)


def user_name(option: str, given: str) -> str:
    """A user name. Whether the user exists is checked when root is dropped."""
    if not re.fullmatch(r"[A-Za-z0-9_.][A-Za-z0-9_.-]{0,31}\$?", given, re.ASCII):
        raise BadValue(option, given, "a user name of this host")
    return given


class _Option(NamedTuple):
    """The field of Route or Config for an option, and its parser."""

    field: str
    parse: Callable[[str, str], Any]


_DAY = 86400.0
MOST_UPSTREAMS = 64  # addresses to try for one connection; also how many --target may be given
OPTIONS: Mapping[str, _Option] = {
    "--port": _Option("port", whole(0, 65535, "a port")),
    "--bind": _Option("bind", address),
    "--interface": _Option("interface", interface),
    "--dscp": _Option("dscp", whole(0, 63, "a DSCP")),
    "--timestamps": _Option("timestamps", one_of(MODES)),
    "--static-timestamp": _Option("static_timestamp", whole(0, 2**32 - 1, "a TSval")),
    "--max-connections": _Option("max_connections", whole(1, 1_000_000)),
    "--max-connections-per-client": _Option("max_connections_per_client", whole(0, 1_000_000)),
    "--on-full": _Option("on_full", one_of(FULL_ACTIONS)),
    "--buffer-size": _Option("buffer_size", size(1024, 16 << 20)),
    "--zero-copy": _Option("zero_copy", one_of(ZERO_COPY)),
    "--workers": _Option("workers", whole(1, 256)),
    "--runtime": _Option("runtime", one_of(RUNTIMES)),
    "--cpus": _Option("cpus", cpu_list),
    "--busy-poll": _Option("busy_poll_us", rounded(duration(1, 1e9, "us", zero=True))),
    "--connect-timeout": _Option("connect_timeout_s", duration(0.001, 3600)),
    "--idle-timeout": _Option("idle_timeout_s", duration(0.001, 30 * _DAY, zero=True)),
    "--half-close-timeout": _Option("half_close_timeout_s", duration(0.001, 30 * _DAY, zero=True)),
    "--drain-timeout": _Option("drain_timeout_s", duration(0, _DAY)),
    "--user-timeout": _Option("user_timeout_ms", rounded(duration(1, 2**31 - 1, "ms", zero=True))),
    "--keepalive": _Option("keepalive_s", rounded(duration(1, 32767, zero=True))),
    "--user": _Option("user", user_name),
    "--segments-warning": _Option("segments_warning", whole(0, 1_000_000_000)),
    "--metrics-interval": _Option("metrics_interval_s", duration(0.01, _DAY, zero=True)),
    "--connection-log": _Option("connection_log", one_of(SWITCH)),
    "--log-level": _Option("log_level", one_of(LEVELS)),
}
REPEATED: Mapping[str, _Option] = {
    "--target": _Option("targets", target),
    "--source": _Option("sources", address),
    "--allow": _Option("allow", network),
}


ROUTE_FIELDS = frozenset(Route._fields)


def parse(options: Mapping[str, Any]) -> Config:
    """docopt's dictionary (long option -> text, list of texts, bool or None) into a Config, or UsageError."""
    found: Dict[str, Any] = {}
    for name, (field, parser) in OPTIONS.items():
        if options.get(name) is not None:
            found[field] = parser(name, options[name])
    for name, (field, parser) in REPEATED.items():
        found[field] = tuple(parser(name, given) for given in options.get(name) or ())
    found["reuse_port"] = bool(options.get("--reuse-port"))
    found["listen_options"] = tuple(name for name in ("--port", "--bind") if options.get(name) is not None)
    found["trust_host"] = bool(options.get("--trust-host"))
    found["connection_log"] = found.get("connection_log", "on") == "on"
    _contradictions(options, found)
    _timestamps(options, found)
    _defaults(found)
    route = Route(**{field: value for field, value in found.items() if field in ROUTE_FIELDS})
    return Config(routes=(route,), **{field: value for field, value in found.items() if field not in ROUTE_FIELDS})


def _contradictions(options: Mapping[str, Any], found: Dict[str, Any]) -> None:
    """UsageError for options that contradict each other."""
    cpus = found.get("cpus")
    if cpus and options.get("--workers") is not None and found["workers"] != len(cpus):
        raise UsageError(
            f"--workers={found['workers']} contradicts --cpus={options['--cpus']}: "
            f"--cpus sets one worker a CPU ({len(cpus)}); give one of the two"
        )
    require_reachable(found)


def _timestamps(options: Mapping[str, Any], found: Dict[str, Any]) -> None:
    """Set the mode: rewriting to 0 is stripping. UsageError for a TSval without rewriting."""
    mode, spoof = found.get("timestamps"), bool(options.get("--spoof-timestamps"))
    if spoof and mode not in (None, "rewrite"):
        raise UsageError(
            f"--spoof-timestamps contradicts --timestamps={mode}: it means --timestamps=rewrite; give one of the two"
        )
    rewrite = spoof or mode == "rewrite"
    if not rewrite and "static_timestamp" in found:
        raise UsageError(
            f"--static-timestamp: given {options['--static-timestamp']!r}; "
            "allowed: only with --timestamps=rewrite (or --spoof-timestamps)"
        )
    if rewrite:
        found["rewrites_to_zero"] = not found.get("static_timestamp")
        found["timestamps"] = "strip" if found["rewrites_to_zero"] else "rewrite"


def require_reachable(found: Mapping[str, Any], dashes: str = "--") -> None:
    """BadOption for too many targets, or for sources of which none has a literal target's family.

    `found` has fields of a Route; `dashes` is what stands before an option's name in the place where they were given.
    """
    if len(found["targets"]) > MOST_UPSTREAMS:
        raise BadOption(f"{dashes}target", f"given {len(found['targets'])} times; allowed: up to {MOST_UPSTREAMS} times")
    families = {":" in source for source in found["sources"]}
    for wanted in found["targets"]:
        if families and wanted.is_literal and (":" in wanted.host) not in families:
            kind = "IPv6" if ":" in wanted.host else "IPv4"
            problem = f"given {', '.join(found['sources'])}; allowed: at least one {kind} address, to reach"
            raise BadOption(f"{dashes}source", f"{problem} {dashes}target={wanted}")


def _defaults(found: Dict[str, Any]) -> None:
    """Defaults that depend on this host."""
    if found.get("cpus"):
        found["workers"] = len(found["cpus"])
    elif "workers" not in found:
        found["workers"] = len(usable_cpus())
