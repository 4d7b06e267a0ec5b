"""One netlink dump: a request to the kernel with many answers (netlink(7), NLM_F_DUMP). Knows nothing of their content."""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import Iterator, Tuple

# include/uapi/linux/netlink.h
_NLM_F_REQUEST_DUMP = 0x301
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_HEAD = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence number, port
_TIMEOUT_S = 1.0


def dump(protocol: int, kind: int, body: bytes) -> Iterator[bytes]:
    """The body of each answer. OSError as the kernel reports it, or if no answer comes for a second."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol) as kernel:
        kernel.settimeout(_TIMEOUT_S)
        kernel.sendto(_HEAD.pack(_HEAD.size + len(body), kind, _NLM_F_REQUEST_DUMP, 1, 0) + body, (0, 0))
        yield from _answers(kernel)


def _answers(kernel: socket.socket) -> Iterator[bytes]:
    while True:
        for kind, body in _messages(kernel.recv(65536)):
            if kind == _NLMSG_DONE:
                return
            if kind == _NLMSG_ERROR:
                number = -struct.unpack_from("=i", body)[0] or errno.EPROTO
                raise OSError(number, os.strerror(number))
            yield body


def _messages(data: bytes) -> Iterator[Tuple[int, bytes]]:
    at = 0
    while at + _HEAD.size <= len(data):
        size, kind, *_ = _HEAD.unpack_from(data, at)
        yield kind, data[at + _HEAD.size : at + size]
        at += max(_HEAD.size, -(-size // 4) * 4)
