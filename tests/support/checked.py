"""Where `check` is run, namespaces with rules of our own and an exchange in one; and what it says."""

from __future__ import annotations

import contextlib
from typing import Any, Dict, Iterator

from harness import Exchange
from namespaces import Namespace

STRIP = "meta priority 0:4 reset tcp option timestamp"
OUTPUT = "type filter hook output priority mangle; policy accept;"
NOWHERE = "192.0.2.1:9"  # there is no route: no SYN leaves, and nothing is followed for two seconds


def rules(rule: str) -> str:
    return f"table inet tsproxy {{\n  chain out {{\n    {OUTPUT}\n    {rule}\n  }}\n}}\n"


@contextlib.contextmanager
def far_end(namespace: Namespace, host: str = "127.0.0.1") -> Iterator[Exchange]:
    with namespace:
        exchange = Exchange(host=host)
    try:
        yield exchange
    finally:
        exchange.close()


def shows(found: Dict[str, Any], part: str) -> Dict[str, str]:
    """Name -> what it shows, of the levers and witnesses with that in their name."""
    return {row["name"]: row["shows"] for row in [*found["levers"], *found["witnesses"]] if part in row["name"]}


def was_tried(exchange: Exchange) -> bool:
    """Whether a connection reached the exchange; one that came has been in the backlog since before check ended."""
    exchange.listener.setblocking(False)
    try:
        exchange.listener.accept()[0].close()
    except BlockingIOError:
        return False
    return True
