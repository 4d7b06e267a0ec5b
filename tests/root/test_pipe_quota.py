"""splice(2) for a user whose quota of pipe pages is used up (pipe(7))."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path
from pipes import push_through
from typing import Iterator, Sequence

import pytest
from _tsproxy.proxy.pipes import SIZE
from harness import Exchange, Proxy
from unprivileged import BECOME, as_nobody, become, nobody_else

_HOARD = f"""
import fcntl, os, sys
pipes = []
try:
    while True:
        pipes.append(os.pipe())
        fcntl.fcntl(pipes[-1][1], 1031, {SIZE})
except OSError:
    print(len(pipes), flush=True)
sys.stdin.read()
"""


@pytest.mark.root
def test_a_user_whose_pipe_quota_is_used_up_copies(bundle: Path, exchange: Exchange) -> None:
    """The quota is the user's (fs.pipe-user-pages-soft), so that another program of the same user can use it up."""
    user = nobody_else()
    with as_nobody(bundle, user) as command, hoarder([*become(user), command[len(BECOME)]]):
        proxy = Proxy(command, "-t", exchange.target, "-p0", "--workers=1", "--timestamps=preserve", "--metrics-interval=0")
        try:
            assert len(set(push_through(proxy, exchange))) == 1
            assert proxy.stop() == 0
        finally:
            proxy.close()


@contextlib.contextmanager
def hoarder(python: Sequence[str]) -> Iterator[None]:
    with subprocess.Popen([*python, "-I", "-S", "-c", _HOARD], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert int(process.stdout.readline()) > 1
        yield
        process.communicate()
