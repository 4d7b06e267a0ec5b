"""A listening port that several sockets share (SO_REUSEPORT), and how one of them leaves it without losing a client.

The kernel assigns each client to one listener of the group when its SYN comes (net/core/sock_reuseport.c), and close(2) of a
listener resets the clients assigned to it. So the leaving one first directs later SYNs to another: a classic BPF program of the
group (SO_ATTACH_REUSEPORT_CBPF, socket(7)) returns the index of a member. That needs no right.
"""

from __future__ import annotations

import itertools
import os
import socket
import struct
from array import array
from typing import Dict, FrozenSet, Iterator, List, NamedTuple, Set

from _tsproxy.linux import netlink

# include/uapi/asm-generic/socket.h
_SO_ATTACH_REUSEPORT_CBPF = 51
_SO_DETACH_REUSEPORT_BPF = 68  # from Linux 5.3 on

_RETURN = 0x06  # BPF_RET | BPF_K (include/uapi/linux/bpf_common.h)
_SYN_RECV, _LISTEN = "03", "0A"  # include/net/tcp_states.h, as /proc/net/tcp has them
# include/uapi/linux/netlink.h, sock_diag.h, inet_diag.h
_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY = 4, 20
_DIAG_REQUEST = struct.Struct("=BBBBI")  # struct inet_diag_req_v2: family, protocol, extensions, padding, states
_DIAG_SOCKET_SIZE = 48  # struct inet_diag_sockid, zeroed: any
_PORTS = struct.Struct("!4xHH")  # struct inet_diag_msg: behind family, state, timer and retransmissions our port, the client's
_TABLES: Dict[int, str] = {socket.AF_INET: "tcp", socket.AF_INET6: "tcp6"}


HalfOpen = Dict[int, Set[int]]  # our port -> the ports of clients in SYN_RECV


class Listening(NamedTuple):
    """The listeners of one family: the address of each inode, and the inodes of each address in the order of the table."""

    addresses: Dict[int, str]
    inodes: Dict[str, List[int]]


class Group(NamedTuple):
    """The sockets that listen on one address."""

    members: int
    is_newest: bool  # whether the given listener was the last to join


class Tables:
    """What the kernel's tables say of all listeners, each read once, when it is first needed: reading one walks all of it."""

    def __init__(self) -> None:
        self._listening: Dict[int, Listening] = {}  # by family
        self._half_open: Dict[int, HalfOpen] = {}  # by family

    def group_of(self, listener: socket.socket) -> Group:
        """The group of a listener; 0 members if it is not of this network namespace. OSError if /proc can't be read."""
        family, ours = listener.family, os.fstat(listener.fileno()).st_ino
        if family not in self._listening:
            self._listening[family] = _read_listening(family)
        addresses, inodes = self._listening[family]
        members = inodes[addresses[ours]] if ours in addresses else []
        # inet_hash() puts a new IPv4 listener before the others, a new IPv6 one after them.
        newest = members[:1] if family == socket.AF_INET else members[-1:]
        return Group(len(members), newest == [ours])

    def half_open(self, listener: socket.socket) -> FrozenSet[int]:
        """The ports of the clients in SYN_RECV, with any member of the group. OSError as above.

        By sock_diag(7), which needs no right; without a netlink socket by /proc/net/tcp, which takes a second and more to read
        with 100,000 sockets in TIME_WAIT.
        """
        family = listener.family
        if family not in self._half_open:
            try:
                self._half_open[family] = _ask_half_open(family)
            except OSError:
                self._half_open[family] = _read_half_open(family)
        return frozenset(self._half_open[family].get(listener.getsockname()[1], ()))


def _read_listening(family: int) -> Listening:
    found = Listening({}, {})
    for fields in itertools.takewhile(_listens, _rows(family)):
        address, inode = fields[1], int(fields[9])
        found.addresses[inode] = address
        found.inodes.setdefault(address, []).append(inode)
    return found


def _ask_half_open(family: int) -> HalfOpen:
    request = _DIAG_REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0, 1 << int(_SYN_RECV, 16)) + bytes(_DIAG_SOCKET_SIZE)
    found: HalfOpen = {}
    for body in netlink.dump(_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY, request):
        port, peer = _PORTS.unpack_from(body)
        found.setdefault(port, set()).add(peer)
    return found


def _read_half_open(family: int) -> HalfOpen:
    found: HalfOpen = {}
    for fields in _rows(family, f" {_SYN_RECV} "):
        if fields[3] == _SYN_RECV:
            port, peer = (int(address.rsplit(":", 1)[1], 16) for address in fields[1:3])
            found.setdefault(port, set()).add(peer)
    return found


def detach(listener: socket.socket, index: int) -> None:
    """Assign each later SYN for the group to the member at `index`; to any, if there is none. OSError if it can't be set."""
    program = array("B", struct.pack("=HBBI", _RETURN, 0, 0, index))
    listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_REUSEPORT_CBPF, struct.pack("@HP", 1, program.buffer_info()[0]))


def attach(listener: socket.socket) -> None:
    """Let the kernel choose among all members again: the program that a leaving member has attached stays with the group."""
    try:
        listener.setsockopt(socket.SOL_SOCKET, _SO_DETACH_REUSEPORT_BPF, 0)
    except OSError:
        pass  # nothing was set (ENOENT), or the kernel is older


def _listens(fields: List[str]) -> bool:
    return fields[3] == _LISTEN


def _rows(family: int, having: str = "") -> Iterator[List[str]]:
    """The fields of each line of /proc/net/tcp (proc(5)) that contains this text; listeners come first."""
    with open(f"/proc/net/{_TABLES[family]}", encoding="utf-8") as table:
        for line in itertools.islice(table, 1, None):
            if having in line:
                yield line.split()
