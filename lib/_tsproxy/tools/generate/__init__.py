"""`generate KIND`: the one-time set-up that makes the policy hold, or what ships the lines, as text to read, load and undo."""

from __future__ import annotations

from functools import partial
from typing import Callable, Mapping

from _tsproxy.cli import exits
from _tsproxy.cli.config import Config
from _tsproxy.cli.exits import Exit
from _tsproxy.linux.systemd import MOST_FDS
from _tsproxy.tools.generate import completion, containers, fields, man, prometheus, setups, shippers
from _tsproxy.tools.generate.common import ROUTES
from _tsproxy.tools.generate.refusal import refused

KINDS: Mapping[str, Callable[[Config], str]] = {
    "nftables": setups.nftables,
    "netns": setups.netns,
    "systemd": setups.systemd,
    "docker": containers.docker,
    "kubernetes": containers.kubernetes,
}
SHIPPERS: Mapping[str, Callable[[], str]] = {
    "rsyslog": shippers.rsyslog,
    "syslog-ng": shippers.syslog_ng,
    "vector": shippers.vector,
    "fluent-bit": shippers.fluent_bit,
    "filebeat": shippers.filebeat,
    "promtail": partial(shippers.fill, "promtail.yaml"),
    "alloy": shippers.alloy,
    "journald": partial(shippers.fill, "journald.conf"),
    "logrotate": partial(shippers.fill, "logrotate.conf"),
    "fields": fields.text,
    "prometheus": prometheus.text,
    "grafana": partial(shippers.fill, "grafana.json"),
}
"""What goes with the lines, whatever the proxy is asked for: these take no option."""
FROM_MANUAL: Mapping[str, Callable[[str], str]] = {
    "man": man.text,
    "completion": partial(completion.text, kinds=tuple(KINDS)),
}
"""What is made of the text that `--help` prints, and takes no option either."""
ALONE = (*SHIPPERS, *FROM_MANUAL)
_WRITTEN = {"systemd": ROUTES, "netns": "tsproxy-routes.ini", "docker": "tsproxy-routes/routes.ini"}
REWRITING = "nftables"  # the only kind that can: the others turn the option off where it is made


def without_options(chosen: Mapping[str, object], manual: str) -> int:
    """Print what takes no option: that one of ALONE that is true in docopt's dictionary."""
    kind = next(kind for kind in ALONE if chosen[kind])
    print(SHIPPERS[kind]() if kind in SHIPPERS else FROM_MANUAL[kind](manual), end="")
    return exits.DRAINED


def run(kind: str, config: Config) -> int:
    """Print the set-up of that kind for what `config` asks. Exit 2 for a kind that is none or can't do it."""
    if kind not in KINDS:
        raise Exit(exits.USAGE, f"KIND: given {kind!r}; allowed: {' or '.join(KINDS)}; {' or '.join(ALONE)} alone")
    _require_plain_path(config)
    _require_another_path(kind, config)
    _require_mode(kind, config)
    if kind != REWRITING:
        _require_port(kind, config)
        _require_no_interface(kind, config)
    if kind == "systemd" and len(config.routes) > MOST_FDS:
        given = f"--routes: given {len(config.routes)} routes"
        raise Exit(exits.USAGE, f"{given}; allowed with generate systemd: up to {MOST_FDS}, a socket each")
    print(KINDS[kind](config), end="")
    return exits.DRAINED


def _require_plain_path(config: Config) -> None:
    """It stands in comments and commands of what is printed, in whichever encoding that is read."""
    path = config.routes_file
    if path is not None and not (path.isascii() and path.isprintable()):
        raise Exit(exits.USAGE, f"--routes: given {path!r}; allowed with generate: a path of printable ASCII characters")


def _require_another_path(kind: str, config: Config) -> None:
    """What is printed says how to write a file of routes for the inside: not over the one that says where clients connect."""
    path, written = config.routes_file, _WRITTEN.get(kind)
    if path is not None and written and (path == written or path.endswith(f"/{written}")):
        allowed = f"with generate {kind}: a file elsewhere (it has one of that name written, for where tsproxy runs)"
        raise Exit(exits.USAGE, f"--routes: given {path!r}; allowed {allowed}")


def _require_mode(kind: str, config: Config) -> None:
    modes = {route.timestamps for route in config.routes}
    if modes == {"preserve"}:
        allowed = "with generate: strip or rewrite (it needs no set-up)"
        raise refused(config, [route.name for route in config.routes], "timestamps", "preserve", allowed)
    if "rewrite" in modes and kind != REWRITING:
        raise Exit(
            exits.USAGE,
            f"--timestamps: given 'rewrite'; allowed with generate {kind}: strip (generate {REWRITING} can rewrite)",
        )


def _require_port(kind: str, config: Config) -> None:
    """The set-up names the port, so it can't be left to the kernel."""
    names = [route.name for route in config.routes if route.port == 0]
    if names:
        raise refused(config, names, "port", 0, f"with generate {kind}: a port from 1 to 65535")


def _require_no_interface(kind: str, config: Config) -> None:
    """In a namespace of its own tsproxy has other interfaces than this host's."""
    named = [route for route in config.routes if route.interface is not None]
    if named:
        why = f"it is in a namespace of its own; generate {REWRITING} leaves it where the interface is"
        names = [route.name for route in named]
        raise refused(config, names, "interface", named[0].interface, f"with generate {kind}: none ({why})")
