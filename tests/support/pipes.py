"""Pipes of a process, and bytes pushed through a session so that they may be spliced."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import List

from harness import Exchange, Proxy, receive_exactly, target, wait_until

MIB = 1 << 20


def push_through(proxy: Proxy, exchange: Exchange, mebibytes: int = 8) -> List[int]:
    """Send so much while the reader holds still at first; the pipes of the proxy before, meanwhile and afterwards."""
    client, server = proxy.connect(), exchange.accept()
    counts, data = [pipes_of(proxy)], os.urandom(MIB) * mebibytes
    pushing = threading.Thread(target=client.sendall, args=(data,))
    pushing.start()
    wait_until(lambda: proxy.metrics()["downstream_flow_control_paused_reading_total"], "backpressure")
    counts.append(pipes_of(proxy))
    assert receive_exactly(server, len(data)) == data
    pushing.join()
    for sock in (client, server):
        sock.close()
    line = proxy.line("connection")
    assert (line["rx_bytes"], line["discarded_bytes"]) == (len(data), 0)
    return [*counts, pipes_of(proxy)]


def pipes_of(proxy: Proxy) -> int:
    """Open ends of pipes."""
    return sum(target(fd).startswith("pipe:") for pid in proxy.family() for fd in Path(f"/proc/{pid}/fd").iterdir())
