"""`generate docker|kubernetes`: what their templates leave open, computed from the Config and its routes.

In a container tsproxy listens on all of its addresses: where clients may connect is said outside, and a file of routes is
written anew for the inside. Knows which template makes which set-up. Knows nothing of what may be asked for: see `run`.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from typing import Callable, Dict, Iterator, List, NamedTuple, Sequence, Set

from _tsproxy.cli.config import Config, Route, usable_cpus
from _tsproxy.cli.words import words
from _tsproxy.policy import kinds
from _tsproxy.policy.kinds import ROUTES
from _tsproxy.tools.generate import routes_file, templates
from _tsproxy.tools.generate.common import NONE_INSIDE, descriptors, filled, listening, preserved, printing, stopping_s

_IMAGE = "python:3.13-slim"
_GONE_S = 5  # until no node sends new clients any more
_MIB = 1 << 20
_PYTHON_MIB = 128
_KERNEL_BYTES = 512 << 10  # socket buffers of a busy connection, which count as the pod's
_PORT_NAME = 15  # characters of a container port's name (RFC 6335, section 5.1)

_INNER_SOURCES = "# --source: these have to be addresses of the container, so take a NETWORK that gives it them."
_INNER_NOBODY = f"OWNER={kinds.NOBODY}:{kinds.NOBODY} # nobody; generate --user=NAME takes a user of this host"
_DOCKERFILE = "$(dockerfile | sed 's/^/        /')"  # compose.yaml stands in a here-document of docker.sh
_WRITE_ROUTES = """\
#         mkdir -p tsproxy-routes && sh tsproxy-docker.sh routes > tsproxy-routes/routes.ini
#                                              the routes as they are read in the container: these are yours to edit"""
_RELOAD_ROUTES = """\
# Reload: docker kill --signal=HUP tsproxy     reads tsproxy-routes/routes.ini again. A port that is not published yet takes
#                                              this script anew, and a new container."""
_REQUIRE_ROUTES = """\
[ -f tsproxy-routes/routes.ini ] ||
    fail "no file 'tsproxy-routes/routes.ini' here; this script prints it when it is given the word routes\""""
_MOUNT = '--mount "type=bind,source=$PWD/tsproxy-routes,target=/etc/tsproxy,readonly"'  # an editor replaces the file
_COMPOSE_VOLUME = """\
volumes:
  - type: bind
    source: ./tsproxy-routes
    target: /etc/tsproxy
    read_only: true"""
_CONFIG_MAP = """\
---
apiVersion: v1
kind: ConfigMap
metadata:
  name: tsproxy-routes
  labels:
    app.kubernetes.io/name: tsproxy
data:
  routes.ini: |
{}"""
_POD_MOUNT = """\
- name: routes
  mountPath: /etc/tsproxy
  readOnly: true"""
_POD_VOLUME = """\
- name: routes
  configMap:
    name: tsproxy-routes"""
_RELOAD_PODS = """\
# Reload: a change of the ConfigMap tsproxy-routes is in the pods after a minute or two. Then each of them is told:
#         for pod in $(kubectl get pods -l app.kubernetes.io/name=tsproxy -o name); do
#             kubectl exec "$pod" -- sh -c 'kill -HUP 1'
#         done
#         Or one pod after the other starts anew: kubectl rollout restart deployment/tsproxy
#         A new port takes this whole text anew, since pods and Service name each, and has pods start anew."""


class _Inside(NamedTuple):
    """What tsproxy is given in a container, and the text of its file of routes, if it has one."""

    config: Config
    file: str = ""

    @property
    def arguments(self) -> List[str]:
        """tsproxy's options."""
        return words(self.config)

    @property
    def ports(self) -> List[int]:
        """Where it listens."""
        return [route.port for route in self.config.routes]


def _inside(config: Config, remark: Callable[[Route], str]) -> _Inside:
    """It listens on all addresses of the container, and is unprivileged from the start. `remark` is told of a route outside."""
    routes = tuple(_listening_inside(route, port) for route, port in zip(config.routes, _distinct(config.routes)))
    inside = config._replace(user=None, routes=routes)
    if config.routes_file is None:
        return _Inside(inside)
    remarks = {route.name: remark(route) for route in config.routes}
    text = routes_file.text(inside, lambda route: remarks[route.name])
    return _Inside(inside._replace(routes_file=ROUTES), text)


def _listening_inside(route: Route, port: int) -> Route:
    return route._replace(bind="::" if ":" in route.bind else "0.0.0.0", port=port)


def _distinct(routes: Sequence[Route]) -> Iterator[int]:
    """Each route's own port; for one that differs from another in its bind alone, another port: in there it is the same."""
    wanted = {route.port for route in routes}
    given: Set[int] = set()
    for route in routes:
        others = (port for port in (*range(route.port, 65536), *range(1024, route.port)) if port not in wanted | given)
        port = route.port if route.port not in given else next(others)
        given.add(port)
        yield port


