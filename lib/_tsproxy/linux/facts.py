"""Facts about this host that need no right to read: kernel, network namespace, interfaces, container, capabilities."""

from __future__ import annotations

import os
import socket
from typing import Dict, List, Optional, Tuple

from _tsproxy.linux import namespaces, timens
from _tsproxy.linux.printable import printable

# include/uapi/linux/capability.h
CAP_NET_ADMIN = 12
CAP_NET_RAW = 13
_CONTAINER_FILES = {"/.dockerenv": "docker", "/run/.containerenv": "podman"}
_OWN_NETNS = "/proc/self/ns/net"


def read_all() -> Dict[str, str]:
    """Name -> text for people, in the order to show."""
    return {
        "kernel": os.uname().release,
        "network_namespace": _namespace(),
        "interfaces": _interfaces(),
        "container": ", ".join(_container()) or "no sign of one",
        "rights": _rights(),
        "clock": _clock(),
    }


def _namespace() -> str:
    """Its inode number, its name from `ip netns`, and whether PID 1 is in it."""
    own = _identity(_OWN_NETNS)
    first = _identity("/proc/1/ns/net")
    name = next((entry for entry in _entries("/run/netns") if own and _identity(f"/run/netns/{entry}") == own), "")
    number = f"net:[{own[1]}]" if own else "unknown: /proc is not readable"
    whose = ", not that of PID 1" if own and first and first != own else ", that of PID 1" if first else ""
    return number + (f', "{printable(name)}"' if name else "") + whose


def _identity(path: str) -> Optional[Tuple[int, int]]:
    try:
        found = os.stat(path)
    except OSError:
        return None  # EACCES: another user's process; ENOENT
    return found.st_dev, found.st_ino


def _entries(path: str) -> List[str]:
    try:
        return sorted(os.listdir(path))
    except OSError:
        return []


def _interfaces() -> str:
    names = sorted((name for _, name in socket.if_nameindex()), key=lambda name: (name != "lo", name))
    up = [name for name in names if _is_up(name)]
    down = [name for name in names if name not in up]
    texts = [f"{_few(group)} {state}" for group, state in ((up, "up"), (down, "down")) if group]
    return "; ".join(texts) or "none"


def _is_up(name: str) -> bool:
    try:
        return namespaces.is_up(name)
    except OSError:
        return False  # ENODEV: it was removed meanwhile


def _few(names: List[str]) -> str:
    return ", ".join(map(printable, names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _container() -> List[str]:
    """Signs of a container. A container can hide all of them."""
    signs = [runtime for path, runtime in _CONTAINER_FILES.items() if os.path.exists(path)]
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        signs.append("kubernetes")
    manager = _first_line("/run/systemd/container")  # https://systemd.io/CONTAINER_INTERFACE
    if manager:
        signs.append(manager)
    if not (_first_line("/proc/self/uid_map") or "0 0 4294967295").split() == ["0", "0", "4294967295"]:
        signs.append("a user namespace")
    return list(dict.fromkeys(signs))


def _rights() -> str:
    held = [name for name, number in (("CAP_NET_ADMIN", CAP_NET_ADMIN), ("CAP_NET_RAW", CAP_NET_RAW)) if has_capability(number)]
    return f"uid {os.geteuid()}, {' and '.join(held) or 'neither CAP_NET_ADMIN nor CAP_NET_RAW'}"


def has_capability(capability: int) -> bool:
    """Whether this process has that capability in effect, in its own user namespace."""
    return bool(_effective() >> capability & 1)


def _effective() -> int:
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            return next(int(line.split()[1], 16) for line in status if line.startswith("CapEff:"))
    except (OSError, StopIteration):
        return 0


def _clock() -> str:
    shift = timens.monotonic_shift_ns()
    return f"a time namespace, CLOCK_MONOTONIC shifted by {shift / 1e9:g} s" if shift else "no time namespace"


def _first_line(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return printable(file.readline().strip())
    except OSError:
        return ""
