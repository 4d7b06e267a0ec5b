"""`top [FILE]`: the JSON lines of standard input or of a file as a live screen, or as plain lines where there is none.

Knows what a source, a screen and a picture are for, and brings them together; one thread, one loop.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from contextlib import closing
from typing import Dict, List, Optional, Union

from _tsproxy.cli import exits
from _tsproxy.cli.exits import Exit
from _tsproxy.tools import terminal
from _tsproxy.tools.top import picture, plain, source
from _tsproxy.tools.top.model import Model
from _tsproxy.tools.top.picture import View
from _tsproxy.tools.top.screen import Screen, Signals, open_keys
from _tsproxy.tools.top.source import Follower, Stream

Source = Union[Stream, Follower]
_FRAME_S = 0.25  # no more pictures than an eye can follow, or a slow line can carry
_FIRST_S = 0.1  # time for what is there already, before the first one
_TICK_S = 1.0  # "3 s ago" goes on by itself
_START_S = 2.0  # within which a tsproxy that feeds us has said `start`, or why not


def run(path: Optional[str]) -> int:
    """Watch until `q`, a signal or, without a screen, the end of the lines. Exit 2 if FILE can't be read.

    1 if a screen was wanted and standard input ended before its first line.
    """
    lines = source.from_(path)
    with closing(lines):
        if os.isatty(1) and os.environ.get("TERM") not in (None, "", "dumb"):
            return _Watch(lines, path or "standard input").run()
        return _print(lines)


def _print(lines: Source) -> int:
    """One readable line for each line, up to the end; a file is followed for ever."""
    model, style = Model(), terminal.style_of(sys.stdout)
    while not lines.ended:
        _wait([lines.waits_for], lines.patience_s)
        said = [plain.sentence(model.feed(line), model) for line in lines.read()]
        if said:
            print("\n".join(map(style.fit, said)), flush=True)
    return exits.DRAINED


def _wait(fds: List[Optional[int]], patience_s: Optional[float]) -> List[int]:
    """The descriptors with something to read; none if nothing came in that time."""
    poller = select.poll()
    for fd in fds:
        if fd is not None:
            poller.register(fd, select.POLLIN)
    return [fd for fd, _ in poller.poll(None if patience_s is None else 1000 * patience_s)]


class _Watch:
    """The screen while it is watched."""

    def __init__(self, lines: Source, name: str) -> None:
        self._lines, self._name = lines, name
        self._model, self._style = Model(), terminal.style_of(sys.stdout)
        self._keys = open_keys()
        self._screen = Screen(1, self._keys)
        self._pid: Optional[int] = None
        self._page = 0
        self._ended_by = 0  # a signal, or 0
        self._next_frame = time.monotonic() + _FIRST_S
        self._is_done = False

    def run(self) -> int:
        """Until told to end. The terminal is given back before anything else happens."""
        try:
            self._await_start()
            if not self._is_done:
                self._watch()
        finally:
            if self._keys is not None:
                os.close(self._keys)
        return self._end()

    def _await_start(self) -> None:
        """Leave the terminal as it is while a tsproxy that does not start may say there why not."""
        if self._lines.waits_for is not None and _wait([self._lines.waits_for], _START_S):
            self._read()

    def _watch(self) -> None:
        signals = Signals()
        try:
            self._screen.take()
            while not self._is_done:
                self._turn(signals)
        finally:
            self._screen.give_back()
            signals.close()

    def _end(self) -> int:
        if self._ended_by:
            os.kill(os.getpid(), self._ended_by)  # its usual action is back: who waits for us sees the signal
        if self._has_nothing:
            raise Exit(exits.FAILED, f"{self._name}: ended before its first line")
        return exits.DRAINED

    @property
    def _has_nothing(self) -> bool:
        return self._lines.ended and not (self._model.last_at or self._model.unread)

    def _turn(self, signals: Signals) -> None:
        """Wait for something, take it, and show it if a picture is due."""
        if time.monotonic() >= self._next_frame:
            self._show()
        ready = _wait([signals.fd, self._keys, self._lines.waits_for], self._patience_s())
        if signals.fd in ready:
            for number in signals.take():
                self._on_signal(number, signals)
        if self._keys in ready:
            self._on_keys(self._screen.pressed())
        if self._lines.waits_for is None or self._lines.waits_for in ready:
            self._read()

    def _patience_s(self) -> float:
        until_frame = max(0.0, self._next_frame - time.monotonic())
        look = self._lines.patience_s
        return until_frame if look is None else min(look, until_frame)

    def _read(self) -> None:
        before = self._lines.note, self._lines.ended
        lines = self._lines.read()
        for line in lines:
            self._model.feed(line)
        if self._lines.gap:
            self._model.skipped()
        if lines or before != (self._lines.note, self._lines.ended):
            self._hurry(_FRAME_S)
        if self._has_nothing:
            self._is_done = True
        elif self._lines.ended and self._keys is None:
            self._show()
            self._is_done = True  # nobody could press q

    def _hurry(self, within_s: float) -> None:
        self._next_frame = min(self._next_frame, time.monotonic() + within_s)

    def _show(self) -> None:
        self._next_frame = time.monotonic() + _TICK_S
        columns, rows = self._screen.size
        view = View(self._name, self._pid, time.time(), self._lines.ended, self._lines.note, self._page)
        drawn = picture.draw(self._model, view, columns, rows)
        self._screen.paint(["".join(self._style.paint(self._style.fit(text), code) for text, code in row) for row in drawn])

    def _on_signal(self, number: int, signals: Signals) -> None:
        if number == signal.SIGTSTP:
            self._screen.give_back()
            signals.obey(number)  # stopped here until SIGCONT
            self._screen.take()
        elif number == signal.SIGWINCH:
            self._screen.forget()
        elif number != signal.SIGCONT:
            self._ended_by, self._is_done = number, True
        self._hurry(0)

    def _on_keys(self, typed: bytes) -> None:
        for key in typed.lower():
            if key == ord("q"):
                self._is_done = True
            elif key in b"n\t":
                self._pid, self._page = self._next_pid(), 0
            elif key == ord(" "):
                self._page += 1
            elif key == ord("\x0c"):
                self._screen.forget()
            self._hurry(0)

    def _next_pid(self) -> Optional[int]:
        """The process that is shown next: round and round, None being the newest."""
        pids = list(self._model.processes)
        shown = picture.chosen(self._model, View(pid=self._pid))
        if shown is None:
            return None
        following: Dict[int, Optional[int]] = dict(zip(pids, [*pids[1:], pids[0]]))
        return None if following[shown.pid] == pids[-1] else following[shown.pid]
