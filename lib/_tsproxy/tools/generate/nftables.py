"""`generate nftables`: rules for tsproxy's own connections, known by the tag on their sockets, IPv4 and IPv6."""

from __future__ import annotations

from _tsproxy.cli.config import Config
from _tsproxy.linux.sockets import TAG, TAG_DSCP
from _tsproxy.tools.generate.text import command, fill, targets

_MARK = "0x74730001"  # of the connections, in conntrack; "ts" and a number, so that nobody else's is the same

_STRIP = """\
# tsproxy @VERSION@: takes the TCP timestamp option off tsproxy's own connections, IPv4 and IPv6.
# Asked for: @TARGETS@. The rules hold for any target.
#
# Load:   @COMMAND@ | nft -f -
#         As often as you like: the table is replaced in one step, and what is established goes on.
# Undo:   nft delete table inet tsproxy        (tsproxy then refuses new connections)
# Look:   nft list table inet tsproxy          (the counters count segments; tsproxy.py check shows some)
# Keep:   write it to /etc/nftables-tsproxy.nft instead, add the line
#             include "/etc/nftables-tsproxy.nft"
#         at the end of /etc/nftables.conf (RHEL: /etc/sysconfig/nftables.conf); systemctl enable nftables
# Needs:  nft 1.0.3, and a Linux with "reset tcp option": 5.18, Debian 11's 5.10, or another that has it ported back.
#         Where nft refuses it: tsproxy.py generate netns.
# Shows:  the SYN has ten NOPs where the option was, which no host without timestamps sends.
#         net.ipv4.tcp_timestamps=0 (generate netns, systemd, docker, kubernetes) leaves no such trace.
table inet tsproxy
delete table inet tsproxy
table inet tsproxy {
  chain out {
    type filter hook output priority mangle; policy accept;
@TAGS@
  }
  chain ours {
    # Each segment, not the SYN alone: while the sysctl is 1, Linux takes a timestamp that it never asked for, in a SYN-ACK
    # or in a SYN that crosses its own, and sends its clock from then on.
    reset tcp option timestamp
    ct mark set @MARK@
@UNTAG@
  }
  chain in {
    type filter hook input priority mangle; policy accept;
    # So that it takes none: then tsproxy can see, without any right, that no later segment has one either. Where conntrack
    # has lost the mark it takes it, is found out, and the connection is refused; the rule above holds all the same.
    ct mark @MARK@ tcp flags & syn == syn counter reset tcp option timestamp
  }
}
"""

_TAGS = """\
    # priority 0:@TAG@ and DSCP @DSCP@ are the tags of tsproxy's upstream sockets; they take no privilege to set. The priority
    # is not on the wire, and the DSCP is set back to 0 below. By the DSCP the rules know what the kernel sends without a
    # socket as well: TIME_WAIT, and the rest of a program that was killed. No state is needed for it that could be lost.
    # Not an address: tsproxy proves these rules on loopback before it connects, where none would match, and a name may
    # move.
    @WHO@
    meta priority 0:@TAG@ @UID@counter jump ours
    ip dscp @DSCP@ counter jump ours
    ip6 dscp @DSCP@ counter jump ours"""

_WHO = """\
    # By the priority only from @USER@, and from root, who shows the rules to work before it becomes @USER@. Not by the
    # DSCP: after close() a socket has no user.""".lstrip()

_UNTAG = """\
    ip dscp set 0
    ip6 dscp set 0"""

_REWRITE = """\
# tsproxy @VERSION@: each packet of tsproxy's own connections carries the timestamp @TSVAL@, IPv4 and IPv6.
# Asked for: @TARGETS@. The rules hold for any target.
#
# Load:   @COMMAND@ | nft -f -
#         As often as you like: the table is replaced in one step. But stop tsproxy before you change the value, or load
#         this beside --timestamps=preserve: a connection whose timestamps jump back stalls (PAWS).
# Undo:   stop tsproxy, and after a minute (TIME_WAIT): nft delete table inet tsproxy
# Look:   nft list table inet tsproxy          (counters: packets rewritten on their way out, answered in)
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
@TAGS@
  }
  chain ours {
    tcp option timestamp tsval set @TSVAL@
    ct mark set @MARK@
@UNTAG@
  }
  chain in {
    type filter hook input priority mangle; policy accept;
    # The far end echoes @TSVAL@, which our kernel never sent: it would drop the SYN-ACK. 0 is no echo at all. Where
    # conntrack has lost the mark, a connection is not made; nothing leaves for it.
    ct mark @MARK@ tcp option timestamp tsecr set 0 counter
  }
}
"""


def text(config: Config) -> str:
    """The rules for `nft -f -`, which can be loaded again and again."""
    user = config.user if config.timestamps == "strip" else None
    who = fill(_WHO, USER=user) if user else ""
    uid = f'meta skuid {{ 0, "{user}" }} ' if user else ""
    tags = fill(_TAGS, TAG=TAG, DSCP=TAG_DSCP, WHO=who, UID=uid)
    common = {"MARK": _MARK, "COMMAND": command("nftables", config), "TARGETS": targets(config), "TAGS": tags, "UNTAG": _UNTAG}
    if config.timestamps == "rewrite":
        return fill(_REWRITE, TSVAL=config.static_timestamp, **common)
    return fill(_STRIP, **common)
