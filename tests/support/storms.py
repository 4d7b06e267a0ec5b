"""The exchange and the clients of storm.py, each a process of its own."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from typing import Any, Dict, Iterator, Sequence, Tuple

from harness import SUPPORT

STORM = [sys.executable, str(SUPPORT / "storm.py")]


@contextlib.contextmanager
def far_end(host: str = "127.0.0.1", enter: Sequence[str] = ()) -> Iterator[str]:
    """An exchange in a process of its own: the target to give to a proxy."""
    with subprocess.Popen([*enter, *STORM, "exchange", host], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            yield f"{host}:{process.stdout.readline().strip()}"
        finally:
            process.kill()


class Storm:
    """Clients in a process of their own, from the start to `end`."""

    def __init__(self, address: Tuple[str, int], enter: Sequence[str] = ()) -> None:
        words = [*enter, *STORM, "clients", address[0], str(address[1])]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def end(self) -> Dict[str, Any]:
        """What they have seen."""
        return json.loads(self.process.communicate("", 60)[0])

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
