"""The program as another user runs it, without a capability: the bundle under -I -S on a Python that this user may start."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Iterator, List

import pytest
from namespaces import require_root
from program import PYTHON

NOBODY = 65534
_numbers = itertools.count(100_000 + os.getpid() % 10_000 * 100)


def become(uid: int = NOBODY) -> List[str]:
    """The words before a command that this user shall run."""
    return ["setpriv", f"--reuid={uid}", "--regid=65534", "--clear-groups", "--bounding-set=-all"]


def nobody_else() -> int:
    """A user that no other test is: tasks (RLIMIT_NPROC) and pages of pipes are counted for each user of a host."""
    return next(_numbers)


BECOME = become()
_AGAIN = "import subprocess, sys; subprocess.run([sys.executable, '-c', ''], check=True)"


@contextlib.contextmanager
def as_nobody(bundle: Path, uid: int = NOBODY) -> Iterator[List[str]]:
    """The words that start a copy of the bundle that everybody may read."""
    require_root()
    with tempfile.TemporaryDirectory() as readable:
        Path(readable).chmod(0o755)
        shutil.copy(bundle, readable)
        yield [*become(uid), _python(), "-I", "-S", str(Path(readable) / bundle.name)]


def _python() -> str:
    """One that can be started from within, too: setpriv(1) itself still had root's rights when it started the first."""
    for python in [*PYTHON.values(), "/usr/bin/python3", "/usr/local/bin/python3"]:
        with contextlib.suppress(FileNotFoundError):
            if subprocess.run([*BECOME, python, "-I", "-S", "-c", _AGAIN], capture_output=True, check=False).returncode == 0:
                return python
    pytest.fail("no Python that an unprivileged user may run")


_BOUND = 'mount --bind "$1" "$2" && cd / && shift 2 && exec "$@"'


@contextlib.contextmanager
def for_everybody(python: str, bundle: Path) -> Iterator[List[str]]:
    """The words that run a copy of the bundle on that Python where every user may read both."""
    home = Path(python).resolve().parent.parent
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        (Path(place) / "python").mkdir()
        shutil.copy(bundle, place)
        inside = f"{place}/python/bin/{Path(python).resolve().name}"
        words = ["unshare", "--mount", "sh", "-c", _BOUND, "sh", str(home), f"{place}/python"]
        yield [*words, inside, "-I", "-S", f"{place}/{bundle.name}"]
