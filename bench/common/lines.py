"""tsproxy's own JSON lines as they come, and whether their figures hold together."""

from __future__ import annotations

import json
import os
import select
import time
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional

_PIECE = 1 << 20
_SUMMED = ("rx_bytes", "tx_bytes", "upstream_tx_bytes", "discarded_bytes", "unacknowledged_bytes")
_PATIENCE_S = 30.0

Line = Dict[str, Any]


class Lines:
    """Reads a named pipe, which is tsproxy's standard output. Make it before tsproxy is started; it keeps sums, not lines."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        self._rest = b""
        self.last: Dict[str, Line] = {}  # event -> its last line
        self.seen: Counter[str] = Counter()  # events
        self.routes: Dict[str, Line] = {}  # the last `route` line of each
        self.reasons: Counter[str] = Counter()
        self.sums: Counter[str] = Counter()
        self.violations: List[str] = []
        self._of_route: Dict[str, Line] = {}  # the last metrics line of each

    def close(self) -> None:
        """Read no more."""
        os.close(self._fd)

    def take(self, seconds: float) -> None:
        """Read what comes within that time."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if not select.select([self._fd], [], [], left)[0]:
                return
            data = os.read(self._fd, _PIECE)
            if not data:  # nobody has it open for writing
                time.sleep(min(left, 0.05))
            self._rest += data
            *whole, self._rest = self._rest.split(b"\n")
            for line in whole:
                self._note(json.loads(line))

    def wait(self, ready: Callable[[], Any], what: str, patience_s: float = _PATIENCE_S) -> bool:
        """Read until it is so; a violation if it does not come."""
        end = time.monotonic() + patience_s
        while not ready():
            if time.monotonic() > end:
                self.violations.append(f"within {patience_s:g} s there was no {what}")
                return False
            self.take(0.02)
        return True

    def _note(self, line: Line) -> None:
        event = line["event"]
        if event == "metrics" and line["route"] not in (None, "default"):
            self.violations += inconsistent(line, self._of_route.get(line["route"]))
            self._of_route[line["route"]] = line
            return
        self.seen[event] += 1
        if event == "connection":
            self.reasons[line["reason"]] += 1
            self.sums.update({name: line[name] for name in _SUMMED})
        elif event == "route":
            self.routes[line["route"]] = line
        elif event == "metrics":
            self.violations += inconsistent(line, self.last.get(event))
        if event in ("error", "warning", "timestamps_drift") or (event == "reload" and line["level"] == "error"):
            self.violations.append(f"{event} line: {line['message']}")
        self.last[event] = line


def inconsistent(now: Line, before: Optional[Line]) -> Iterator[str]:
    """What can't be, in one metrics line and beside the one before."""
    for name in [name for name in now if name.endswith("_total")]:
        if before and now[name] < before[name]:
            yield f"{name} fell from {before[name]} to {now[name]}"
    for name in ("downstream_cx_active", "upstream_cx_active"):
        if now[name] < 0:
            yield f"{name} is {now[name]}"
    for received, sent in (("downstream_cx_rx", "upstream_cx_tx"), ("upstream_cx_rx", "downstream_cx_tx")):
        if now[f"{sent}_bytes_total"] > now[f"{received}_bytes_total"]:
            yield f"more sent than received: {sent} {now[f'{sent}_bytes_total']}, {received} {now[f'{received}_bytes_total']}"


def balance(lines: Lines, ends: Dict[str, int]) -> Iterator[str]:
    """After all has ended: does everything add up? `ends` is what clients and far end have counted themselves."""
    last = lines.last["metrics"]
    dropped = last["log_lines_dropped_total"]
    accepted, records = last["downstream_cx_total"], lines.seen["connection"]
    received = last["downstream_cx_rx_bytes_total"], last["upstream_cx_rx_bytes_total"]
    sent = last["upstream_cx_tx_bytes_total"], last["downstream_cx_tx_bytes_total"]
    equal = {
        "connections made, and accepted": (ends["connected"], accepted),
        "accepted and not refused, and active or with a line": (accepted, last["downstream_cx_active"] + records + dropped),
        "active connections at the end, and none": (last["downstream_cx_active"] + last["upstream_cx_active"], 0),
        "internal errors, and none": (last["internal_errors_total"], 0),
        "workers that died, and none": (last["worker_restarts_total"], 0),
    }
    if not dropped:
        sums = lines.sums
        equal["rx_bytes of all lines, and received from clients"] = (sums["rx_bytes"], received[0])
        equal["tx_bytes of all lines, and acknowledged by clients"] = (sums["tx_bytes"], sent[1])
        equal["upstream_tx_bytes of all lines, and acknowledged by the far end"] = (sums["upstream_tx_bytes"], sent[0])
        lost = sums["discarded_bytes"] + sums["unacknowledged_bytes"]
        equal["received, and acknowledged or not"] = (sum(received), sum(sent) + lost)
    for what, (one, other) in equal.items():
        if one != other:
            yield f"{what}: {one}, {other}"
    for what, less, more in (
        ("from clients", received[0], ends["client_sent"]),
        ("from the far end", received[1], ends["far_sent"]),
        ("by clients", ends["client_received"], received[1]),  # not sent[1]: an ACK may be lost where its bytes were not
        ("by the far end", ends["far_received"], received[0]),
    ):
        if less > more:
            yield f"more bytes received {what} than sent: {less}, {more}"
