"""Root dropped for good, and shown to be: nothing is left that could bring it back, in this process or what it starts.

All of it while there is one thread: the kernel keeps these things for each thread (credentials(7), capabilities(7)), and
what is started later, thread or process, inherits them.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import struct
from typing import Dict

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
_EMPTY = ("CapInh", "CapPrm", "CapEff", "CapAmb")


def account(name: str) -> pwd.struct_passwd:
    """The user's entry; KeyError if there is none."""
    return pwd.getpwnam(name)


def drop(to: pwd.struct_passwd) -> None:
    """Become `to`, who is not root, for good. OSError if not allowed; RuntimeError if anything of root would be left.

    Groups, group, user, each real, effective, saved and file-system (setresuid(2)); every capability, from the bounding
    set too; no program started from here can gain any; no core dump, and no look into the memory by the same user.
    """
    os.initgroups(to.pw_name, to.pw_gid)
    _empty_bounding_set()
    os.setresgid(to.pw_gid, to.pw_gid, to.pw_gid)
    os.setresuid(to.pw_uid, to.pw_uid, to.pw_uid)
    libc.call("capset", struct.pack("=Ii", _CAPABILITY_VERSION_3, 0), _NO_CAPABILITIES)
    libc.call("prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0)  # the kernel has done so, but where fs.suid_dumpable says otherwise
    gain_no_more()
    _verify(to)


def gain_no_more() -> None:
    """No execve(2) from here on gives rights that this process has not (no_new_privs, prctl(2)). OSError if not allowed."""
    libc.call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def _empty_bounding_set() -> None:
    """As far as this process may (CAP_SETPCAP): no_new_privs holds where it may not. EINVAL is behind the last one."""
    with contextlib.suppress(OSError):
        for capability in range(_MOST_CAPABILITIES):
            libc.call("prctl", _PR_CAPBSET_DROP, capability, 0, 0, 0)


def _verify(to: pwd.struct_passwd) -> None:
    """Read back what the kernel holds, then try to be root. RuntimeError tells the first thing that is not as it should."""
    if len(os.listdir("/proc/self/task")) != 1:
        raise RuntimeError("there is another thread, which keeps its own rights")
    status = _status()
    left = {name: status[name] for name in _EMPTY if int(status[name], 16)}
    own = {"Uid": [to.pw_uid], "Gid": [to.pw_gid], "Groups": os.getgrouplist(to.pw_name, to.pw_gid)}
    ids = {name: status[name] for name, numbers in own.items() if not set(map(int, status[name].split())) <= set(numbers)}
    if left or ids or status["NoNewPrivs"] != "1":
        raise RuntimeError(f"still there: {left or ids or 'the way to gain rights by execve()'}")
    if _can_be_root():
        raise RuntimeError("root could be had back after setresuid()")


def _status() -> Dict[str, str]:
    with open(_STATUS, "rb") as file:  # as text it would want a codec, which this user may have no right to read
        lines = file.read().decode("utf-8", "replace").splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _can_be_root() -> bool:
    try:
        os.setuid(0)
    except OSError:
        return False
    return True
