"""`generate docker`: a script that builds an image around the bundle and runs it without timestamps, and a compose file."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
from typing import List

from _tsproxy.cli.config import Config
from _tsproxy.linux.limits import descriptors_for
from _tsproxy.tools.generate.netns import listen_address
from _tsproxy.tools.generate.text import command, fill, targets, words

IMAGE = "python:3.13-slim"
_GRACE_S = 5  # beyond the drain, for the last lines

_SCRIPT = """\
#!/bin/sh
# tsproxy @VERSION@ in a container of its own, whose net.ipv4.tcp_timestamps is 0, IPv4 and IPv6.
# Asked for: @TARGETS@.
#
# Write:  @COMMAND@ > tsproxy-docker.sh
#         tsproxy.py bundle tsproxy            beside it: the program that goes into the image
# Make:   sh tsproxy-docker.sh                 as often as you like: the container is replaced
# Undo:   sh tsproxy-docker.sh down
# Or:     sh tsproxy-docker.sh compose > compose.yaml && docker compose up --build --detach
#         undo: docker compose down --rmi local
# Look:   docker logs -f tsproxy
#
# Doesn't work with --network=host, where the sysctl is the host's own and Docker refuses it; nor with rootless Docker
# (slirp4netns, pasta) or Docker Desktop, which make each connection anew from outside: the container would see no
# timestamps while the wire has them. This script refuses the last two.
# NETWORK=name takes another network than the default bridge, e.g. a macvlan: the shortest way out.
@SOURCES@
set -eu
NETWORK=${NETWORK:-bridge}
@OWNER@

fail() {
    echo "tsproxy-docker: $*" >&2
    exit 1
}

require_own_kernel() { # where the packets of a container leave as it made them
    info=$(docker info --format '{{.OperatingSystem}} {{.SecurityOptions}}') && [ -n "${info%% \\[*}" ] ||
        fail "docker info can't say what this Docker is: does it run, and may you ask it?"
    case $info in
    *rootless* | *"Docker Desktop"*) fail "rootless Docker and Docker Desktop make connections anew: timestamps would leak" ;;
    esac
    [ "$NETWORK" != host ] || fail "NETWORK: given 'host'; allowed: a network with a namespace of its own"
}

dockerfile() {
    cat <<'END'
FROM @IMAGE@
COPY tsproxy /usr/local/bin/tsproxy
RUN chmod 0755 /usr/local/bin/tsproxy
ENTRYPOINT ["/usr/local/bin/python3", "-I", "-S", "/usr/local/bin/tsproxy"]
END
}

up() {
    require_own_kernel
    [ -f tsproxy ] || fail "no file 'tsproxy' here; to make it: tsproxy.py bundle tsproxy"
    dockerfile | docker build --tag tsproxy --file - .
    docker rm --force tsproxy >/dev/null 2>&1 || :
    # The sysctl is the point. The rest takes away what a relay has no use for: writing, capabilities, new privileges.
    # Descriptors: two sockets for each connection, and some. It stops when it has drained.
    docker run --detach --name tsproxy \\
        --sysctl net.ipv4.tcp_timestamps=0 \\
        --network "$NETWORK" \\
        --publish @PUBLISH@ \\
        --read-only \\
        --cap-drop=ALL \\
        --security-opt=no-new-privileges \\
        --user "$OWNER" \\
        --ulimit nofile=@NOFILE@:@NOFILE@ \\
        --restart=on-failure \\
        --stop-timeout @STOP_S@ \\
        tsproxy @OPTIONS@
}

down() {
    docker rm --force tsproxy
    docker image rm --force tsproxy
}

compose() {
    cat <<END
# Undo: docker compose down --rmi local
name: tsproxy
services:
  tsproxy:
    container_name: tsproxy
    image: tsproxy
    build:
      context: .
      dockerfile_inline: |
$(dockerfile | sed 's/^/        /')
    # The point of it all. Not with network_mode: host, nor in rootless Docker.
    sysctls:
      net.ipv4.tcp_timestamps: "0"
    ports:
      - "@PUBLISH_PLAIN@"
    read_only: true
    cap_drop:
      - ALL
    security_opt:
      - no-new-privileges
    user: "$OWNER"
    ulimits:
      nofile: @NOFILE@
    restart: on-failure
    stop_grace_period: @STOP_S@s
    command:
@ARGUMENTS@
END
}

case ${1:-up} in
up) up ;;
down) down ;;
compose) compose ;;
*) fail "given '$1'; allowed: up, down or compose" ;;
esac
"""

_SOURCES = "# --source: these have to be addresses of the container, so take a NETWORK that gives it them."


def text(config: Config) -> str:
    """The script; `down` undoes it, `compose` prints a compose file that does the same."""
    published = f"{listen_address(config)}:{config.port}"
    inside = words_inside(config)
    return fill(
        _SCRIPT,
        COMMAND=command("docker", config),
        TARGETS=targets(config),
        IMAGE=IMAGE,
        SOURCES=_SOURCES if config.sources else "",
        OWNER=_owner(config),
        PUBLISH=shlex.quote(published),
        PUBLISH_PLAIN=published,
        NOFILE=descriptors_for(config.max_connections, config.workers),
        STOP_S=math.ceil(config.drain_timeout_s) + _GRACE_S,
        OPTIONS=shlex.join(inside),
        ARGUMENTS="\n".join(f"      - {_for_compose(word)}" for word in inside),
    )


def words_inside(config: Config, without: List[str] | None = None) -> List[str]:
    """tsproxy's options in a container: it listens on all of its addresses, and is unprivileged from the start."""
    everywhere = "::" if ":" in config.bind else "0.0.0.0"
    return words(dataclasses.replace(config, bind=everywhere, user=None), without or ())


def _owner(config: Config) -> str:
    """Numbers, since a name would be looked up in the image."""
    if config.user is None:
        return "OWNER=65534:65534 # nobody; generate --user=NAME takes a user of this host"
    name = shlex.quote(config.user)
    return f"OWNER=$(id -u {name}):$(id -g {name})"


def _for_compose(word: str) -> str:
    """A YAML string that neither the shell's here-document nor compose reads anything into: there is no $ in our words."""
    return json.dumps(word)
