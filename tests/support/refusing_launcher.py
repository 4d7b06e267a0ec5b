"""Run by a test: system calls that are refused, as gVisor, a seccomp profile or an older kernel does; the others are not.

    refusing_launcher.py CALL[:ARGUMENT=VALUE...]:ERRNO... -- COMMAND...

E.g. `splice:EINVAL`, or `setsockopt:1=6:2=44:ENOPROTOOPT` for that level and option, or `splice:4!=1:EINVAL` for every
length but one. libseccomp(3) makes the filter.
"""

import ctypes
import errno
import os
import re
import sys

ALLOW, ERRNO = 0x7FFF0000, 0x00050000  # include/uapi/linux/seccomp.h
OPERATORS = {"!=": 1, "=": 4}  # SCMP_CMP_NE, SCMP_CMP_EQ


class Comparison(ctypes.Structure):
    """struct scmp_arg_cmp."""

    _fields_ = [("number", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64)]


def refuse(library, context, rule):
    call, *arguments, code = rule.split(":")
    parts = [re.fullmatch(r"(\d)(!?=)(\d+)", argument).groups() for argument in arguments]
    pairs = [Comparison(int(number), OPERATORS[sign], int(value), 0) for number, sign, value in parts]
    wanted = (Comparison * len(pairs))(*pairs)
    number = library.seccomp_syscall_resolve_name(call.encode())
    assert number >= 0, call
    action = ctypes.c_uint32(ERRNO | getattr(errno, code))
    assert library.seccomp_rule_add_array(context, action, number, len(pairs), wanted) == 0, rule


rules, command = sys.argv[1 : sys.argv.index("--")], sys.argv[sys.argv.index("--") + 1 :]
library = ctypes.CDLL("libseccomp.so.2")
library.seccomp_init.restype = ctypes.c_void_p
context = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(ALLOW)))
for rule in rules:
    refuse(library, context, rule)
assert library.seccomp_load(context) == 0
os.execvp(command[0], command)
