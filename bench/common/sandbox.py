"""A private network namespace for the whole benchmark, so that tsproxy's default policy holds and nobody is disturbed.

There net.ipv4.tcp_timestamps is 0. Needs root or unprivileged user namespaces; no tool besides Python.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
from pathlib import Path

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000  # include/uapi/linux/sched.h
_SIOCGIFFLAGS, _SIOCSIFFLAGS = 0x8913, 0x8914  # include/uapi/linux/sockios.h
_IFF_UP = 1
_IFREQ = struct.Struct("16sh22x")
_SYSCTLS = Path("/proc/sys/net")
TIMESTAMPS = _SYSCTLS / "ipv4/tcp_timestamps"
_ROOM = {
    "ipv4/ip_local_port_range": "10000 65000",
    "ipv4/tcp_max_tw_buckets": "64",  # else each relay pays for the TIME_WAIT sockets of the one before
    "core/somaxconn": "4096",
}


def enter() -> bool:
    """Move this process, and what it will start, into a namespace of its own; False, with nothing changed, if it can't."""
    kinds = [_CLONE_NEWNET] if os.geteuid() == 0 else []
    for flags in [*kinds, _CLONE_NEWUSER | _CLONE_NEWNET]:
        if _works(flags):
            _enter(flags)
            return True
    return False


def timestamps_are_off() -> bool:
    """Whether tsproxy's default policy, strip, can be had here."""
    try:
        return int(TIMESTAMPS.read_text()) == 0
    except (OSError, ValueError):
        return False


def _works(flags: int) -> bool:
    """Try it in a child: a namespace entered half-way can't be left."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            _enter(flags)
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1] == 0


def _enter(flags: int) -> None:
    user, group = os.geteuid(), os.getegid()
    _unshare(flags)
    if flags & _CLONE_NEWUSER:
        # Mapped to itself, not to root: the peers would try to drop root, and could not.
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    _raise_loopback()
    TIMESTAMPS.write_text("0")
    for name, value in _ROOM.items():
        with contextlib.suppress(OSError):  # an old kernel keeps some of them for the first namespace
            (_SYSCTLS / name).write_text(value)


def _unshare(flags: int) -> None:
    """unshare(2); Python has it from 3.12 on."""
    if hasattr(os, "unshare"):
        os.unshare(flags)
        return
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(flags):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _raise_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        _, flags = _IFREQ.unpack(fcntl.ioctl(sock, _SIOCGIFFLAGS, _IFREQ.pack(b"lo", 0)))
        fcntl.ioctl(sock, _SIOCSIFFLAGS, _IFREQ.pack(b"lo", flags | _IFF_UP))
