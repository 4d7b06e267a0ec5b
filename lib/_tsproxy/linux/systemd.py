"""systemd's protocols for a service: inherited listeners (sd_listen_fds(3)) and state messages (sd_notify(3)).

Without the environment variables of systemd all of it does nothing.
"""

from __future__ import annotations

import os
import re
import socket
import stat
from typing import Dict, List, Mapping, NamedTuple, Optional

from _tsproxy.linux import uapi
from _tsproxy.linux.needs import needing

_FIRST_FD = 3
MOST_FDS = 1024


class BadHandover(ValueError):
    """LISTEN_FDS and its relatives are not valid; the text says what was given and what is allowed."""


class Inherited(NamedTuple):
    """An inherited listening socket, and its name (LISTEN_FDNAMES) or ""."""

    fd: int
    name: str


def inherited(environment: Mapping[str, str], pid: int) -> List[Inherited]:
    """The inherited descriptors; [] if they are not for this process (LISTEN_PID). BadHandover if LISTEN_FDS is not valid."""
    if "LISTEN_FDS" not in environment or environment.get("LISTEN_PID") != str(pid):
        return []
    count, names = _number(environment["LISTEN_FDS"]), environment.get("LISTEN_FDNAMES", "").split(":")
    if not 1 <= count <= MOST_FDS:
        raise BadHandover(f"LISTEN_FDS: given {environment['LISTEN_FDS']!r}; allowed: a number from 1 to {MOST_FDS}")
    return [Inherited(_FIRST_FD + number, names[number] if number < len(names) else "") for number in range(count)]


def inherited_fds(environment: Mapping[str, str], pid: int) -> List[int]:
    """The numbers of the inherited descriptors; [] if LISTEN_FDS is not valid."""
    try:
        return [handed.fd for handed in inherited(environment, pid)]
    except BadHandover:
        return []


def listener_from(handed: Inherited) -> socket.socket:
    """The listener as a non-blocking, close-on-exec socket. BadHandover if it is not a listening TCP socket."""
    try:
        if not stat.S_ISSOCK(os.fstat(handed.fd).st_mode):
            raise BadHandover(f"LISTEN_FDS: descriptor {handed.fd} is no socket; allowed: a listening TCP socket")
        sock = socket.socket(fileno=handed.fd)
        listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise BadHandover(f"LISTEN_FDS: descriptor {handed.fd}: {error.strerror}; allowed: a listening TCP socket") from None
    if not listening or sock.type != socket.SOCK_STREAM or sock.family not in (socket.AF_INET, socket.AF_INET6):
        raise BadHandover(f"LISTEN_FDS: descriptor {handed.fd} does not listen for TCP; allowed: a listening TCP socket")
    if sock.proto == uapi.IPPROTO_MPTCP:
        allowed = "a listening TCP socket (systemd: no SocketProtocol=mptcp; Go: ListenConfig.SetMultipathTCP(false))"
        raise BadHandover(f"LISTEN_FDS: descriptor {handed.fd} listens for MPTCP; allowed: {allowed}")
    sock.setblocking(False)
    sock.set_inheritable(False)
    return sock


class Notifier:
    """Sends state messages to the service manager; does nothing if NOTIFY_SOCKET is not set. Never blocks."""

    def __init__(self, environment: Mapping[str, str], pid: int) -> None:
        path = environment.get("NOTIFY_SOCKET", "")
        self._address = "\0" + path[1:] if path.startswith("@") else path
        self._socket: Optional[socket.socket] = None
        if path.startswith(("/", "@")):
            with needing("socket(2)", "to tell the service manager (NOTIFY_SOCKET)"):
                self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.watchdog_s = _watchdog_s(environment, pid) if self._socket else 0.0

    @property
    def has_manager(self) -> bool:
        """Whether there is a service manager to notify."""
        return self._socket is not None

    def extend(self, by_s: float, **state: object) -> None:
        """Extend the unit's limit for a start or a stop to so long from now (EXTEND_TIMEOUT_USEC, sd_notify(3))."""
        self.notify(**state, EXTEND_TIMEOUT_USEC=round(by_s * 1e6))

    def notify(self, **state: object) -> None:
        """Send one message, e.g. READY=1 and STATUS="relaying". If sendto(2) fails the message is lost."""
        if self._socket is None:
            return
        text = "\n".join(f"{name}={' '.join(str(value).splitlines())}" for name, value in state.items())
        try:
            self._socket.sendto(text.encode("utf-8", "backslashreplace"), self._address)
        except OSError:
            pass  # ECONNREFUSED: no manager; EAGAIN: its queue is full

    def close(self) -> None:
        """Close the socket, if there is one."""
        if self._socket is not None:
            self._socket.close()


def _watchdog_s(environment: Mapping[str, str], pid: int) -> float:
    """How long the manager waits for WATCHDOG=1 (sd_watchdog_enabled(3)), an hour at most; 0 if there is no watchdog."""
    if environment.get("WATCHDOG_PID", str(pid)) != str(pid):
        return 0.0
    return min(_number(environment.get("WATCHDOG_USEC", "")), 3_600_000_000) / 1e6


def _number(text: str) -> int:
    """The whole number in a variable; 0 if it is none, or too long for any of these variables."""
    return int(text) if re.fullmatch(r"[0-9]{1,20}", text, re.ASCII) else 0


def without_handover(environment: Mapping[str, str]) -> Dict[str, str]:
    """The environment for child processes: descriptors, notifications and watchdog are for this process alone."""
    ours = ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
    return {name: value for name, value in environment.items() if name not in ours}
