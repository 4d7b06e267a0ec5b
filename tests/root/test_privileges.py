"""Dropping root: user, groups and capabilities are gone for good, and a process that keeps something does not go on."""

from __future__ import annotations

import pytest
from _tsproxy.linux import privileges
from in_child import child
from namespaces import require_root

DROP = """
import os, sys
from _tsproxy.linux import privileges
os.setgroups([0, 4, 27])
privileges.drop(privileges.account("nobody"))
for regain in (lambda: os.setuid(0), lambda: os.seteuid(0), lambda: os.setresuid(0, 0, 0), lambda: os.setgid(0)):
    try:
        regain()
    except PermissionError:
        print("refused")
print(os.getresuid(), os.getresgid(), os.getgroups(), sep="|")
"""


@pytest.mark.root
def test_root_is_dropped_for_good_with_all_its_groups() -> None:
    require_root()
    nobody = privileges.account("nobody")
    uid, gid = nobody.pw_uid, nobody.pw_gid
    said = child([DROP]).splitlines()
    assert said == ["refused"] * 4 + [f"{(uid,) * 3}|{(gid,) * 3}|{[gid]}"]


KEEP = """
import ctypes, os, sys
from _tsproxy.linux import libc, privileges
c = ctypes.CDLL(None)
call, real = libc.call, os.setresuid
def capabilities(version=b"\\x22\\x05\\x08\\x20"):
    data = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; once more for the higher half
    assert c.capget(version + bytes(4), data) == 0
    return data, lambda: c.capset(version + bytes(4), data)
def keep_capabilities():
    assert c.prctl(8, 1, 0, 0, 0) == 0  # PR_SET_KEEPCAPS
    data, store = capabilities()
    data[2] = data[1]
    assert store() == 0
    def keeping(*ids):
        real(*ids)
        data, store = capabilities()
        data[0] = data[1]
        assert store() == 0
    os.setresuid = keeping
def without(*names):
    libc.call = lambda name, *given: None if name in names or given[:1] and given[0] in names else call(name, *given)
exec(sys.argv[1])
try:
    privileges.drop(privileges.account("nobody"))
except RuntimeError as error:
    print(error)
else:
    status = privileges._status()
    print(*(status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs")))
    print(c.prctl(3, 0, 0, 0, 0))  # PR_GET_DUMPABLE
"""


NOTHING = " ".join(["0" * 16] * 5) + " 1\n0\n"


@pytest.mark.root
def test_no_capability_is_left_not_even_one_that_the_process_was_told_to_keep() -> None:
    require_root()
    assert child([KEEP, ""]) == NOTHING
    assert child([KEEP, "keep_capabilities()"]) == NOTHING


@pytest.mark.root
def test_the_memory_is_closed_also_where_the_kernel_leaves_it_open() -> None:
    """As fs.suid_dumpable=1 would, this makes the process dumpable again (PR_SET_DUMPABLE) once it is no more root."""
    require_root()
    assert child([KEEP, "os.setresuid = lambda *ids: (real(*ids), c.prctl(4, 1, 0, 0, 0))"]) == NOTHING


@pytest.mark.root
@pytest.mark.parametrize(
    ("sabotage", "said"),
    [
        ("keep_capabilities(); without('capset')", "still there: {'CapInh': '"),
        ("without(38)", "still there: the way to gain rights by execve()"),  # PR_SET_NO_NEW_PRIVS
        ("os.setresuid = lambda *ids: real(*ids[:2], -1)", "still there: {'Uid': '65534\\t65534\\t0"),
        ("os.initgroups = lambda *user: os.setgroups([0, 4])", "still there: {'Groups': '0 4'"),
        ("os.setresgid = lambda *ids: None", "still there: {'Gid': '0\\t0\\t0\\t0'"),
        ("os.setuid = lambda uid: None", "root could be had back after setresuid()"),
        ("import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()", "there is another thread"),
    ],
)
def test_a_process_with_something_of_root_left_does_not_go_on(sabotage: str, said: str) -> None:
    require_root()
    assert child([KEEP, sabotage]).startswith(said)
