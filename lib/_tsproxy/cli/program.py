"""The name by which this program was started: what its messages, and the commands in them, call it.

Knows argv[0]. Knows nothing of what is said.
"""

from __future__ import annotations

import os
import re
import sys
from typing import Optional

_PLAIN = re.compile(r"[a-z0-9_][\w.+@-]*", re.ASCII | re.IGNORECASE)


def name(path: Optional[str] = None) -> str:
    """The file name of `path`, or of argv[0]: a word that needs no quotes in a shell; else "tsproxy" (`python -c` has -c)."""
    word = os.path.basename(sys.argv[0] if path is None else path)
    return word if _PLAIN.fullmatch(word) else "tsproxy"


def named(text: str) -> str:
    """A text that calls the program tsproxy.py, as the manual and the templates do, with the name it was started by."""
    return text.replace("tsproxy.py", name())
