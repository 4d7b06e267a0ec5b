"""Root file systems to run tsproxy in: made once by debootstrap(8), kept in the checkout's ignored `.deploy`, never written to.

Knows how one is made, where it is kept and how that is told. Knows nothing of what runs in it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Callable, List, NamedTuple, NoReturn, Sequence, Set

import pytest
from harness import ROOT
from namespaces import require_root

STORE = ROOT / ".deploy"
# On an overlay that is volatile, fsync(2) does nothing: dpkg makes thousands, and what a crash leaves half made is made anew.
_BOOTSTRAP = """
mount --make-rprivate /
mount -t overlay -o lowerdir="$1/lower",upperdir="$1/upper",workdir="$1/work",volatile overlay "$1/root"
shift
exec debootstrap "$@"
"""
Tell = Callable[[str], None]


class Root(NamedTuple):
    """What is in a root file system."""

    name: str
    suite: str
    packages: Sequence[str]

    @property
    def path(self) -> Path:
        """Another list of packages makes another one."""
        return STORE / f"{self.name}-{hashlib.sha256(repr(self[1:]).encode()).hexdigest()[:8]}"


DEBIAN = Root(
    "bookworm",
    "bookworm",
    "systemd systemd-sysv dbus udev python3 iproute2 nftables iptables tcpdump procps kmod logrotate docker.io".split(),
)

WITH_NEWER_SYSTEMD = Root(
    "trixie",
    "trixie",
    "systemd systemd-sysv dbus udev python3 iproute2 nftables iptables procps kmod".split(),
)

# For kernels under emulation: no systemd, and what the tests themselves need.
EMULATED = Root(
    "trixie",
    "trixie",
    "python3 python3-pytest python3-pytest-timeout python3-hypothesis iproute2 nftables iptables tcpdump procps kmod".split(),
)

# What comes next: its own Python and the one after that.
NEWEST = Root(
    "sid",
    "sid",
    "python3.14 python3.15 python3-pytest python3-pytest-timeout python3-hypothesis iproute2 nftables procps".split(),
)


def machine_refuses(why: str) -> NoReturn:
    """This machine can't do what the test stands on. That is no fault of tsproxy's, so it is said and not judged."""
    pytest.skip(f"LOUD: {why}: what this test holds is NOT tested here")


def require(*tools: str) -> None:
    """Skip, loudly, where a program is missing or nobody may make namespaces."""
    require_root()
    missing = [tool for tool in tools if not shutil.which(tool)]
    if missing:
        machine_refuses(f"no {', '.join(missing)} (.ci/run installs them)")


def made(root: Root, tell: Tell) -> Path:
    """Where that root file system is; the first time it is made, which takes a minute or some, and needs Debian's mirror."""
    require("debootstrap", "unshare")
    STORE.mkdir(exist_ok=True)
    with (STORE / f"{root.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two at a time would both make it
        if not root.path.exists():
            _make(root, tell)
    return root.path


def _make(root: Root, tell: Tell) -> None:
    place = STORE / f"{root.name}.making"
    remove(place)
    for each in ("lower", "upper", "work", "root"):
        (place / each).mkdir(parents=True)
    said = _debootstrap(root, place, tell)
    if said:
        remove(place)
        machine_refuses(f"debootstrap {root.suite} failed: {said}")
    os.rename(place / "upper", root.path)
    remove(place)


def _debootstrap(root: Root, place: Path, tell: Tell) -> str:
    """Why it failed, in its own last words, or nothing."""
    cache = STORE / "debs"
    cache.mkdir(exist_ok=True)
    words = ["--variant=minbase", f"--cache-dir={cache}", f"--include={','.join(root.packages)}", root.suite]
    command = ["unshare", "--mount", "sh", "-euc", _BOOTSTRAP, "sh", str(place), *words, str(place / "root")]
    last: List[str] = []
    told: Set[str] = set()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True
    ) as made:
        assert made.stdout
        for line in made.stdout:
            last = [*last[-4:], line.strip()]
            phase = line.split(" ")[1] if line.startswith("I: ") else ""
            if phase and phase not in told:
                told.add(phase)
                tell(f"debootstrap {root.suite}: {line[3:].strip()}")
    return "; ".join(last) if made.returncode else ""


def scratch(name: str) -> Path:
    """A directory of this process's own to run something in. Those of processes that were killed go."""
    for place in STORE.glob("run-*"):
        if not Path("/proc", place.name.split("-")[1]).exists():
            remove(place)
    return Path(tempfile.mkdtemp(prefix=f"run-{os.getpid()}-{name}-", dir=STORE))


def copy_checkout(place: Path) -> None:
    """The program, its tests and what both import, for a place that has a Python and pytest: `checkout`, `libraries`."""
    for each in ("lib", "tests", "bench"):
        shutil.copytree(ROOT / each, place / "checkout" / each, ignore=shutil.ignore_patterns("__pycache__"))
    for each in ("tsproxy.py", "setup.cfg", "README.md", "SECURITY.md", "LICENSE"):
        shutil.copy(ROOT / each, place / "checkout")
    for name in ("docopt-ng", "pyte", "wcwidth"):
        for file in metadata.files(name) or ():
            if file.suffix != ".pyc" and not str(file).startswith(".."):
                target = place / "libraries" / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(str(file.locate()), target)


def remove(place: Path) -> None:
    """What a mount left in there has gone with its mount namespace."""
    if place.exists():
        shutil.rmtree(place)
