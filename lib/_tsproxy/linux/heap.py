"""The heap before fork(2): pages that nobody writes to are shared with each child for good.

Knows malloc_trim(3) and Python's garbage collector. Knows nothing of who forks.
"""

from __future__ import annotations

import contextlib
import gc

from _tsproxy.linux import libc


def prepare_fork() -> None:
    """Give free pages back to the kernel, and exempt all objects that there are now from collection. Switch collection on.

    A collection writes into the header of each object that it looks at, and so would copy nearly every shared page.
    """
    with contextlib.suppress(OSError):  # "OSError" if pages were given back, too; a C library other than glibc has none
        libc.call("malloc_trim", 0)
    gc.freeze()
    gc.enable()
