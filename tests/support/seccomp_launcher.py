"""Run by a test: takes a seccomp filter upon itself that kills for each system call but those named, then goes on.

    seccomp_launcher.py refuse CALL ERRNO COMMAND...   the other way round: that one call fails with that number
    seccomp_launcher.py CALLS exec COMMAND...      at once, for whatever COMMAND does from execve(2) on
    seccomp_launcher.py CALLS FD SCRIPT OPTIONS... SCRIPT runs in this process; all its threads get the filter when FD ends
                                                   (it becomes standard input, since the script closes what it inherits)

CALLS is a file of names. libseccomp(3) turns them into numbers, and those into the program (seccomp(2)).
"""

import ctypes
import os
import runpy
import sys
import threading

KILL_PROCESS, ALLOW, ERROR_NO_SUCH_CALL = 0x80000000, 0x7FFF0000, -1  # include/uapi/linux/seccomp.h, seccomp.h
ERRNO = 0x00050000  # and the number below it
THREAD_SYNC = 4  # SCMP_FLTATR_CTL_TSYNC


def load(names, every_thread, default=KILL_PROCESS, action=ALLOW):
    library = ctypes.CDLL("libseccomp.so.2")
    library.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(default)))
    for name in names:
        number = library.seccomp_syscall_resolve_name(name.encode())
        assert number != ERROR_NO_SUCH_CALL, name
        if number >= 0:  # below: a call that this architecture does not have
            assert library.seccomp_rule_add(context, ctypes.c_uint32(action), number, 0) == 0, name
    if every_thread:
        assert library.seccomp_attr_set(context, THREAD_SYNC, 1) == 0
    assert library.seccomp_load(context) == 0


def load_when_ended(names):
    os.read(0, 1)
    load(names, True)
    os.write(2, b"confined\n")


if sys.argv[1] == "refuse":
    load([sys.argv[2]], False, ALLOW, ERRNO | int(sys.argv[3]))
    os.execv(sys.argv[4], sys.argv[4:])
calls = open(sys.argv[1]).read().split()
if sys.argv[2] == "exec":
    load(calls, False)
    os.execv(sys.argv[3], sys.argv[3:])
os.dup2(int(sys.argv[2]), 0)
threading.Thread(target=load_when_ended, args=(calls,), daemon=True).start()
sys.argv = sys.argv[3:]
runpy.run_path(sys.argv[0], run_name="__main__")
