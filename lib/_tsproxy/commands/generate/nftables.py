"""`generate nftables`: rules for tsproxy's own connections, known by the tag on their sockets, IPv4 and IPv6."""

from __future__ import annotations

from _tsproxy.commands.generate.text import command, fill, targets
from _tsproxy.config import Config
from _tsproxy.host.sockets import TAG

_MARK = "0x74730001"  # of the connections, in conntrack; "ts" and a number, so that nobody else's is the same

_STRIP = """\
# tsproxy @VERSION@: takes the TCP timestamp option off tsproxy's own connections, IPv4 and IPv6.
# Asked for: @TARGETS@. The rules hold for any target.
#
# Load:   @COMMAND@ | nft -f -
#         As often as you like: the table is replaced in one step, and what is established goes on.
# Undo:   nft delete table inet tsproxy        (tsproxy then refuses new connections)
# Look:   nft list table inet tsproxy          (the counter counts SYNs; tsproxy.py check shows one)
# Keep:   write it to /etc/nftables-tsproxy.nft instead, add the line
#             include "/etc/nftables-tsproxy.nft"
#         at the end of /etc/nftables.conf (RHEL: /etc/sysconfig/nftables.conf); systemctl enable nftables
# Needs:  Linux 5.18 and nft 1.0.3, for "reset tcp option". Older: tsproxy.py generate netns.
# Shows:  the SYN has ten NOPs where the option was, which no host without timestamps sends.
#         net.ipv4.tcp_timestamps=0 (generate netns, systemd, docker, kubernetes) leaves no such trace.
table inet tsproxy
delete table inet tsproxy
table inet tsproxy {
  chain out {
    type filter hook output priority mangle; policy accept;
    # priority 0:@TAG@ is the tag, the SO_PRIORITY of tsproxy's upstream sockets: it takes no privilege to set and is not
    # on the wire. Not an address: tsproxy proves these rules on loopback before it connects, where none would match.
    # Only the SYN: what it does not offer is never negotiated. So no other packet is touched, and no conntrack needed.
    @WHO@
    meta priority 0:@TAG@ @UID@tcp flags & (fin|syn|rst|ack) == syn counter reset tcp option timestamp
  }
}
"""

_WHO = """\
    # From @USER@ only, and from root, who shows the rules to work before it becomes @USER@. A user is known for as long
    # as the socket is open, so it can be asked for on a SYN.""".lstrip()

_REWRITE = """\
# tsproxy @VERSION@: each packet of tsproxy's own connections carries the timestamp @TSVAL@, IPv4 and IPv6.
# Asked for: @TARGETS@. The rules hold for any target.
#
# Load:   @COMMAND@ | nft -f -
#         As often as you like: the table is replaced in one step. But stop tsproxy before you change the value, or load
#         this beside --timestamps=preserve: a connection whose timestamps jump back stalls (PAWS).
# Undo:   stop tsproxy, then: nft delete table inet tsproxy
# Look:   nft list table inet tsproxy          (counters: packets tagged, rewritten out, answered in)
# Keep:   write it to /etc/nftables-tsproxy.nft instead, add the line
#             include "/etc/nftables-tsproxy.nft"
#         at the end of /etc/nftables.conf (RHEL: /etc/sysconfig/nftables.conf); systemctl enable nftables
# Needs:  Linux 4.14, nft 0.9, and net.ipv4.tcp_timestamps=1 (sysctl -w): where it is 0 there is
#         nothing to rewrite.
# Shows:  a clock that stands still. Neither side is protected against old duplicates any more (PAWS).
table inet tsproxy
delete table inet tsproxy
table inet tsproxy {
  chain out {
    type filter hook output priority mangle; policy accept;
    # priority 0:@TAG@ is the tag, the SO_PRIORITY of tsproxy's upstream sockets: it takes no privilege to set and is not
    # on the wire. Not an address: tsproxy proves these rules on loopback before it connects, where none would match.
    # Not a user: after close() a socket has none, and its last packets would show the real clock.
    # The mark tells the rest of the connection: answers, and what TIME_WAIT sends, which has no tag. It is set with each
    # packet, since conntrack forgets a connection that is half closed and silent for a minute.
    meta priority 0:@TAG@ ct mark set @MARK@ counter
    meta priority 0:@TAG@ tcp option timestamp tsval set @TSVAL@
    ct mark @MARK@ tcp option timestamp tsval set @TSVAL@ counter
  }
  chain in {
    type filter hook input priority mangle; policy accept;
    # The far end echoes @TSVAL@, which our kernel never sent: it would drop the answer. 0 is no echo at all.
    ct mark @MARK@ tcp option timestamp tsecr set 0 counter
  }
}
"""


def text(config: Config) -> str:
    """The rules for `nft -f -`, which can be loaded again and again."""
    common = {"COMMAND": command("nftables", config), "TARGETS": targets(config), "TAG": TAG}
    if config.timestamps == "rewrite":
        return fill(_REWRITE, MARK=_MARK, TSVAL=config.static_timestamp, **common)
    who = fill(_WHO, USER=config.user) if config.user else ""
    uid = f'meta skuid {{ 0, "{config.user}" }} ' if config.user else ""
    return fill(_STRIP, WHO=who, UID=uid, **common)
