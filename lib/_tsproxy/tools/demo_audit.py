"""What `demo` has captured of both legs of a connection, by packet sockets, and what `audit` says of it.

It is a connection of its own, the first one: capturing would slow down the orders that are timed.
Knows taps and verdicts. Knows nothing of namespaces: a tap belongs to the one that it is opened in.
"""

from __future__ import annotations

import os
import socket
from typing import Any, Dict, Iterator, List

from _tsproxy.capture import filters
from _tsproxy.capture.records import Frame
from _tsproxy.capture.tap import Tap
from _tsproxy.linux import namespaces
from _tsproxy.tools.audit.flows import Flows
from _tsproxy.tools.audit.report import Report, report
from _tsproxy.tools.audit.scope import Scope

_PROGRAM = "tsproxy.py audit --interface=lo"


class LegWatch:
    """A tap for each leg, from add() on. `why` says why there is none, "" if all is well."""

    def __init__(self) -> None:
        self._taps: List[Tap] = []
        self._frames: List[List[Frame]] = []
        self.why = ""

    def add(self, port: int) -> None:
        """Watch what is sent to that port on loopback in the namespace that this thread is in."""
        try:
            self._taps.append(Tap(filters.tcp_to([port]), namespaces.loopback()))
            self._frames.append([])
        except OSError as problem:
            self.why = f"a packet socket can't be had by uid {os.geteuid()} here ({problem.strerror}); as root: {_PROGRAM}"

    def take(self) -> None:
        """What came since the last time. To be called often: a tap's queue is short where nobody may enlarge it."""
        for tap, frames in zip(self._taps, self._frames):
            frames.extend(_frames(tap))

    def facts(self) -> Dict[str, Any]:
        """For each leg in the order of add(): the verdict, how many segments it rests on, the clock; or why not."""
        if self.why:
            return {"why": self.why}
        self.take()
        return {"why": "", "legs": [_leg(tap, frames) for tap, frames in zip(self._taps, self._frames)]}

    def close(self) -> None:
        """Stop watching, if that was not done before."""
        while self._taps:
            self._taps.pop().close()


def _frames(tap: Tap) -> Iterator[Frame]:
    """Those that were received: loopback shows each packet when it is sent, too."""
    while True:
        packet = tap.receive()
        if packet is None:
            return
        if packet.kind != socket.PACKET_OUTGOING:
            yield packet.time_ns, packet.link, packet.data, packet.length


def _leg(tap: Tap, frames: List[Frame]) -> Dict[str, Any]:
    flows = Flows(lambda _: True)
    flows.read(iter(frames), "")
    found: Report = report(flows, Scope(), 1, tap.drops(), [])
    clocks = [clock for clock in (what.clock for what in found.clocks.values()) if clock and clock.name]
    return {
        "verdict": found.verdict,
        "segments": sum(flow.segments for flow in found.judged),
        "stamped": sum(flow.segments_with_timestamps for flow in found.judged),
        "clock": clocks[0].name if clocks else None,
    }