def docker(config: Config) -> str:
    """A script that builds an image around the bundle and runs it; `down` undoes it, `compose` prints a compose file."""
    inside = _inside(config, lambda route: f"Clients connect to {listening(route)}.")
    with_file = bool(inside.file)
    published = [f"{listening(route)}:{port}" for route, port in zip(config.routes, inside.ports)]
    values = {"STOP_S": stopping_s(config, 5), "NOFILE": descriptors(config)}
    return filled(
        "docker.sh",
        "docker",
        config,
        IMAGE=_IMAGE,
        WRITE=_WRITE_ROUTES if with_file else "",
        RELOAD=_RELOAD_ROUTES if with_file else "",
        NOTES="\n".join(preserved(config, NONE_INSIDE)),
        SOURCES=_INNER_SOURCES if any(route.sources for route in config.routes) else "",
        OWNER=_docker_owner(config),
        REQUIRE=_REQUIRE_ROUTES if with_file else "",
        PUBLISH=" \\\n        ".join(_flags(published, inside)),
        OPTIONS=shlex.join(inside.arguments),
        COMPOSE=_compose(published, inside, values),
        ALLOWED="up, down, compose or routes" if with_file else "up, down or compose",
        **printing(inside.file),
        **values,
    )


def _flags(published: Sequence[str], inside: _Inside) -> List[str]:
    return [*(f"--publish {shlex.quote(one)}" for one in published), *([_MOUNT] if inside.file else [])]


def _compose(published: Sequence[str], inside: _Inside, values: Dict[str, int]) -> str:
    return templates.fill(
        "compose.yaml",
        DOCKERFILE=_DOCKERFILE,
        PUBLISH="\n".join(f'- "{one}"' for one in published),
        VOLUMES=_COMPOSE_VOLUME if inside.file else "",
        ARGUMENTS=_yaml_list(inside.arguments),
        **values,
    )


def _docker_owner(config: Config) -> str:
    """Numbers, since a name would be looked up in the image."""
    if config.user is None:
        return _INNER_NOBODY
    name = shlex.quote(config.user)
    return f"OWNER=$(id -u {name}):$(id -g {name})"


def kubernetes(config: Config) -> str:
    """A Deployment whose pods have the sysctl off, its disruption budget and a Service, for `kubectl apply -f -`."""
    inside = _inside(config, lambda route: f"Clients connect to port {route.port} of the Service.")
    uid, gid = kinds.pod_owner(config)
    ports = dict(zip(_port_names(config), inside.ports))
    return filled(
        "kubernetes.yaml",
        "kubernetes",
        config,
        IMAGE=_IMAGE,
        UID=uid,
        GID=gid,
        ARGUMENTS=_yaml_list(inside.arguments),
        PORTS="\n".join(f'- name: "{name}"\n  containerPort: {port}' for name, port in ports.items()),
        SERVED="\n".join(f'- name: "{name}"\n  port: {port}\n  targetPort: "{name}"' for name, port in ports.items()),
        LISTENING=_any_of_hex(inside.ports),
        CPUS=1 if config.workers == len(usable_cpus()) else config.workers,
        PYTHON_MIB=_PYTHON_MIB,
        MEMORY_MIB=_PYTHON_MIB + math.ceil(_connections_bytes(config) / _MIB),
        GONE_S=_GONE_S,
        STOP_S=stopping_s(config, _GONE_S + 10),
        **_file_of_pods(config, inside.file),
    )


def _connections_bytes(config: Config) -> int:
    return sum(route.max_connections * (2 * route.buffer_size + _KERNEL_BYTES) for route in config.routes)


def _file_of_pods(config: Config, file: str) -> Dict[str, str]:
    """The ConfigMap with the routes, and where pods have it; nothing without a file."""
    if not file:
        return dict.fromkeys(("RELOAD", "NOTES", "CONFIG_MAP", "MOUNTS", "VOLUMES"), "")
    indented = "\n".join(f"    {line}" if line else "" for line in file.splitlines())
    return {
        "RELOAD": _RELOAD_PODS,
        "NOTES": "\n".join(preserved(config, NONE_INSIDE)),
        "CONFIG_MAP": _CONFIG_MAP.format(indented),
        "MOUNTS": _POD_MOUNT,
        "VOLUMES": _POD_VOLUME,
    }


def _port_names(config: Config) -> Iterator[str]:
    """For each route: 15 of a-z, 0-9 and single dashes inside, at least one letter, no two the same (RFC 6335, section 5.1).

    In quotes, for YAML takes some as no text: null, on, 1e3.
    """
    if config.routes_file is None:
        yield "relay"
        return
    given: Set[str] = set()
    for route in config.routes:
        ends = ("", *(f"-{number}" for number in range(len(config.routes))))
        name = next(name for name in (_port_name(route.name, end) for end in ends) if name not in given)
        given.add(name)
        yield name


def _port_name(name: str, end: str) -> str:
    plain, room = re.sub(r"[^a-z0-9]+", "-", name).strip("-"), _PORT_NAME - len(end)
    lettered = plain if re.search("[a-z]", plain[:room]) else f"r-{plain}"
    return lettered[:room].rstrip("-") + end


def _any_of_hex(ports: Sequence[int]) -> str:
    """As /proc/net/tcp has them, for a regular expression: of several routes one may be gone by a reload."""
    found = "|".join(f"{port:04X}" for port in ports)
    return f"({found})" if len(ports) > 1 else found


def _yaml_list(inside: List[str]) -> str:
    """Items that neither YAML, nor compose, nor the shell's here-document reads anything into: our words have no $."""
    return "\n".join(f"- {json.dumps(word)}" for word in inside)
