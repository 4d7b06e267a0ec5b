#!/bin/sh
# tsproxy __VERSION__: a network namespace, "tsproxy", whose TCP sends no timestamps, IPv4 and IPv6: its
# net.ipv4.tcp_timestamps is 0, and was before it had a link. Nothing of it shows on the wire.
# Asked for: __TARGETS__. Anything else can be reached from it, too.
# __NOTES__
#
# Make:   __COMMAND__ | sh
#         as root, as often as you like: what is there stays. Put settings before sh, as in "... | MODE=veth sh".
# Undo:   __COMMAND__ | sh -s down
# Settings, each with its default:
#   MODE     macvlan if ADDRESS is set, else veth.
#            macvlan: a MAC and an address of its own beside UPLINK's; the shortest way out. Not for Wi-Fi and most
#            clouds, which refuse a second MAC; this host itself can't be reached from it.
#            veth: routed and masqueraded by this host, which works wherever it does, and costs half a microsecond. A
#            firewall here that drops what is forwarded (Docker sets one up) has to let tsproxy0 through.
#   UPLINK   the interface of the default route.
#   ADDRESS  macvlan: free addresses of UPLINK's network, e.g. "192.0.2.10/24 2001:db8::10/64"; veth: two private ones.
#   GATEWAY  macvlan: UPLINK's; veth: this host's end of the link.
set -eu
NAME=tsproxy     # the namespace
INSIDE=up0       # its link
OUTSIDE=tsproxy0 # MODE=veth: the other end of that, in this namespace
SOURCES='__SOURCES__' # --source: MODE=veth leaves them as they are, so the network has to route them to this host
KEPT=/run/tsproxy-netns.sysctl # what the sysctls were that `down` has to put back
UPLINK=${UPLINK:-} ADDRESS=${ADDRESS:-} GATEWAY=${GATEWAY:-}
if [ -n "$ADDRESS" ]; then MODE=${MODE:-macvlan}; else MODE=${MODE:-veth}; fi

fail() {
    echo "tsproxy-netns: $*" >&2
    exit 1
}

inside() { ip -n "$NAME" "$@"; }

family() { case $1 in *:*) echo -6 ;; *) echo -4 ;; esac; }

whole() { case $1 in *:*) echo "${1%/*}/128" ;; *) echo "${1%/*}/32" ;; esac; } # an address as a network of one

default_route() { # -4|-6, dev|via: that word of the default route
    ip "$1" -o route show default ${UPLINK:+dev "$UPLINK"} | sed -n "s/.* $2 \([^ ]*\).*/\1/p" | head -n 1
}

change() { # a file under /proc/sys, its new value: keeps the old one the first time
    grep -q "^$1 " "$KEPT" 2>/dev/null || echo "$1 $(cat "/proc/sys/$1")" >>"$KEPT"
    echo "$2" >"/proc/sys/$1"
}

make_namespace() {
    [ -e "/run/netns/$NAME" ] || ip netns add "$NAME"
    # Before there is a link: a new namespace starts with 1, and no SYN may leave with that.
    ip netns exec "$NAME" sh -c 'echo 0 >/proc/sys/net/ipv4/tcp_timestamps'
    inside link set lo up # a new namespace has it down, and tsproxy's witness connects over it
}

make_resolver() { # for names; `ip netns exec` and the systemd unit put it in the place of /etc/resolv.conf
    made=/etc/netns/$NAME/resolv.conf from=/run/systemd/resolve/resolv.conf
    if [ -e "$made" ]; then return; fi
    [ -e "$from" ] || from=/etc/resolv.conf
    if [ ! -e "$from" ]; then return; fi
    mkdir -p "${made%/*}"
    cp "$from" "$made"
    if grep -Eq '^nameserver[[:space:]]+(127\.|::1)' "$made"; then
        echo "tsproxy-netns: $made names a server on this host's loopback, which is not there: edit it" >&2
    fi
}

find_uplink() {
    UPLINK=${UPLINK:-$(default_route -4 dev)}
    UPLINK=${UPLINK:-$(default_route -6 dev)}
    [ -n "$UPLINK" ] || fail "no default route here: set UPLINK to the interface that leads to the exchange"
    ip link show dev "$UPLINK" >/dev/null || fail "UPLINK: given '$UPLINK'; allowed: an interface of this host (ip -brief link)"
}

has_link() { inside link show dev "$INSIDE" >/dev/null 2>&1; }

require_kind() { # the link, if it is there, has to be of this MODE
    if ! has_link; then return; fi
    inside -d link show dev "$INSIDE" | grep -Eq "^ +$MODE( |\$)" ||
        fail "there is another kind of link already: run 'down' first"
}

add_address() { # address, more words: unless it is there with whatever prefix
    inside -o address show dev "$INSIDE" | grep -qF " ${1%/*}/" || inside address replace "$@" dev "$INSIDE"
}

