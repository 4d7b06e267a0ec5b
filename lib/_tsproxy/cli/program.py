"""The name by which this program was started, for its messages and the commands in them.

Knows argv[0]. Knows nothing of the messages.
"""

from __future__ import annotations

import os
import re
import sys
from typing import Optional

_PLAIN = re.compile(r"[a-z0-9_][\w.+@-]*", re.ASCII | re.IGNORECASE)


def name(path: Optional[str] = None) -> str:
    """The file name of `path`, or of argv[0], if it needs no quotes in a shell; else "tsproxy" (for `python -c` it is -c)."""
    file_name = os.path.basename(sys.argv[0] if path is None else path)
    return file_name if _PLAIN.fullmatch(file_name) else "tsproxy"


def named(text: str) -> str:
    """The text with the program's name in the place of tsproxy.py."""
    return text.replace("tsproxy.py", name())
