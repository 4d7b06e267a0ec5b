"""`generate nftables|netns|systemd|docker|kubernetes`: what their templates leave open, computed from the Config and its Route.

Knows which template makes which set-up. Knows nothing of what may be asked for: see `run`.
"""

from __future__ import annotations

import json
import math
import pwd
import shlex
from typing import Dict, List, Tuple

from _tsproxy.cli import exits, program
from _tsproxy.cli.config import Config, Route, usable_cpus
from _tsproxy.cli.exits import Exit
from _tsproxy.linux.limits import descriptors_for
from _tsproxy.linux.sockets import TAG, TAG_DSCP
from _tsproxy.tools.generate import templates
from _tsproxy.tools.generate.templates import in_parts
from _tsproxy.tools.generate.words import words

_MARK = "0x74730001"  # of the connections, in conntrack; "ts" and a number, so that nobody else's is the same
_SOCKETS_OWN = ("--port", "--bind", "--reuse-port")  # what tsproxy.socket does in the service's place
_IMAGE = "python:3.13-slim"
_NOBODY = 65534
_GONE_S = 5  # until no node sends new clients any more
_MIB = 1 << 20
_PYTHON_MIB = 128
_KERNEL_BYTES = 512 << 10  # socket buffers of a busy connection, which count as the pod's

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
_INNER_SOURCES = "# --source: these have to be addresses of the container, so take a NETWORK that gives it them."
_INNER_NOBODY = f"OWNER={_NOBODY}:{_NOBODY} # nobody; generate --user=NAME takes a user of this host"
_DOCKERFILE = "$(dockerfile | sed 's/^/        /')"  # compose.yaml stands in a here-document of docker.sh


def _fill(name: str, kind: str, config: Config, route: Route, **values: object) -> str:
    """The template with what each heading says, too: what was asked for, and the command that prints this again."""
    again = shlex.join([program.name(), "generate", kind, *words(config, route)])
    return templates.fill(name, COMMAND=again, TARGETS=", ".join(map(str, route.targets)), **values)


def nftables(config: Config, route: Route) -> str:
    """Rules for `nft -f -`, which can be loaded again and again: for tsproxy's own sockets, by their tag, IPv4 and IPv6."""
    stripping = route.timestamps == "strip"
    user = config.user if stripping else None
    who, uid = (_WHO.format(user), f'meta skuid {{ 0, "{user}" }} ') if user else ("", "")
    tags = templates.fill("nftables-tags.nft", TAG=TAG, DSCP=TAG_DSCP, WHO=who, UID=uid)
    dscp = _wanted_dscp(route)
    name = "nftables-strip.nft" if stripping else "nftables-rewrite.nft"
    return _fill(name, "nftables", config, route, TAGS=tags, MARK=_MARK, TSVAL=config.static_timestamp, SET=dscp)


def _wanted_dscp(route: Route) -> int:
    """What the rules set in the place of the tag, by which they know a packet: so it can't be the tag itself."""
    if route.dscp == TAG_DSCP:
        raise Exit(exits.USAGE, f"--dscp: given '{TAG_DSCP}'; allowed with generate nftables: any other (it is tsproxy's tag)")
    return route.dscp or 0


def netns(config: Config, route: Route) -> str:
    """A script: without an argument it makes a namespace with a way out, with `down` it takes everything away again."""
    ipv6 = any(":" in target.host for target in route.targets)
    return _fill(
        "netns.sh",
        "netns",
        config,
        route,
        SOURCES=" ".join(route.sources),
        ADDRESS='"10.203.116.2 fd74:7370::2"' if ipv6 else "10.203.116.2",
        GATEWAY='"10.203.116.1 fd74:7370::1"' if ipv6 else "10.203.116.1",
        OPTIONS=_inside_namespace(config, route),
        RUN=_inside_namespace(config._replace(user=config.user or "nobody"), route),
        LISTEN=_listening(route),
    )


def _inside_namespace(config: Config, route: Route) -> str:
    return shlex.join(words(config, route, without=("--port", "--bind")))


def _listening(route: Route) -> str:
    """Where clients connect, as systemd and Docker write it: 127.0.0.1:8080 or [::1]:8080."""
    return f"[{route.bind}]:{route.port}" if ":" in route.bind else f"{route.bind}:{route.port}"


