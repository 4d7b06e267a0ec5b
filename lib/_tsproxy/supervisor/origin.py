"""Where this program was imported from, so that another interpreter can import it from the same place."""

from __future__ import annotations

import os

import _tsproxy


def find() -> str:
    """The bundle's path, or the directory that holds the package `_tsproxy` (named "lib", or site-packages)."""
    path = os.path.abspath(_tsproxy.__file__ or "")
    return path if is_bundle() else os.path.dirname(os.path.dirname(path))


def is_bundle() -> bool:
    """Whether the modules came out of the single file."""
    return hasattr(_tsproxy.__loader__, "bundled")
