"""`generate nftables|netns|systemd`: what their templates leave open, computed from the Config and its routes.

Knows which template makes which set-up. Knows nothing of what may be asked for: see `run`.
"""

from __future__ import annotations

import shlex
from typing import Callable, Dict, Iterator

from _tsproxy.cli import program
from _tsproxy.cli.config import Config, Route
from _tsproxy.cli.refusal import named
from _tsproxy.cli.words import words
from _tsproxy.linux.sockets import TAG, TAG_DSCP
from _tsproxy.policy import kinds
from _tsproxy.policy.kinds import ROUTES
from _tsproxy.tools.generate import routes_file, templates
from _tsproxy.tools.generate.common import (
    NONE_INSIDE,
    command,
    descriptors,
    filled,
    listening,
    preserved,
    printing,
    stopping_s,
)
from _tsproxy.tools.generate.templates import in_parts

_MARK = "0x74730001"  # of the connections, in conntrack; "ts" and a number, so that nobody else's is the same
_SOCKETS_OWN = ("--port", "--bind", "--reuse-port")  # what tsproxy.socket does in the service's place
_ROOM = 1 << 19  # descriptors, for routes to come: the hard limit that systemd has by itself (systemd-system.conf(5))
_WHO = """\
# By the priority only from {0}, and from root, who shows the rules to work before it becomes {0}. Not by the
# DSCP: after close() a socket has no user."""
_REUSE_PORT = """\
# Another instance may have the port at the same time.
ReusePort=yes"""
_DYNAMIC_USER = """\
# A user that exists only while it runs, unlike nobody, which others may be too; generate --user=NAME for one of yours.
DynamicUser=yes"""
_PIN = """\
# For --cpus, which pins the workers.
SystemCallFilter=sched_setaffinity"""
_RELOAD = f"""\
# systemctl reload has {ROUTES} read again, and does not wait for that. From systemd 253 on it waits where
# Type=notify-reload stands in the place of Type=notify above, and there is no ExecReload=: then systemd sends SIGHUP itself.
ExecReload=/bin/sh -c 'kill -HUP $MAINPID'"""
_OWN_SOCKET = "Requires=tsproxy.socket\nAfter=tsproxy-netns.service tsproxy.socket"
_ENABLED_SOCKETS = """\
# Its sockets want to be started before it: their [Install]. Nothing here requires one, so that a route's may be stopped.
After=tsproxy-netns.service"""


def nftables(config: Config) -> str:
    """Rules for `nft -f -`, which can be loaded again and again: for tsproxy's own sockets, by their tag, IPv4 and IPv6."""
    stripping = all(route.timestamps != "rewrite" for route in config.routes)
    user = config.user if stripping else None
    who, uid = (_WHO.format(user), f'meta skuid {{ 0, "{user}" }} ') if user else ("", "")
    tags = templates.fill("nftables-tags.nft", TAG=TAG, DSCP=TAG_DSCP, WHO=who, UID=uid)
    dscp = next((route.dscp for route in kinds.by_rules(config) if route.dscp is not None), 0)  # the same for all
    name = "nftables-strip.nft" if stripping else "nftables-rewrite.nft"
    notes = "\n".join(_on_rules(config, dscp))
    return filled(name, "nftables", config, TAGS=tags, MARK=_MARK, TSVAL=config.static_timestamp, SET=dscp, NOTES=notes)


def _on_rules(config: Config, dscp: int) -> Iterator[str]:
    yield from preserved(config, "theirs have no tag, so these rules leave them alone.")
    unnamed = [route.name for route in kinds.by_rules(config) if route.dscp is None]
    if dscp and unnamed:
        yield f"# Note:   dscp = {dscp} is set for all: also for {named(unnamed)}."


def netns(config: Config) -> str:
    """A script: without an argument it makes a namespace with a way out, with `down` it takes everything away again.

    With `routes` it prints the file of routes for tsproxy in there, if there is one.
    """
    inside = _routes_inside(config, lambda route: f"Clients connect to {listening(route)}.")
    ipv6 = any(":" in target.host for route in config.routes for target in route.targets)
    return filled(
        "netns.sh",
        "netns",
        config,
        SOURCES=" ".join(dict.fromkeys(source for route in config.routes for source in route.sources)),
        ADDRESS='"10.203.116.2 fd74:7370::2"' if ipv6 else "10.203.116.2",
        GATEWAY='"10.203.116.1 fd74:7370::1"' if ipv6 else "10.203.116.1",
        OPTIONS=_inside_namespace(config),
        RUN=_run_inside(config._replace(user=config.user or "nobody")),
        NOTES="\n".join(preserved(config, NONE_INSIDE)),
        ALLOWED="up, down or routes" if inside else "up or down",
        **printing(inside),
    )


