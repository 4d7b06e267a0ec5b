"""Frames of an interface as they pass, until a time, Ctrl-C or SIGTERM ends the watch; how it goes, on a terminal.

Knows the tap, the clock and signals. Knows nothing of flows or verdicts.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import time
from types import FrameType
from typing import Any, Callable, Dict, Optional

from _tsproxy.capture import filters
from _tsproxy.capture.records import Frames, Notes
from _tsproxy.capture.tap import Tap
from _tsproxy.cli import exits
from _tsproxy.cli.config import BadValue
from _tsproxy.cli.exits import Exit
from _tsproxy.linux import uapi
from _tsproxy.linux.printable import printable
from _tsproxy.tools import streams

_LOOK_MS = 100  # how soon an end is noticed
_PROGRESS_S = 1.0
_BURST = 1024  # packets between two looks at the clock


class Watch:
    """Of one interface, from its creation on."""

    def __init__(self, interface: str, seconds: Optional[float], progress: Callable[[], str]) -> None:
        """Exit 2 if there is no such interface, 65 without the right to watch it. `progress` is asked for once a second."""
        self._interface, self._progress = interface, progress
        self._is_over = False
        self._handlers = self._take_signals()  # before there is a frame that a signal could cost
        try:
            self._tap = _open(interface)
        except BaseException:
            self._give_signals_back()
            raise
        self._end = None if seconds is None else time.monotonic() + seconds
        self._next = time.monotonic()
        self._speaks = sys.stderr.isatty()

    def frames(self, notes: Notes) -> Frames:
        """Each that may hold TCP, up to the end; then the notes say how many were dropped."""
        poller = select.poll()
        poller.register(self._tap.fileno(), select.POLLIN)
        try:
            while not self._has_ended():
                if poller.poll(_LOOK_MS):
                    yield from self._burst(notes, _BURST)
            self._tap.stop()  # else the queue of a busy interface is never empty
            yield from self._burst(notes, sys.maxsize)
            notes.lost((0, 0), self._tap.drops())
        finally:
            self._give_signals_back()
            self._tap.close()
            self._say("")

    def _burst(self, notes: Notes, most: int) -> Frames:
        """What is queued. No packet's time bounds it: the clock may be set back, and the first have the time of recvmsg(2)."""
        for _ in range(most):
            try:
                packet = self._tap.receive()
            except OSError as problem:
                notes.problem = f"the interface was down, or went away, while it was watched ({problem.strerror})"
                return
            if packet is None:
                return
            # A loopback interface shows each packet twice, when it is sent and when it is received
            if packet.hardware != uapi.ARPHRD_LOOPBACK or packet.kind != socket.PACKET_OUTGOING:
                yield packet.time_ns, packet.link, packet.data, packet.length

    def _has_ended(self) -> bool:
        now = time.monotonic()
        if self._speaks and now >= self._next:
            self._next = now + _PROGRESS_S
            self._say(f"{printable(self._interface)}: {self._progress()}; Ctrl-C for the verdict")
        return self._is_over or (self._end is not None and now >= self._end)

    def _say(self, text: str) -> None:
        if self._speaks:
            streams.write_error(f"\r\x1b[K{text}")

    def _take_signals(self) -> Dict[int, Any]:
        """SIGINT and SIGTERM end the watch, not the program, unless they are ignored (nohup means it)."""
        heard = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not signal.SIG_IGN]
        return {number: signal.signal(number, self._on_signal) for number in heard}

    def _give_signals_back(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: Optional[FrameType]) -> None:
        self._is_over = True


def _open(interface: str) -> Tap:
    try:
        socket.if_nametoindex(interface)
        return Tap(filters.tcp(), interface)
    except PermissionError:
        raise Exit(
            exits.NO_VERDICT,
            f"--interface={printable(interface)}: capturing takes CAP_NET_RAW, which uid {os.geteuid()} does not have here:"
            " run it as root, e.g. with sudo",
        ) from None
    except (OSError, ValueError) as problem:
        known = [printable(name) for _, name in socket.if_nameindex()]
        if interface in known:
            raise Exit(exits.NO_VERDICT, f"--interface={interface}: no packet socket here: {problem}") from None
        raise BadValue("--interface", interface, f"an interface of this host: {', '.join(known)}") from None
