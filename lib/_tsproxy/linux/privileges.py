"""Drops root for good, and verifies it: neither this process nor one that it starts can get it back.

Call all of it while there is one thread: these attributes are per thread (credentials(7), capabilities(7)), and threads and
processes that are started later inherit them.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import struct
from typing import Dict, Iterator

from _tsproxy.linux import libc

# include/uapi/linux/prctl.h
_PR_SET_DUMPABLE = 4
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
# include/uapi/linux/capability.h: version 3 has two triples of 32-bit sets: effective, permitted, inheritable
_CAPABILITY_VERSION_3 = 0x20080522
_NO_CAPABILITIES = bytes(24)
_MOST_CAPABILITIES = 64

_STATUS = "/proc/thread-self/status"  # proc_pid_status(5)
_CAPABILITY_SETS = ("CapInh", "CapPrm", "CapEff", "CapAmb")


def account(name: str) -> pwd.struct_passwd:
    """The user's passwd entry. KeyError if there is none."""
    return pwd.getpwnam(name)


@contextlib.contextmanager
def acting_as(uid: int) -> Iterator[None]:
    """Root with the effective and file-system user id of another: sockets made meanwhile are that user's (sock_alloc())."""
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)


def drop(to: pwd.struct_passwd) -> None:
    """Become `to`, who is not root, for good. OSError if not allowed; RuntimeError if any privilege of root is left.

    Sets groups, gid and uid, each real, effective, saved and file-system (setresuid(2)); drops every capability, from the
    bounding set too; sets no_new_privs; and is not dumpable: no core dump, and no ptrace(2) by the same user.
    """
    os.initgroups(to.pw_name, to.pw_gid)
    _empty_bounding_set()
    os.setresgid(to.pw_gid, to.pw_gid, to.pw_gid)
    os.setresuid(to.pw_uid, to.pw_uid, to.pw_uid)
    libc.call("capset", struct.pack("=Ii", _CAPABILITY_VERSION_3, 0), _NO_CAPABILITIES)
    libc.call("prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0)  # the kernel does so, unless fs.suid_dumpable is set
    set_no_new_privs()
    _verify(to)


def set_no_new_privs() -> None:
    """Set no_new_privs: no execve(2) from here on grants a privilege that this process has not (prctl(2))."""
    libc.call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def _empty_bounding_set() -> None:
    """If this process may (CAP_SETPCAP); if not, no_new_privs suffices. EINVAL comes after the last capability."""
    with contextlib.suppress(OSError):
        for capability in range(_MOST_CAPABILITIES):
            libc.call("prctl", _PR_CAPBSET_DROP, capability, 0, 0, 0)


def _verify(to: pwd.struct_passwd) -> None:
    """Read back /proc, then try to become root. RuntimeError names the first privilege that is left."""
    if len(os.listdir("/proc/self/task")) != 1:
        raise RuntimeError("there is another thread, which keeps its own rights")
    status = _status()
    remaining = {name: status[name] for name in _CAPABILITY_SETS if int(status[name], 16)}
    own = {"Uid": [to.pw_uid], "Gid": [to.pw_gid], "Groups": os.getgrouplist(to.pw_name, to.pw_gid)}
    ids = {name: status[name] for name, numbers in own.items() if not set(map(int, status[name].split())) <= set(numbers)}
    if remaining or ids or status["NoNewPrivs"] != "1":
        raise RuntimeError(f"still there: {remaining or ids or 'the way to gain rights by execve()'}")
    if _can_be_root():
        raise RuntimeError("root could be had back after setresuid()")


def _status() -> Dict[str, str]:
    with open(_STATUS, "rb") as file:  # as text it would import a codec, which this user may have no right to read
        lines = file.read().decode("utf-8", "replace").splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _can_be_root() -> bool:
    try:
        os.setuid(0)
    except OSError:
        return False
    return True