def systemd(config: Config, route: Route) -> str:
    """The script of netns and the units, each under a heading that names its file: the listener in the host's namespace."""
    units: Dict[str, Dict[str, object]] = {
        "tsproxy-netns.service": {},
        "tsproxy.socket": {"LISTEN": _setting(_listening(route)), "REUSE": _REUSE_PORT if config.reuse_port else ""},
        "tsproxy.service": {
            "OPTIONS": " ".join(map(_command_word, words(config, route, without=(*_SOCKETS_OWN, "--user")))),
            "USER": _DYNAMIC_USER if config.user in (None, "nobody") else f"User={_setting(str(config.user))}",
            "STOP_S": _stopping_s(config, 10),
            "NOFILE": _descriptors(config, route),
            "PIN": _PIN if config.cpus else "",
        },
    }
    parts = {f"/etc/systemd/system/{name}": templates.fill(name, **values) for name, values in units.items()}
    return in_parts(
        _fill("systemd.txt", "systemd", config, route), {"/usr/local/sbin/tsproxy-netns": netns(config, route), **parts}
    )


def _setting(text: str) -> str:
    """A setting's value: systemd reads % in it (systemd.unit(5), specifiers), and nothing into $."""
    return text.replace("%", "%%")


def _command_word(text: str) -> str:
    """A word of a command line, in which variables are read too (systemd.service(5)). Ours have no blanks and no quotes."""
    return _setting(text).replace("$", "$$")


def docker(config: Config, route: Route) -> str:
    """A script that builds an image around the bundle and runs it; `down` undoes it, `compose` prints a compose file."""
    published, inside = f"{_listening(route)}:{route.port}", _inside_container(config, route)
    values = {"STOP_S": _stopping_s(config, 5), "NOFILE": _descriptors(config, route)}
    compose = {"DOCKERFILE": _DOCKERFILE, "PUBLISH": published, "ARGUMENTS": _yaml_list(inside), **values}
    return _fill(
        "docker.sh",
        "docker",
        config,
        route,
        IMAGE=_IMAGE,
        SOURCES=_INNER_SOURCES if route.sources else "",
        OWNER=_docker_owner(config),
        PUBLISH=shlex.quote(published),
        OPTIONS=shlex.join(inside),
        COMPOSE=templates.fill("compose.yaml", **compose),
        **values,
    )


def _docker_owner(config: Config) -> str:
    """Numbers, since a name would be looked up in the image."""
    if config.user is None:
        return _INNER_NOBODY
    name = shlex.quote(config.user)
    return f"OWNER=$(id -u {name}):$(id -g {name})"


def kubernetes(config: Config, route: Route) -> str:
    """A Deployment whose pods have the sysctl off, its disruption budget and a Service, for `kubectl apply -f -`."""
    if route.sources:
        said = f"--source: given {route.sources[0]!r}; allowed with generate kubernetes: none (pods are given theirs)"
        raise Exit(exits.USAGE, said)
    uid, gid = _pod_owner(config)
    per_connection = 2 * route.buffer_size + _KERNEL_BYTES
    return _fill(
        "kubernetes.yaml",
        "kubernetes",
        config,
        route,
        IMAGE=_IMAGE,
        UID=uid,
        GID=gid,
        ARGUMENTS=_yaml_list(_inside_container(config, route)),
        PORT=route.port,
        PORT_HEX=f"{route.port:04X}",
        CPUS=1 if config.workers == len(usable_cpus()) else config.workers,
        PYTHON_MIB=_PYTHON_MIB,
        MEMORY_MIB=_PYTHON_MIB + math.ceil(route.max_connections * per_connection / _MIB),
        GONE_S=_GONE_S,
        STOP_S=_stopping_s(config, _GONE_S + 10),
    )


def _pod_owner(config: Config) -> Tuple[int, int]:
    """User and group as numbers, which is all that runAsNonRoot takes: those of --user here, else nobody's."""
    if config.user is None:
        return _NOBODY, _NOBODY
    try:
        account = pwd.getpwnam(config.user)
    except KeyError:
        account = None
    if account is None or account.pw_uid == 0:
        allowed = "a user of this host but root (its number goes into the pods)"
        raise Exit(exits.USAGE, f"--user: given {config.user!r}; allowed with generate kubernetes: {allowed}")
    return account.pw_uid, account.pw_gid


def _inside_container(config: Config, route: Route) -> List[str]:
    """tsproxy's options in a container: it listens on all of its addresses, and is unprivileged from the start."""
    return words(config._replace(user=None), route._replace(bind="::" if ":" in route.bind else "0.0.0.0"))


def _yaml_list(inside: List[str]) -> str:
    """Items that neither YAML, nor compose, nor the shell's here-document reads anything into: our words have no $."""
    return "\n".join(f"- {json.dumps(word)}" for word in inside)


def _stopping_s(config: Config, grace_s: int) -> int:
    """How long a stop may take: the drain, and `grace_s` for what does not end by itself, and the last lines."""
    return math.ceil(config.drain_timeout_s) + grace_s


def _descriptors(config: Config, route: Route) -> int:
    return descriptors_for(route.max_connections, config.workers)
