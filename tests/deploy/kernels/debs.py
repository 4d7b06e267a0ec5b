"""Debian's kernels of other releases, unpacked and not installed, by an apt(8) of its own that this host's knows nothing of.

Knows where packages come from and what belongs to a kernel. Knows nothing of how one is run.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Dict, List, NamedTuple

from roots import STORE, Tell, machine_refuses, remove

_SOURCE = "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian {} main\n"
_KERNEL = "linux-image-cloud-amd64"
_PARTS = re.compile(r"^ +Depends: (linux-(?:image|modules|binary)-\S+)", re.MULTILINE)


class Kernel(NamedTuple):
    """An unpacked one."""

    release: str
    place: Path

    @property
    def image(self) -> Path:
        return next(path for path in self.place.rglob("vmlinuz*") if self.release in str(path))

    @property
    def modules(self) -> Path:
        """As they are to be in /lib/modules."""
        return next(path for path in self.place.glob(f"**/lib/modules/{self.release}"))


class Apt:
    """Of one release. Its list is fetched when it is made."""

    def __init__(self, suite: str, tell: Tell) -> None:
        self._place, self._tell = STORE / "kernels" / suite, tell
        for each in ("state/lists/partial", "cache/archives/partial", "debs"):
            (self._place / each).mkdir(parents=True, exist_ok=True)
        (self._place / "status").touch()
        (self._place / "sources.list").write_text(_SOURCE.format(suite))
        (self._place / "debs").chmod(0o777)  # apt fetches as a user of its own
        tell(f"apt: the list of {suite}")
        self._apt("apt-get", "update", "-qq")

    def _apt(self, *command: str) -> str:
        options: Dict[str, object] = {
            "Dir::Etc::sourcelist": self._place / "sources.list",
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::State": self._place / "state",
            "Dir::State::status": self._place / "status",
            "Dir::Cache": self._place / "cache",
        }
        words = [command[0], *(f"-o{name}={value}" for name, value in options.items()), *command[1:]]
        done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=self._place / "debs")
        if done.returncode:
            machine_refuses(f"{' '.join(command)} failed: {done.stderr.strip()[-300:]}")
        return done.stdout

    def kernel(self) -> Kernel:
        """The newest that the release has."""
        packages = self._parts()
        release = next(name for name in packages if name.startswith("linux-image-"))[len("linux-image-") :]
        place = self._place / release
        if not place.exists():
            self._tell(f"apt: {', '.join(packages)}")
            self._apt("apt-get", "download", "-qq", *packages)
            self._unpack(packages, place)
        return Kernel(release, place)

    def _parts(self) -> List[str]:
        """What the metapackage stands for."""
        found = [_KERNEL]
        for package in found:
            found += [each for each in _PARTS.findall(self._apt("apt-cache", "depends", package)) if each not in found]
        return sorted(name for name in found if re.search(r"-\d", name))

    def _unpack(self, packages: List[str], place: Path) -> None:
        making = place.with_name("making")
        remove(making)
        for package in packages:
            for deb in (self._place / "debs").glob(f"{package}_*.deb"):
                subprocess.run(["dpkg", "-x", str(deb), str(making)], check=True)
                deb.unlink()
        making.rename(place)
