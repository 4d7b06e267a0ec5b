"""The program in each form it is used in, on each runtime and each Python: the words that start it.

One form, one runtime and one Python make the first look: the checkout, and the bundle where that matters, on the Python
at hand. All others are marked slow.
"""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, List, Tuple

import pytest
from harness import ROOT, Exchange, Proxy, children, leave_out, pythons

PYTHON = dict(pythons())
AT_HAND = f"{sys.version_info[0]}.{sys.version_info[1]}"
RUNTIMES = ("threads", "processes", "interpreters")
RUNTIME = "interpreters" if sys.version_info >= (3, 13) else "processes"  # what `auto` takes on the Python at hand


def command_file(path: Path, *words: str) -> str:
    """A program there that is these words, and what it is given; its path."""
    path.write_text(f'#!/bin/sh\nexec {" ".join(words)} "$@"\n')
    path.chmod(0o755)
    return str(path)


def slow_but(first: Iterable[str], values: Iterable[str]) -> List[Any]:
    """Parameters: those of the first look as they are, the others marked slow."""
    return [value if value in first else pytest.param(value, marks=pytest.mark.slow) for value in values]


EACH_RUNTIME = slow_but([RUNTIME], RUNTIMES)
FORMS = slow_but(["checkout", f"bundle-{AT_HAND}"], ["checkout", *(f"bundle-{version}" for version in PYTHON)])


def python_for(runtime: str) -> str:
    """A Python that has this runtime: the oldest one here. Where none has it, the test is left out loudly."""
    usable = [path for version, path in PYTHON.items() if runtime != "interpreters" or int(version.split(".")[1]) >= 13]
    if not usable:
        leave_out(f"no Python from 3.13 on: --runtime={runtime} is NOT tested here")
    return usable[0]


@functools.cache
def on_time() -> Tuple[str, ...]:
    """Words to start a program with that a busy machine shall not make late: SCHED_FIFO (sched(7)); none without that right.

    For what holds as long as no worker stands still for 0.25 s (docs/timestamps.md): Linux sends a SYN again after 1 s, and
    tsproxy takes that one back after 0.75 s.
    """
    words = ("chrt", "--fifo", "1")
    with contextlib.suppress(FileNotFoundError):
        if subprocess.run([*words, "true"], capture_output=True, check=False).returncode == 0:
            return words
    return ()


Start = Callable[..., Proxy]


def checkout_alone(bundle: Path) -> Path:
    """The checkout with docopt-ng beside it, for a Python that has nothing installed."""
    place = bundle.parent / "checkout"
    if not place.exists():
        place.mkdir()
        (place / "tsproxy.py").symlink_to(ROOT / "tsproxy.py")
        (place / "run.py").write_text(_RUN.format(root=str(ROOT), docopt=os.path.dirname(os.path.dirname(_docopt()))))
    return place / "run.py"


def _docopt() -> str:
    import docopt

    return docopt.__file__


_RUN = """
import importlib.util, sys
place = {docopt!r} + "/docopt"
spec = importlib.util.spec_from_file_location("docopt", place + "/__init__.py", submodule_search_locations=[place])
sys.modules["docopt"] = docopt = importlib.util.module_from_spec(spec)
spec.loader.exec_module(docopt)
import runpy
runpy.run_path({root!r} + "/tsproxy.py", run_name="__main__")
"""


def workers_of(proxy: Proxy) -> List[int]:
    """The worker processes: the fork server's children."""
    (fork_server,) = children(proxy.process.pid)
    return children(fork_server)


def starter(command: List[str], cwd: Any) -> Iterator[Start]:
    running: List[Proxy] = []

    def begin(target: str | Exchange, *options: str, **popen: Any) -> Proxy:
        upstream = target if isinstance(target, str) else target.target
        defaults = ["-t", upstream, "--metrics-interval=0"]
        if not any(option.startswith(("-p", "--port")) for option in options):
            defaults.append("-p0")
        if not any(option.startswith("--timestamps") for option in options):
            defaults.append("--timestamps=preserve")
        running.append(Proxy(command, *defaults, *options, cwd=cwd, **popen))
        return running[-1]

    yield begin
    for proxy in running:
        proxy.close()