def _routes_inside(config: Config, remark: Callable[[Route], str]) -> str:
    """The file for the namespace: a socket of the route's name is its listener there, so it may say neither port nor bind."""
    return "" if config.routes_file is None else routes_file.text(config, remark, without=routes_file.LISTENING)


def _inside_namespace(config: Config) -> str:
    return shlex.join(words(config, without=("--port", "--bind")))


def _run_inside(config: Config) -> str:
    """How to run tsproxy in the namespace with its listeners outside: a socket of a route's name takes its port and bind."""
    sockets = " ".join(f"-l {listening(route)}" for route in config.routes)
    program_inside = f"ip netns exec tsproxy {program.name()}"
    if config.routes_file is None:
        return f"""\
Run tsproxy in it, with its listener left out here where the clients are:
    systemd-socket-activate {sockets} {program_inside} {_inside_namespace(config)}"""
    names = ":".join(route.name for route in config.routes)
    inside = shlex.join(words(config._replace(routes_file="tsproxy-routes.ini")))
    return f"""\
Run tsproxy in it, with its listeners left out here where the clients are, and so not in the file:
    {command("netns", config)} | sh -s routes >tsproxy-routes.ini
    systemd-socket-activate {sockets} --fdname={names} {program_inside} {inside}"""


def systemd(config: Config) -> str:
    """The script of netns and the units, each under a heading that names its file: the listeners in the host's namespace."""
    started = config if config.routes_file is None else config._replace(routes_file=ROUTES)
    units = {
        "tsproxy-netns.service": templates.fill("tsproxy-netns.service"),
        **{unit: _socket_unit(unit, config, route) for unit, route in _socket_units(config).items()},
        "tsproxy.service": templates.fill(
            "tsproxy.service",
            SOCKETS=_OWN_SOCKET if config.routes_file is None else _ENABLED_SOCKETS,
            OPTIONS=" ".join(map(_command_word, words(started, without=(*_SOCKETS_OWN, "--user")))),
            RELOAD="" if config.routes_file is None else _RELOAD,
            USER=_DYNAMIC_USER if config.user in (None, "nobody") else f"User={_setting(str(config.user))}",
            STOP_S=stopping_s(config, 10),
            NOFILE=descriptors(config) if config.routes_file is None else max(descriptors(config), _ROOM),
            PIN=_PIN if config.cpus else "",
        ),
    }
    heading = "systemd.txt" if config.routes_file is None else "systemd-routes.txt"
    notes = "\n".join(preserved(config, NONE_INSIDE))
    parts = {f"/etc/systemd/system/{name}": text for name, text in units.items()}
    return in_parts(
        filled(heading, "systemd", config, NOTES=notes),
        {"/usr/local/sbin/tsproxy-netns": netns(config), **parts, **_routes_of_service(config)},
    )


def _socket_units(config: Config) -> Dict[str, Route]:
    """Each route's unit; what a name may be made of, a unit's may be, too (systemd.unit(5))."""
    if config.routes_file is None:
        return {"tsproxy.socket": config.routes[0]}
    return {f"tsproxy-{route.name}.socket": route for route in config.routes}


def _socket_unit(unit: str, config: Config, route: Route) -> str:
    alone = config.routes_file is None
    return templates.fill(
        "tsproxy.socket",
        UNIT=unit,
        WHOSE="" if alone else f" of {route.name}",
        LISTEN=_setting(listening(route)),
        NAME="tsproxy" if alone else route.name,
        SERVICE="" if alone else "Service=tsproxy.service",
        REUSE=_REUSE_PORT if config.reuse_port else "",
        WANTED="sockets.target" if alone else "sockets.target tsproxy.service",
    )


def _routes_of_service(config: Config) -> Dict[str, str]:
    """The file that the service reads."""
    if config.routes_file is None:
        return {}
    units = {route.name: unit for unit, route in _socket_units(config).items()}
    inside = _routes_inside(config, lambda route: f"Clients connect to {listening(route)}: {units[route.name]}")
    made_of = f"# Made of {config.routes_file}; what its [DEFAULT] said is in each section.\n\n"
    return {ROUTES: made_of + inside}


def _setting(text: str) -> str:
    """A setting's value: systemd reads % in it (systemd.unit(5), specifiers), and nothing into $."""
    return text.replace("%", "%%")


def _command_word(text: str) -> str:
    """A word of a command line, in which variables are read too (systemd.service(5)). Ours have no blanks and no quotes."""
    return _setting(text).replace("$", "$$")
