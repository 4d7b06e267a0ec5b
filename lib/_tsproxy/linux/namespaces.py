"""Network namespaces: unshare(2), without root where user namespaces are allowed; the state of their interfaces.

Python has os.unshare() from 3.12 on only, so this calls the C library. unshare(2) moves only the calling thread: call it while
there is one thread. Sockets made before stay in the namespace that they were made in.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import struct

from _tsproxy.linux import libc

# include/uapi/linux/sched.h
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNET = 0x40000000
# include/uapi/linux/prctl.h
_PR_SET_PDEATHSIG = 1
# include/uapi/linux/sockios.h, include/uapi/linux/if.h
_SIOCGIFNAME = 0x8910
_SIOCGIFFLAGS = 0x8913
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 1
_IFREQ = struct.Struct("16sh22x")  # struct ifreq with ifr_flags in its union
_IFREQ_INDEX = struct.Struct("16si20x")  # with ifr_ifindex
_LO = b"lo"
_LO_INDEX = 1  # loopback_net_init() in drivers/net/loopback.c: the first interface of each network namespace


def new_network_namespace() -> None:
    """Move into a new network namespace; without the right to make one (EPERM) into a new user namespace with it.

    The user keeps its uid in the new user namespace, so a program started from here has no rights there either.
    OSError if the host does not allow it.
    """
    try:
        unshare_network()
    except PermissionError:
        _unshare_with_user_namespace()


def unshare_network() -> None:
    """unshare(CLONE_NEWNET). OSError if not allowed."""
    libc.call("unshare", _CLONE_NEWNET)


def _unshare_with_user_namespace() -> None:
    uid, gid = os.geteuid(), os.getegid()
    libc.call("unshare", _CLONE_NEWUSER | _CLONE_NEWNET)
    # Without this the kernel refuses gid_map of an unprivileged process (user_namespaces(7)).
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"{uid} {uid} 1")
    _write("/proc/self/gid_map", f"{gid} {gid} 1")


def set_loopback_up() -> None:
    """Set `lo` up: in a new namespace it is down. OSError if not allowed."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, _IFREQ.pack(_LO, _flags(any_socket, _LO) | _IFF_UP))


def is_up(interface: str) -> bool:
    """Whether the interface is up. OSError if there is none of that name."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        return bool(_flags(any_socket, os.fsencode(interface)) & _IFF_UP)


def loopback() -> str:
    """The name of the loopback interface, which may be renamed. OSError as socket(2) or ioctl(2) gives it.

    Not by if_indextoname(3): glibc's says ENOENT where its socket(2) said EMFILE.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        answer = fcntl.ioctl(any_socket, _SIOCGIFNAME, _IFREQ_INDEX.pack(b"", _LO_INDEX))
    return os.fsdecode(_IFREQ_INDEX.unpack(answer)[0].rstrip(b"\0"))


def has_ipv6() -> bool:
    """Whether any interface has an IPv6 address (/proc/net/if_inet6, proc(5)); True if that can't be read."""
    try:
        with open("/proc/thread-self/net/if_inet6", encoding="ascii") as addresses:
            return bool(addresses.read(1))
    except FileNotFoundError:
        return False  # the kernel has no IPv6
    except OSError:
        return True


def is_ipv6_off(interface: str) -> bool:
    """Whether IPv6 is disabled on the interface (net.ipv6.conf.NAME.disable_ipv6); False if that can't be read."""
    try:
        with open(f"/proc/sys/net/ipv6/conf/{interface}/disable_ipv6", encoding="ascii") as value:
            return value.read().strip() == "1"
    except OSError:
        return False


def _flags(sock: socket.socket, interface: bytes) -> int:
    answer = fcntl.ioctl(sock, _SIOCGIFFLAGS, _IFREQ.pack(interface, 0))
    return int(_IFREQ.unpack(answer)[1])


def set_parent_death_signal(number: signal.Signals) -> None:
    """Have the kernel send this process that signal when its parent exits, for whatever reason (PR_SET_PDEATHSIG)."""
    libc.call("prctl", _PR_SET_PDEATHSIG, int(number), 0, 0, 0)


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
