"""Root dropped for good: groups, then group, then user, real, effective and saved (setresuid(2)), then tried in vain."""

from __future__ import annotations

import os
import pwd


def account(name: str) -> pwd.struct_passwd:
    """The user's entry; KeyError if there is none."""
    return pwd.getpwnam(name)


def drop(to: pwd.struct_passwd) -> None:
    """Become `to` for good. OSError if not allowed; RuntimeError if root could be had back."""
    os.initgroups(to.pw_name, to.pw_gid)
    os.setresgid(to.pw_gid, to.pw_gid, to.pw_gid)
    os.setresuid(to.pw_uid, to.pw_uid, to.pw_uid)
    if to.pw_uid != 0 and _can_be_root():
        raise RuntimeError("root could be had back after setresuid()")


def _can_be_root() -> bool:
    try:
        os.setuid(0)
    except OSError:
        return False
    return True
