"""A CLOCK_REALTIME that a test sets, for one process and its children."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Dict

from harness import leave_out


class FakeClock:
    """CLOCK_REALTIME of one process and its workers, by libfaketime; CLOCK_MONOTONIC, which no step can move, stays.

    The real clock is not stepped: all of this machine would feel it, and no time namespace has one of its own
    (time_namespaces(7)). What the kernel itself does with it is so not tested; TCP uses the monotonic one.
    """

    def __init__(self, place: Path) -> None:
        """`place` is a directory for it."""
        if not shutil.which("faketime"):
            leave_out("no faketime(1), so a clock that steps is NOT tested here")
        self._file = place / "shift"
        self.step(0)

    def step(self, seconds: int) -> None:
        """So far off the real time from now on."""
        new = self._file.with_suffix(".new")
        new.write_text(f"{seconds:+d}s\n")
        new.rename(self._file)

    @property
    def environment(self) -> Dict[str, str]:
        library = subprocess.run(
            ["faketime", "-f", "+0s", "sh", "-c", "echo $LD_PRELOAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        quiet = {"FAKETIME_NO_CACHE": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1", "FAKETIME_DISABLE_SHM": "1"}
        return {**os.environ, "LD_PRELOAD": library, "FAKETIME_TIMESTAMP_FILE": str(self._file), **quiet}
