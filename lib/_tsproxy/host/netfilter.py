"""The names of the nftables tables in this network namespace, asked of the kernel itself (netlink(7)): no nft needed.

Names only. What the rules in them do to our packets is read off our packets.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import Iterator, List, Tuple

# include/uapi/linux/netlink.h, netfilter/nfnetlink.h, netfilter/nf_tables.h
_NETLINK_NETFILTER = 12
_NLM_F_REQUEST_DUMP = 0x301
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_GETTABLE = 10 << 8 | 1  # NFNL_SUBSYS_NFTABLES, NFT_MSG_GETTABLE
_TABLE_NAME = 1
_FAMILIES = {1: "inet", 2: "ip", 3: "arp", 5: "netdev", 7: "bridge", 10: "ip6"}
_HEAD = struct.Struct("=IHHII")  # struct nlmsghdr
_GENERIC = struct.Struct("=BBH")  # struct nfgenmsg
_ATTRIBUTE = struct.Struct("=HH")  # struct nlattr
_PATIENCE_S = 1.0


def tables() -> List[str]:
    """E.g. ["inet tsproxy"]. OSError: EPERM without CAP_NET_ADMIN, others where the kernel has no nftables."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as kernel:
        kernel.settimeout(_PATIENCE_S)
        kernel.sendto(_HEAD.pack(_HEAD.size + _GENERIC.size, _GETTABLE, _NLM_F_REQUEST_DUMP, 1, 0) + bytes(4), (0, 0))
        return list(_answers(kernel))


def _answers(kernel: socket.socket) -> Iterator[str]:
    while True:
        for kind, body in _messages(kernel.recv(65536)):
            if kind == _NLMSG_DONE:
                return
            if kind == _NLMSG_ERROR:
                number = -struct.unpack_from("=i", body)[0] or errno.EPROTO
                raise OSError(number, os.strerror(number))
            yield f"{_FAMILIES.get(body[0], 'family ' + str(body[0]))} {_name(body)}"


def _messages(data: bytes) -> Iterator[Tuple[int, bytes]]:
    at = 0
    while at + _HEAD.size <= len(data):
        size, kind, *_ = _HEAD.unpack_from(data, at)
        yield kind, data[at + _HEAD.size : at + size]
        at += max(_HEAD.size, -(-size // 4) * 4)


def _name(body: bytes) -> str:
    at = _GENERIC.size
    while at + _ATTRIBUTE.size <= len(body):
        size, kind = _ATTRIBUTE.unpack_from(body, at)
        if kind == _TABLE_NAME:
            return body[at + _ATTRIBUTE.size : at + size].rstrip(b"\0").decode("utf-8", "backslashreplace")
        at += max(_ATTRIBUTE.size, -(-size // 4) * 4)
    return "?"