make_macvlan() {
    [ -n "$ADDRESS" ] || fail "MODE=macvlan: set ADDRESS to a free address of $UPLINK's network, e.g. ADDRESS=192.0.2.10/24"
    case "$ADDRESS " in *[!/]*/*) ;; *) fail "ADDRESS: given '$ADDRESS'; allowed: with its prefix, e.g. 192.0.2.10/24" ;; esac
    has_link || ip link add link "$UPLINK" name "$INSIDE" netns "$NAME" type macvlan mode bridge ||
        fail "no macvlan on $UPLINK: the kernel lacks it (modprobe macvlan) or the interface refuses; try MODE=veth"
    for address in $ADDRESS; do
        add_address "$address"
        [ -n "$GATEWAY" ] || gateways="${gateways:-} $(default_route "$(family "$address")" via)"
    done
    for source in $SOURCES; do add_address "$(whole "$source")"; done
    inside link set dev "$INSIDE" up
    for gateway in ${GATEWAY:-$gateways}; do
        inside "$(family "$gateway")" route replace default via "$gateway" dev "$INSIDE"
    done
    await_addresses
}

await_addresses() { # an IPv6 address can't be used until nobody else was found to have it
    for _ in 1 2 3 4 5; do
        inside -6 address show dev "$INSIDE" tentative | grep -q inet6 || return 0
        sleep 1
    done
}

make_veth() {
    ADDRESS=${ADDRESS:-__ADDRESS__} GATEWAY=${GATEWAY:-__GATEWAY__}
    has_link || ip link add "$OUTSIDE" type veth peer name "$INSIDE" netns "$NAME"
    ip link set dev "$OUTSIDE" up
    inside link set dev "$INSIDE" up
    for gateway in $GATEWAY; do lead_out "$gateway"; done
    for address in $ADDRESS $SOURCES; do lead_in "$(whole "$address")"; done
    let_through
    masquerade
}

lead_out() { # the namespace's default route goes to this host's end
    case $1 in *:*) nodad=nodad ;; *) nodad= ;; esac
    ip address replace "$(whole "$1")" dev "$OUTSIDE" $nodad
    inside "$(family "$1")" route replace "$(whole "$1")" dev "$INSIDE"
}

lead_in() { # this host's route to an address of the namespace
    case $1 in *:*) nodad=nodad ;; *) nodad= ;; esac
    if ip -o route get "${1%/*}" 2>/dev/null | grep -q '^local '; then
        fail "${1%/*} is this host's own address: MODE=veth needs another"
    fi
    inside address replace "$1" dev "$INSIDE" $nodad
    ip "$(family "$1")" route replace "$1" dev "$OUTSIDE"
    for gateway in $GATEWAY; do
        [ "$(family "$gateway")" != "$(family "$1")" ] ||
            inside "$(family "$1")" route replace default via "$gateway" dev "$INSIDE"
    done
}

let_through() { # forwarding, on these two interfaces only; IPv6 has but one switch for all
    for interface in "$OUTSIDE" "$UPLINK"; do change "net/ipv4/conf/$interface/forwarding" 1; done
    case $ADDRESS$SOURCES in *:*) ;; *) return ;; esac
    # A router takes no routes from others, unless it is told to with 2: without it this host may lose its own.
    if [ "$(cat "/proc/sys/net/ipv6/conf/$UPLINK/accept_ra")" = 1 ]; then change "net/ipv6/conf/$UPLINK/accept_ra" 2; fi
    change net/ipv6/conf/all/forwarding 1
}

masquerade() {
    {
        printf 'table inet tsproxy_netns\ndelete table inet tsproxy_netns\ntable inet tsproxy_netns {\n'
        printf '  chain out {\n    type nat hook postrouting priority srcnat; policy accept;\n'
        for address in $ADDRESS; do
            case $address in *:*) ip=ip6 ;; *) ip=ip ;; esac
            printf '    %s saddr %s oifname != "%s" masquerade\n' "$ip" "${address%/*}" "$OUTSIDE"
        done
        printf '  }\n}\n'
    } | nft -f -
}

up() {
    [ "$(id -u)" = 0 ] || fail "needs root"
    case $MODE in macvlan | veth) ;; *) fail "MODE: given '$MODE'; allowed: macvlan or veth" ;; esac
    find_uplink
    make_namespace
    require_kind
    make_resolver
    "make_$MODE"
    cat <<'END'
The namespace tsproxy is ready. Would the policy hold in it?
    ip netns exec tsproxy tsproxy.py check __OPTIONS__
# __RUN__
For good, at each boot: tsproxy.py generate systemd __OPTIONS__
END
}

down() {
    [ "$(id -u)" = 0 ] || fail "needs root"
    if [ -e "/run/netns/$NAME" ]; then
        if has_link; then inside link delete dev "$INSIDE"; fi # now, whoever still runs in there
        ip netns delete "$NAME"
    fi
    if command -v nft >/dev/null; then nft delete table inet tsproxy_netns 2>/dev/null || :; fi
    if [ -e "$KEPT" ]; then
        while read -r file value; do
            if [ -e "/proc/sys/$file" ]; then echo "$value" >"/proc/sys/$file"; fi
        done <"$KEPT"
        rm "$KEPT"
    fi
    rm -f "/etc/netns/$NAME/resolv.conf"
    if [ -d "/etc/netns/$NAME" ]; then rmdir "/etc/netns/$NAME"; fi
    rmdir /etc/netns 2>/dev/null || : # if nobody else has something in it
}
# __ROUTES__

case ${1:-up} in
up) up ;;
down) down ;;
# __PRINT_ROUTES__
*) fail "given '$1'; allowed: __ALLOWED__" ;;
esac
