"""Fixtures: the program in each form it is used in, an exchange to connect to, and a look for what a test left behind.

And what a run leaves out: it is said at its end.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import namespaces
import pytest
from fake_clock import FakeClock
from faults import make_stand
from harness import CHECKOUT, Exchange, Proxy, echo, wait_until
from hypothesis import settings
from name_server import Named
from program import FORMS, PYTHON, RUNTIME, RUNTIMES, Start, checkout_alone, python_for, slow_but, starter
from routed import StartRouted, routed_starter
from wire import Wire

# A shell without job control ignores these for what it starts in the background, and tsproxy keeps to that.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)


sys.argv[0] = "tsproxy.py"  # what runs in this process calls itself as the checkout does


# A first look takes a fifth of the examples; --hypothesis-profile=thorough takes all, of every property, with -m slow.
settings.register_profile("fast", max_examples=20, deadline=None)
settings.register_profile("thorough", max_examples=100, deadline=None)
settings.load_profile("fast")

_LEFT_OUT = pytest.StashKey[Dict[str, int]]()
_DROPPED = pytest.StashKey[int]()


def dropped() -> int:
    """Packets that a CPU's queue had no room for, in all namespaces (net.core.netdev_max_backlog)."""
    return sum(int(line.split()[1], 16) for line in Path("/proc/net/softnet_stat").read_text().splitlines())


def pytest_collection_modifyitems(config: pytest.Config, items: List[pytest.Item]) -> None:
    if config.getoption("--hypothesis-profile") == "thorough":
        for item in items:
            test = getattr(item, "obj", None)
            inside = {"given", "run_state_machine_as_test"} & set(getattr(getattr(test, "__code__", None), "co_names", ()))
            if inside or getattr(test, "is_hypothesis_test", False):
                item.add_marker(pytest.mark.slow)


def pytest_deselected(items: List[pytest.Item]) -> None:
    config = items[0].config
    counts = {mark: sum(bool(item.get_closest_marker(mark)) for item in items) for mark in ("slow", "deploy")}
    config.stash[_LEFT_OUT] = counts
    if hasattr(config, "workeroutput"):
        config.workeroutput["left_out"] = counts


class _OfWorkers:
    """What pytest-xdist's workers have left out: each of them the same."""

    def pytest_testnodedown(self, node: Any) -> None:
        node.config.stash[_LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", {})


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_DROPPED] = dropped()
    if config.pluginmanager.hasplugin("xdist"):
        config.pluginmanager.register(_OfWorkers())


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for mark, count in config.stash.get(_LEFT_OUT, {}).items():
        if count:
            terminalreporter.write_line(f"LOUD: {count} tests marked {mark} were left out: pytest -m {mark}")
    lost = dropped() - config.stash[_DROPPED]
    if lost:
        terminalreporter.write_line(f"LOUD: the kernel dropped {lost} packets (softnet_stat): a reset is not sent again")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Iterator[None]:
    """What each tsproxy of a test that fails has said: elsewhere that is all one can see of it."""
    report = yield
    if report.failed:
        told = [(f"tsproxy {each.process.pid}", each.told()) for each in gc.get_objects() if isinstance(each, Proxy)]
        report.sections += told
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    namespaces.may_be_root = any(item.get_closest_marker(mark) for mark in ("root", "deploy"))
    if item.get_closest_marker("root"):
        namespaces.require_root()


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """A test that leaves a thread or a descriptor of this process open has failed."""
    threads, fds = threading.active_count(), _open_descriptors()
    yield
    if _open_descriptors() > fds:
        gc.collect()  # a socket in a cycle is closed here, with a ResourceWarning. On each test it would cost 80 ms of CPU
    wait_until(lambda: threading.active_count() <= threads, "the test's threads end")
    wait_until(lambda: _open_descriptors() <= fds, "the test's descriptors are closed")


def _open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


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


@pytest.fixture
def start() -> Iterator[Start]:
    """Start the checkout: start("-t", ..., ...) -> Proxy, relaying with --timestamps=preserve on a free port."""
    yield from starter(CHECKOUT, None)


@pytest.fixture
def start_form(form: Tuple[List[str], Any]) -> Iterator[Start]:
    """The same for each form of the program: what must hold for all of them."""
    yield from starter(*form)


@pytest.fixture
def start_routed(tmp_path: Path) -> Iterator[StartRouted]:
    """Start the checkout with a file of routes: start_routed({"orders": {"target": ..., "port": 0}}, ...) -> RoutedProxy."""
    yield from routed_starter(CHECKOUT, tmp_path)


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


_EACH_WAY = [f"{runtime} from {form}" for runtime in RUNTIMES for form in ("checkout", "bundle")]


@pytest.fixture(params=slow_but([f"{RUNTIME} from checkout", f"{RUNTIME} from bundle"], _EACH_WAY))
def begin(request: pytest.FixtureRequest, bundle: Path) -> Iterator[Any]:
    """Start the proxy under one runtime, on a Python that has it, from the checkout and from the bundle."""
    runtime, _, form = request.param.split(" ")
    script = str(bundle) if form == "bundle" else str(checkout_alone(bundle))
    for start in starter([python_for(runtime), "-I", "-S", script], None):
        yield functools.partial(_under, start, runtime)


def _under(start: Any, runtime: str, far: Exchange, *options: str, **popen: Any) -> Proxy:
    return start(far, f"--runtime={runtime}", *options, **popen)


@pytest.fixture
def clock(tmp_path: Path) -> FakeClock:
    return FakeClock(tmp_path)


@pytest.fixture
def named(bundle: Path, tmp_path: Path) -> Iterator[Named]:
    """On one stand: names are the main process's affair, whatever the runtime."""
    for stand in make_stand("processes from checkout", bundle):
        with Named(stand, tmp_path) as named:
            yield named


@pytest.fixture
def spaces() -> Iterator[Any]:
    """spaces(tcp_timestamps="0", rules="...") -> a namespace with lo up."""
    with contextlib.ExitStack() as stack:

        def make(rules: str = "", **sysctls: str) -> namespaces.Namespace:
            namespace = stack.enter_context(contextlib.closing(namespaces.Namespace(**sysctls)))
            if rules:
                namespace.run("nft", "-f", "-", input=rules)
            return namespace

        yield make


@pytest.fixture
def no_cycles() -> Iterator[None]:
    """A test whose sessions leave a cycle has failed: a worker has no garbage collector, and what a cycle holds stays."""
    gc.collect()
    gc.disable()
    yield
    gc.set_debug(gc.DEBUG_SAVEALL)
    gc.collect()
    gc.set_debug(0)
    gc.enable()
    left = [each for each in gc.garbage if type(each).__module__.startswith("_tsproxy.proxy")]
    named = sorted({type(each).__name__ for each in left} - {"Sweep"})  # a worker has it as long as its timers, which have it
    gc.garbage.clear()
    left.clear()
    assert named == []
