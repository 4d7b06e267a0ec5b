"""The names of the nftables tables in this network namespace, dumped by netlink(7): needs no nft.

Names only. The effect of the rules on our packets is checked on the packets (policy/witness.py).
"""

from __future__ import annotations

import struct
from typing import List

from _tsproxy.linux import netlink
from _tsproxy.linux.printable import printable

# include/uapi/linux/netlink.h, netfilter/nfnetlink.h, netfilter/nf_tables.h
_NETLINK_NETFILTER = 12
_GETTABLE = 10 << 8 | 1  # NFNL_SUBSYS_NFTABLES, NFT_MSG_GETTABLE
_TABLE_NAME = 1
_FAMILIES = {1: "inet", 2: "ip", 3: "arp", 5: "netdev", 7: "bridge", 10: "ip6"}
_GENERIC = struct.Struct("=BBH")  # struct nfgenmsg
_ATTRIBUTE = struct.Struct("=HH")  # struct nlattr


def tables() -> List[str]:
    """E.g. ["inet tsproxy"]. OSError: EPERM without CAP_NET_ADMIN, others where the kernel has no nftables."""
    answers = netlink.dump(_NETLINK_NETFILTER, _GETTABLE, bytes(_GENERIC.size))
    return [f"{_FAMILIES.get(body[0], 'family ' + str(body[0]))} {_name(body)}" for body in answers]


def _name(body: bytes) -> str:
    at = _GENERIC.size
    while at + _ATTRIBUTE.size <= len(body):
        size, kind = _ATTRIBUTE.unpack_from(body, at)
        if kind == _TABLE_NAME:
            name = body[at + _ATTRIBUTE.size : at + size].rstrip(b"\0")
            return printable(name.decode("utf-8", "surrogateescape"))
        at += max(_ATTRIBUTE.size, -(-size // 4) * 4)
    return "?"
