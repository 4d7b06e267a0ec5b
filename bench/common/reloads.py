"""A file of routes that changes each second under traffic: some routes change, one comes, one goes, most stay as they are."""

from __future__ import annotations

import os
import signal
import time
from datetime import datetime
from pathlib import Path
from typing import Any, Dict, List

from common.lines import Lines
from common.load import percentile

_MOST_CONNECTIONS = 200  # of a route: more than there are clients, and few enough descriptors for many routes
_CHANGING = 3  # every third route


class Reloads:
    """The file, and what each reload took: from the signal to the time in the `reload` line."""

    def __init__(self, file: Path, routes: int, target: int, log: Lines) -> None:
        self.file, self._log, self._turn = file, log, 0
        self._target = target
        self._names = [f"route-{number}" for number in range(routes)]
        self._took_us: List[int] = []
        self._write()

    @property
    def unchanged(self) -> List[str]:
        """The names of those that no reload is about."""
        return [name for number, name in enumerate(self._names) if number % _CHANGING]

    def ports(self, names: List[str]) -> List[int]:
        """Where these listen, by their `route` lines: a changed route keeps its port."""
        return [int(self._log.routes[name]["listen_port"]) for name in names]

    @property
    def all_ports(self) -> List[int]:
        """Of all routes that stay."""
        return self.ports(self._names)

    def again(self, pid: int) -> None:
        """One more change; waits until it is in effect."""
        self._turn += 1
        self._write()
        self._signal(pid)

    def restore(self, pid: int) -> None:
        """What the file has said at the start."""
        if self._turn:
            self._turn = 0
            self._write()
            self._signal(pid)

    def figures(self) -> Dict[str, Any]:
        """How many there were, and how long they took."""
        took = sorted(self._took_us)
        return {
            "reloads": len(took),
            "reload_us_p50": percentile(took, 0.5) if took else None,
            "reload_us_max": took[-1] if took else None,
        }

    def _signal(self, pid: int) -> None:
        before, began = self._log.seen["reload"], time.time()
        os.kill(pid, signal.SIGHUP)
        if self._log.wait(lambda: self._log.seen["reload"] > before, "reload line"):
            told = datetime.fromisoformat(self._log.last["reload"]["timestamp"].replace("Z", "+00:00"))
            self._took_us.append(round((told.timestamp() - began) * 1e6))

    def _write(self) -> None:
        new = self.file.with_suffix(".new")
        names = [*self._names, *([f"extra-{self._turn}"] if self._turn else [])]
        new.write_text("".join(self._section(number, name) for number, name in enumerate(names)))
        new.replace(self.file)

    def _section(self, number: int, name: str) -> str:
        keys: Dict[str, object] = {"target": f"127.0.0.1:{self._target}", "port": 0, "max-connections": _MOST_CONNECTIONS}
        if self._turn and number % _CHANGING == 0:
            keys["idle-timeout"] = 1000 + self._turn
        return f"[{name}]\n" + "".join(f"{key} = {value}\n" for key, value in keys.items()) + "\n"
