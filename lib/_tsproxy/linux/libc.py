"""Calls of the C library that Python does not wrap."""

from __future__ import annotations

import errno
import os
from typing import Any, Union

try:
    import ctypes
except ImportError:  # a Python built without libffi
    ctypes = None  # type: ignore[assignment]


def call(name: str, *arguments: Union[int, bytes]) -> None:
    """One call with integers (as long) and read-only memory. OSError with its errno if it fails, ENOSYS if it is missing."""
    if ctypes is None:
        raise OSError(errno.ENOSYS, "this Python has no ctypes")
    library: Any = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, name):
        raise OSError(errno.ENOSYS, f"this C library has no {name}")
    if getattr(library, name)(*(ctypes.c_long(given) if isinstance(given, int) else given for given in arguments)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
