"""Fixtures: the program in each form it is used in, an exchange to connect to, and a look for what a test left behind."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Callable, Iterator, List, Tuple

import pytest
from harness import ROOT, Exchange, Proxy, echo, pythons, wait_until
from wire import Wire

# A shell without job control ignores these for what it starts in the background, and tsproxy keeps to that.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)
sys.argv[0] = "tsproxy.py"  # what runs in this process calls itself as the checkout does
CHECKOUT = [sys.executable, str(ROOT / "tsproxy.py")]
FORMS = ["checkout", *(f"bundle-{version}" for version, _ in pythons())]
PYTHON = dict(pythons())


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """A test that leaves a thread or a descriptor of this process open has failed."""
    threads, fds = threading.active_count(), len(os.listdir("/proc/self/fd"))
    yield
    gc.collect()
    wait_until(lambda: threading.active_count() <= threads, "the test's threads end", 5)
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= fds, "the test's descriptors are closed", 5)


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The single file, made once."""
    out = tmp_path_factory.mktemp("bundle") / "tsproxy"
    subprocess.run([*CHECKOUT, "bundle", str(out)], check=True)
    return out


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> Tuple[List[str], Any]:
    """(command, working directory): the checkout, and the bundle under -I -S in an empty directory on each Python."""
    if request.param == "checkout":
        return CHECKOUT, None
    out, empty = request.getfixturevalue("bundle"), request.getfixturevalue("tmp_path")
    return [PYTHON[request.param.split("-")[1]], "-I", "-S", str(out)], empty


Start = Callable[..., Proxy]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start the checkout: start("-t", ..., ...) -> Proxy, relaying with --timestamps=preserve on a free port."""
    yield from _starter(CHECKOUT, None)


@pytest.fixture
def start_form(form: Tuple[List[str], Any]) -> Iterator[Start]:
    """The same for each form of the program: what must hold for all of them."""
    yield from _starter(*form)


def _starter(command: List[str], cwd: Any) -> Iterator[Start]:
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


@pytest.fixture
def exchange() -> Iterator[Exchange]:
    """A listener whose connections the test serves by hand."""
    far = Exchange()
    yield far
    far.close()


@pytest.fixture
def echoing() -> Iterator[Exchange]:
    """An echo server."""
    far = Exchange(echo)
    yield far
    far.close()


@pytest.fixture
def make_wire() -> Iterator[Callable[..., Wire]]:
    """Make client, proxy and exchange in namespaces of their own: make_wire(split=...) -> Wire."""
    with contextlib.ExitStack() as stack:
        yield lambda *args, **options: stack.enter_context(contextlib.closing(Wire(*args, **options)))
