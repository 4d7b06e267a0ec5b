"""What a long test is doing, said while it does it.

Knows pytest's terminal. Knows nothing of what is said.
"""

from __future__ import annotations

import contextlib
import time

import pytest

_BEGAN = time.monotonic()


class Progress:
    """progress("back after 2.1 s"): one line on the terminal, also where output is captured."""

    def __init__(self, config: pytest.Config) -> None:
        self._terminal = config.pluginmanager.get_plugin("terminalreporter")
        self._capture = config.pluginmanager.get_plugin("capturemanager")

    def __call__(self, what: str) -> None:
        if self._terminal:
            with self._capture.global_and_fixture_disabled() if self._capture else contextlib.nullcontext():
                self._terminal.ensure_newline()
                self._terminal.write_line(f"  {time.monotonic() - _BEGAN:6.1f} s  {what}")
