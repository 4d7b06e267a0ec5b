"""Where this program was imported from, so that another interpreter can import it from the same place."""

from __future__ import annotations

import marshal
import os
from typing import Any

import _tsproxy

_LOADER = "_tsproxy.tools.bundle_loader"


def find() -> str:
    """The bundle's path, or the directory that holds the package `_tsproxy` (named "lib", or site-packages)."""
    path = os.path.abspath(_tsproxy.__file__ or "")
    return path if is_bundle() else os.path.dirname(os.path.dirname(path))


def is_bundle() -> bool:
    """Whether the modules came out of the single file."""
    return hasattr(_tsproxy.__loader__, "bundled")


def compiled() -> bytes:
    """Of a bundle, marshalled: the code of its loader, and what the loader has compiled so far. Else empty."""
    loader: Any = _tsproxy.__loader__
    return marshal.dumps((loader.get_code(_LOADER), loader.compiled)) if is_bundle() else b""
