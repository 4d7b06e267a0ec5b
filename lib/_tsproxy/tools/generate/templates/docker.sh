#!/bin/sh
# tsproxy __VERSION__ in a container of its own, whose net.ipv4.tcp_timestamps is 0, IPv4 and IPv6.
# Asked for: __TARGETS__.
#
# Write:  __COMMAND__ > tsproxy-docker.sh
#         tsproxy.py bundle tsproxy            beside it: the program that goes into the image
# __WRITE__
# Make:   sh tsproxy-docker.sh                 as often as you like: the container is replaced
# Undo:   sh tsproxy-docker.sh down
# Or:     sh tsproxy-docker.sh compose > compose.yaml && docker compose up --build --detach
#         undo: docker compose down --rmi local
# Look:   docker logs -f tsproxy
# __RELOAD__
#
# Doesn't work with --network=host, where the sysctl is the host's own and Docker refuses it; nor with rootless Docker
# (slirp4netns, pasta) or Docker Desktop, which make each connection anew from outside: the container would see no
# timestamps while the wire has them. This script refuses the last two.
# NETWORK=name takes another network than the default bridge, e.g. a macvlan: the shortest way out.
# __SOURCES__
# __NOTES__
set -eu
NETWORK=${NETWORK:-bridge}
# __OWNER__

fail() {
    echo "tsproxy-docker: $*" >&2
    exit 1
}

require_own_kernel() { # where the packets of a container leave as it made them
    info=$(docker info --format '{{.OperatingSystem}} {{.SecurityOptions}}') && [ -n "${info%% \[*}" ] ||
        fail "docker info can't say what this Docker is: does it run, and may you ask it?"
    case $info in
    *rootless* | *"Docker Desktop"*) fail "rootless Docker and Docker Desktop make connections anew: timestamps would leak" ;;
    esac
    [ "$NETWORK" != host ] || fail "NETWORK: given 'host'; allowed: a network with a namespace of its own"
}

dockerfile() {
    cat <<'END'
FROM __IMAGE__
COPY tsproxy /usr/local/bin/tsproxy
RUN chmod 0755 /usr/local/bin/tsproxy
ENTRYPOINT ["/usr/local/bin/python3", "-I", "-S", "/usr/local/bin/tsproxy"]
END
}

up() {
    require_own_kernel
    [ -f tsproxy ] || fail "no file 'tsproxy' here; to make it: tsproxy.py bundle tsproxy"
    # __REQUIRE__
    dockerfile | docker build --tag tsproxy --file - .
    docker rm --force tsproxy >/dev/null 2>&1 || :
    # The sysctl is the point. The rest takes away what a relay has no use for: writing, capabilities, new privileges.
    # Descriptors: two sockets for each connection, and some. It stops when it has drained.
    docker run --detach --name tsproxy \
        --sysctl net.ipv4.tcp_timestamps=0 \
        --network "$NETWORK" \
        __PUBLISH__ \
        --read-only \
        --cap-drop=ALL \
        --security-opt=no-new-privileges \
        --user "$OWNER" \
        --ulimit nofile=__NOFILE__:__NOFILE__ \
        --restart=on-failure \
        --stop-timeout __STOP_S__ \
        tsproxy __OPTIONS__
}

down() {
    docker rm --force tsproxy
    docker image rm --force tsproxy
}

compose() {
    cat <<END
# __COMPOSE__
END
}
# __ROUTES__

case ${1:-up} in
up) up ;;
down) down ;;
compose) compose ;;
# __PRINT_ROUTES__
*) fail "given '$1'; allowed: __ALLOWED__" ;;
esac
