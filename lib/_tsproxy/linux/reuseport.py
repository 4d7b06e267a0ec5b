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
from typing import Dict, FrozenSet, Iterator, List, NamedTuple

from _tsproxy.linux import netlink

# include/uapi/asm-generic/socket.h
_SO_ATTACH_REUSEPORT_CBPF = 51
_SO_DETACH_REUSEPORT_BPF = 68  # from Linux 5.3 on

_RETURN = 0x06  # BPF_RET | BPF_K (include/uapi/linux/bpf_common.h)
_SYN_RECV, _LISTEN = "03", "0A"  # include/net/tcp_states.h, as /proc/net/tcp has them
# include/uapi/linux/netlink.h, sock_diag.h, inet_diag.h
_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY = 4, 20
_DIAG_REQUEST = struct.Struct("=BBBBI")  # struct inet_diag_req_v2: family, protocol, extensions, padding, states
_PEER_PORT = struct.Struct("!6xH")  # struct inet_diag_msg: behind family, state, timer, retransmissions and our port
_TABLES: Dict[int, str] = {socket.AF_INET: "tcp", socket.AF_INET6: "tcp6"}


class Group(NamedTuple):
    """The sockets that listen on one address."""

    members: int
    is_newest: bool  # whether the given listener was the last to join


def group_of(listener: socket.socket) -> Group:
    """The group of a listener; 0 members if it is not of this network namespace. OSError if /proc can't be read."""
    ours = os.fstat(listener.fileno()).st_ino
    listening = [(fields[1], int(fields[9])) for fields in itertools.takewhile(_listens, _rows(listener.family))]
    address = next((local for local, inode in listening if inode == ours), None)
    members = [inode for local, inode in listening if local == address]
    # inet_hash() puts a new IPv4 listener before the others, a new IPv6 one after them.
    newest = members[:1] if listener.family == socket.AF_INET else members[-1:]
    return Group(len(members), newest == [ours])


def half_open(listener: socket.socket) -> FrozenSet[int]:
    """The ports of the clients in SYN_RECV, with any member of the group. OSError as above.

    By sock_diag(7), which needs no right; without a netlink socket by /proc/net/tcp, which takes a second and more to read
    with 100,000 sockets in TIME_WAIT.
    """
    try:
        return _ask_half_open(listener)
    except OSError:
        return _read_half_open(listener)


def _ask_half_open(listener: socket.socket) -> FrozenSet[int]:
    local = struct.pack("!H46x", listener.getsockname()[1])  # struct inet_diag_sockid: the rest may be anything
    request = _DIAG_REQUEST.pack(listener.family, socket.IPPROTO_TCP, 0, 0, 1 << int(_SYN_RECV, 16)) + local
    answers = netlink.dump(_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY, request)
    return frozenset(_PEER_PORT.unpack_from(body)[0] for body in answers)


def _read_half_open(listener: socket.socket) -> FrozenSet[int]:
    port = f":{listener.getsockname()[1]:04X}"
    rows = _rows(listener.family, f" {_SYN_RECV} ")
    return frozenset(
        int(fields[2].rsplit(":", 1)[1], 16) for fields in rows if fields[3] == _SYN_RECV and fields[1].endswith(port)
    )


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
