"""tsproxy with two routes, installed on a machine from what `generate systemd --routes` prints.

Knows the units by what it asks systemd. Knows nothing of what a test does with them.
"""

from __future__ import annotations

import contextlib
import json
import socket
from pathlib import Path
from typing import Any, Dict, List, Tuple

from harness import receive_exactly
from machine import EXCHANGE, Machine, steps
from storms import far_end

PROGRAM = "/opt/tsproxy/tsproxy.py"  # whoever installs has one; what is installed is made from it
ROUTES = "/etc/tsproxy/routes.ini"
A, B, C = ("127.0.0.1", 9001), ("127.0.0.2", 9001), ("127.0.0.1", 9003)
HEALED_S = 60


class Service:
    """tsproxy with two routes, as installed on a machine, and the exchange."""

    def __init__(self, machine: Machine, program: Path) -> None:
        self.machine = machine
        self._stack = contextlib.ExitStack()
        self.target = f"{EXCHANGE}:{self._stack.enter_context(far_end(EXCHANGE, machine.exchange.enter)).split(':')[1]}"
        machine.sh(f"mkdir -p {Path(PROGRAM).parent}; : >/etc/resolv.conf")
        machine.write(PROGRAM, program.read_text(), "755")
        sections = "".join(f"[{name}]\nbind = {place[0]}\nport = {place[1]}\n" for name, place in (("oe.a", A), ("oe-b", B)))
        machine.write("/opt/venue.ini", f"[DEFAULT]\ntarget = {self.target}\n{sections}")
        self.before = self.files()
        self.units = machine.run("python3", PROGRAM, "generate", "systemd", "--routes=/opt/venue.ini", "--metrics-interval=0")
        self.do(steps(self.units, "Make"))

    def do(self, commands: str) -> None:
        self.machine.sh(f"PATH={Path(PROGRAM).parent}:$PATH\n{commands}")

    def files(self) -> List[str]:
        find = "find /etc /usr/local /opt /var/lib/private /run/netns/* /run/tsproxy* 2>/dev/null | sort || :"
        return self.machine.sh(find).splitlines()

    def show(self, what: str, unit: str = "tsproxy.service") -> str:
        return self.machine.run("systemctl", "show", "--value", f"--property={what}", unit).strip()

    def lines(self, event: str) -> List[Dict[str, Any]]:
        said = self.machine.run("journalctl", "--no-pager", "-q", "-o", "cat", "-u", "tsproxy", "-t", "tsproxy").splitlines()
        found = [json.loads(line) for line in said if line.startswith("{")]
        return [line for line in found if line["event"] == event]

    def trades(self, *places: Tuple[str, int]) -> bool:
        """Whether a client of each is answered."""
        for place in places:
            with self.machine.host, socket.create_connection(place, 2) as client:
                client.sendall(b"order")
                if receive_exactly(client, 5) != b"order":
                    return False
        return True

    def write_routes(self, text: str) -> None:
        self.machine.write(ROUTES, text)

    def close(self) -> None:
        self._stack.close()
