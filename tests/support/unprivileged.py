"""The program as user 65534 runs it, without a capability: the bundle under -I -S on a Python that this user may start."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Iterator, List

import pytest
from harness import pythons
from namespaces import require_root

BECOME = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--bounding-set=-all"]
_AGAIN = "import subprocess, sys; subprocess.run([sys.executable, '-c', ''], check=True)"


@contextlib.contextmanager
def as_nobody(bundle: Path) -> Iterator[List[str]]:
    """The words that start a copy of the bundle that everybody may read."""
    require_root()
    with tempfile.TemporaryDirectory() as readable:
        Path(readable).chmod(0o755)
        shutil.copy(bundle, readable)
        yield [*BECOME, _python(), "-I", "-S", str(Path(readable) / bundle.name)]


def _python() -> str:
    """One that can be started from within, too: setpriv(1) itself still had root's rights when it started the first."""
    for python in [*(path for _, path in pythons()), "/usr/bin/python3", "/usr/local/bin/python3"]:
        with contextlib.suppress(FileNotFoundError):
            if subprocess.run([*BECOME, python, "-I", "-S", "-c", _AGAIN], capture_output=True, check=False).returncode == 0:
                return python
    pytest.fail("no Python that an unprivileged user may run")
