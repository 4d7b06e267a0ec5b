"""Exit codes, and the exception that carries one with its message to main()."""

from __future__ import annotations

DRAINED = 0
FAILED = 1
USAGE = 2
NO_VERDICT = 65  # EX_DATAERR: no verdict is possible on the input
CANNOT_BIND = 69  # EX_UNAVAILABLE of sysexits.h
NOT_YET = 75  # EX_TEMPFAIL: a later start may succeed, so a service manager tries again
POLICY = 78  # EX_CONFIG


class Exit(Exception):
    """End with `code`, after `message` on standard error. `option`: of a route, without dashes, if it is about one."""

    def __init__(self, code: int, message: str, option: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.option = option
