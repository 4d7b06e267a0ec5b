"""The kinds of set-up, and which of them can be made for what a Config asks. `generate` refuses others, advice leaves them out.

Knows what each kind can't do. Knows nothing of what it consists of.
"""

from __future__ import annotations

import pwd
from typing import Callable, Dict, List, Mapping, Tuple

from _tsproxy.cli import exits
from _tsproxy.cli.config import Config, Route
from _tsproxy.cli.exits import Exit
from _tsproxy.cli.refusal import named, refused
from _tsproxy.linux.sockets import TAG_DSCP
from _tsproxy.linux.systemd import MOST_FDS

REWRITING = "nftables"  # the only kind that can: the others turn the option off where it is made
NOBODY = 65534
ROUTES = "/etc/tsproxy/routes.ini"  # where the service, or the program in a container, reads them
_WRITTEN = {"systemd": ROUTES, "netns": "tsproxy-routes.ini", "docker": "tsproxy-routes/routes.ini"}


def require(kind: str, config: Config) -> None:
    """Exit 2, with one line, for a kind that can't do it."""
    _require_plain_path(config)
    _require_another_path(kind, config)
    _require_mode(kind, config)
    if kind != REWRITING:
        _require_port(kind, config)
        _require_no_interface(kind, config)
    if kind in _OWN:
        _OWN[kind](config)


def refusal(kind: str, config: Config) -> str:
    """The line of require(); "" if the kind can do it."""
    try:
        require(kind, config)
    except Exit as problem:
        return str(problem)
    return ""


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
    allowed = f"with generate {kind}: a port from 1 to 65535"
    unsaid = [route.name for route in config.routes if config.routes_file and "port" not in route.listen_options]
    if unsaid:  # their sockets are handed over
        raise refused(config, unsaid, "port", "", allowed)
    names = [route.name for route in config.routes if route.port == 0]
    if names:
        raise refused(config, names, "port", 0, allowed)


def _require_no_interface(kind: str, config: Config) -> None:
    """In a namespace of its own tsproxy has other interfaces than this host's."""
    bound = [route for route in config.routes if route.interface is not None]
    if bound:
        why = f"it is in a namespace of its own; generate {REWRITING} leaves it where the interface is"
        names = [route.name for route in bound]
        raise refused(config, names, "interface", bound[0].interface, f"with generate {kind}: none ({why})")


# What one kind can't do


def _require_one_dscp(config: Config) -> None:
    """Rules set it in the place of the tag, by which they know a packet: one for all, and not the tag itself."""
    tagged = [route.name for route in config.routes if route.dscp == TAG_DSCP]
    if tagged:
        raise refused(config, tagged, "dscp", TAG_DSCP, "with generate nftables: any other (it is tsproxy's tag)")
    found: Dict[int, List[str]] = {}
    for route in by_rules(config):
        if route.dscp is not None:
            found.setdefault(route.dscp, []).append(route.name)
    if len(found) > 1:
        (first, names), *others = found.items()
        differ = "; ".join(f"{dscp} ({named(whose)})" for dscp, whose in others)
        raise refused(config, names, "dscp", first, f"with generate nftables: one for all, as its rules set it; not {differ}")


def by_rules(config: Config) -> List[Route]:
    """The routes whose sockets have the tag."""
    return [route for route in config.routes if route.timestamps != "preserve"]


def _require_few_sockets(config: Config) -> None:
    if len(config.routes) > MOST_FDS:
        given = f"--routes: given {len(config.routes)} routes"
        raise Exit(exits.USAGE, f"{given}; allowed with generate systemd: up to {MOST_FDS}, a socket each")


def _require_pods_own(config: Config) -> None:
    """What pods can't have: source addresses, two listeners that differ in their address alone, a user without a number."""
    sourced = [route for route in config.routes if route.sources]
    if sourced:
        names = [route.name for route in sourced]
        raise refused(config, names, "source", sourced[0].sources[0], "with generate kubernetes: none (pods are given theirs)")
    taken: Dict[int, str] = {}
    for route in config.routes:
        first = taken.setdefault(route.port, route.name)
        if first != route.name:
            allowed = "with generate kubernetes: a port for each route alone (the Service has one address)"
            raise refused(config, [first, route.name], "port", route.port, allowed)
    pod_owner(config)


def pod_owner(config: Config) -> Tuple[int, int]:
    """User and group as numbers, which is all that runAsNonRoot takes: those of --user here, else nobody's."""
    if config.user is None:
        return NOBODY, NOBODY
    try:
        account = pwd.getpwnam(config.user)
    except KeyError:
        account = None
    if account is None or account.pw_uid == 0:
        allowed = "a user of this host but root (its number goes into the pods)"
        raise Exit(exits.USAGE, f"--user: given {config.user!r}; allowed with generate kubernetes: {allowed}")
    return account.pw_uid, account.pw_gid


_OWN: Mapping[str, Callable[[Config], None]] = {
    "nftables": _require_one_dscp,
    "systemd": _require_few_sockets,
    "kubernetes": _require_pods_own,
}
