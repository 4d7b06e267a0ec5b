"""The system calls that SECURITY.md lists are enough for a whole life, and nothing else is asked for."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, FrozenSet, Iterator, List, Sequence

import pytest
from harness import (
    CHECKOUT,
    PATIENCE,
    ROOT,
    SUPPORT,
    Exchange,
    Proxy,
    echo,
    leave_out,
    pause,
    receive_all,
    receive_exactly,
    reset,
    statuses,
)
from namespaces import Namespace, require_root
from program import PYTHON, python_for
from unprivileged import for_everybody

LAUNCHER = str(SUPPORT / "seccomp_launcher.py")
TEXT = (ROOT / "SECURITY.md").read_text()


def block(title: str) -> str:
    found = re.search(rf"<!-- {title} -->\n```\n(.*?)```", TEXT, re.S)
    assert found, title
    return found[1]


def listed(*titles: str) -> FrozenSet[str]:
    return frozenset(name for title in titles for name in block(f"system calls: {title}").split())


RELAYING, STARTING, OTHERS = listed("relaying"), listed("starting"), listed("other names")
FOR_USER = frozenset(block("system calls: starting").splitlines()[-1].split())


@pytest.fixture(scope="module", autouse=True)
def libseccomp() -> None:
    try:
        ctypes.CDLL("libseccomp.so.2")
    except OSError:
        leave_out("no libseccomp.so.2: that the documented system calls are enough is NOT tested here")


def test_each_call_is_listed_once_in_order_and_is_one() -> None:
    library = ctypes.CDLL("libseccomp.so.2")
    assert not RELAYING & STARTING
    assert not (RELAYING | STARTING) & OTHERS
    for title in ("relaying", "starting", "other names"):
        lines = block(f"system calls: {title}").splitlines()
        parts = [lines[:-1], lines[-1:]] if title == "starting" else [lines]
        for part in parts:
            assert part
            assert " ".join(part).split() == sorted(set(" ".join(part).split()))
    for name in RELAYING | STARTING | OTHERS:
        assert library.seccomp_syscall_resolve_name(name.encode()) != -1, name


@contextlib.contextmanager
def calls(tmp_path: Path, names: FrozenSet[str]) -> Iterator[str]:
    file = tmp_path / "calls"
    file.write_text("\n".join(names))
    yield str(file)


# A life


def live(proxy: Proxy, far: Exchange, space: Namespace, confine: Any = lambda: None) -> None:
    """Relay in all ways, stop and go on, drift, a worker's death where it is a process, drain."""
    with space:
        proxy.line("start")
        confine()
        connect = proxy.connect
        for _ in range(4):
            with connect() as client:
                client.sendall(b"order")
                assert receive_exactly(client, 5) == b"order"
            reset(connect())
        pour(connect())
        with connect() as client:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
            with pytest.raises(ConnectionResetError):
                client.recv(1)  # --idle-timeout
        assert {status["Seccomp"] for status in statuses(proxy)} == {"2"}
        stop_and_continue(proxy)
        drift(proxy, space)
        lose_a_worker(proxy)
        proxy.wait_metrics(lambda line: line["downstream_cx_active"] == 0)
        with connect() as client:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
            proxy.process.send_signal(signal.SIGTERM)
            while not proxy.count("drain"):  # never silent for as long as --idle-timeout
                client.sendall(b"y")
                assert client.recv(1) == b"y"
                proxy.metrics()
    assert proxy.wait() == 0, proxy.stderr()
    far.close()


def pour(client: Any) -> None:
    """16 MiB there and back, so that splice(2) is taken where tsproxy has it, with the reader too slow at first."""
    block_ = bytes(1 << 16)

    def send() -> None:
        for _ in range(256):
            client.sendall(block_)
        client.shutdown(1)

    sender = threading.Thread(target=send)
    sender.start()
    assert len(receive_all(client)) == 16 << 20
    sender.join()
    client.close()


def stop_and_continue(proxy: Proxy) -> None:
    """As job control, `docker pause` and debuggers do: Linux goes on with poll(2) by restart_syscall(2)."""
    family = proxy.family()
    for pid in family:
        pause(pid)
    for pid in family:
        os.kill(pid, signal.SIGCONT)
    proxy.metrics()
    assert proxy.family() == family


def drift(proxy: Proxy, space: Namespace) -> None:
    if proxy.line("start")["witness"] != "sysctl":
        return
    space.sysctl("tcp_timestamps", "1")
    proxy.line("timestamps_drift")
    proxy.expect_reset()
    space.sysctl("tcp_timestamps", "0")
    proxy.line("timestamps_drift", lambda line: line["level"] == "info")


def lose_a_worker(proxy: Proxy) -> None:
    if proxy.line("start")["runtime"] != "processes":
        return
    _fork_server, worker, *_ = proxy.family()[1:]
    os.kill(worker, signal.SIGKILL)
    proxy.line("error")


def kinds() -> Iterator[Any]:
    """Each runtime on the oldest and the newest Python that has it."""
    versions = list(PYTHON)
    usable = {"threads": versions, "processes": versions, "interpreters": [v for v in versions if v == "3.13"]}
    for kind, those in usable.items():
        for version in dict.fromkeys(those[:1] + those[-1:]):
            marks = () if version == those[-1] and kind != "threads" else pytest.mark.slow
            yield pytest.param(kind, version, id=f"{kind}-{version}", marks=marks)


OPTIONS = ["--timestamps=strip", "-p0", "--workers=2", "--metrics-interval=0.2", "--idle-timeout=2", "--reuse-port"]
OPTIONS += ["--max-connections-per-client=500", "--cpus=0"] if os.cpu_count() == 1 else ["--max-connections-per-client=500"]


@pytest.fixture
def clean() -> Iterator[Namespace]:
    require_root()
    with contextlib.closing(Namespace(tcp_timestamps="0")) as space:
        yield space


@pytest.mark.root
@pytest.mark.parametrize(("kind", "version"), list(kinds()))
@pytest.mark.parametrize("user", ["", "nobody"])
def test_a_whole_life_needs_no_other_call(
    kind: str, version: str, user: str, clean: Namespace, bundle: Path, tmp_path: Path
) -> None:
    """As systemd does it: the filter comes before execve(2), and all that comes from there is under it."""
    with clean:
        far = Exchange(echo)
    allowed = RELAYING | STARTING - (frozenset() if user else FOR_USER)
    with calls(tmp_path, allowed) as names, for_everybody(PYTHON[version], bundle) as command:
        prefix = [*clean.enter, *command[:8], sys.executable, "-I", "-S", LAUNCHER, names, "exec"]
        options = ["-t", far.target.replace("127.0.0.1", "localhost"), f"--runtime={kind}", *OPTIONS]
        proxy = Proxy([*prefix, *command[8:]], *options, *([f"--user={user}"] if user else []))
        with contextlib.closing(proxy):
            live(proxy, far, clean)


@pytest.mark.root
@pytest.mark.parametrize("kind", ["threads", "interpreters"])
def test_once_it_relays_the_calls_that_start_it_may_be_forbidden(
    kind: str, clean: Namespace, bundle: Path, tmp_path: Path
) -> None:
    """The filter comes to each thread after the `start` line. (Processes have workers that it can't be put upon then.)"""
    with clean:
        far = Exchange(echo)
    go, end = os.pipe()
    with calls(tmp_path, RELAYING) as names:
        python = python_for(kind) if kind == "interpreters" else sys.executable
        command = [*clean.enter, python, "-I", "-S", LAUNCHER, names, str(go), str(bundle), "-t", far.target]
        proxy = Proxy(command, f"--runtime={kind}", *OPTIONS, pass_fds=[go])
        os.close(go)

        def confine() -> None:
            with proxy.connect() as client:  # both workers have begun
                client.sendall(b"x")
                assert client.recv(1) == b"x"
            os.close(end)
            assert proxy.process.stderr
            assert proxy.process.stderr.readline() == b"confined\n"

        with contextlib.closing(proxy):
            live(proxy, far, clean, confine)


@pytest.mark.root
def test_nftables_as_the_lever_needs_no_other_call(bundle: Path, tmp_path: Path) -> None:
    require_root()
    rules = subprocess.run([*CHECKOUT, "generate", "nftables", "-ta:1"], capture_output=True, text=True, check=True).stdout
    with contextlib.closing(Namespace()) as space, calls(tmp_path, RELAYING | STARTING) as names:
        space.run("nft", "-f", "-", input=rules)
        with space:
            far = Exchange(echo)
        words = [*space.enter, sys.executable, "-I", "-S", LAUNCHER, names, "exec", sys.executable, "-I", "-S", str(bundle)]
        with contextlib.closing(Proxy(words, "-t", far.target, *OPTIONS)) as proxy:
            assert proxy.line("start")["witness"] == "nftables"
            live(proxy, far, space)


OUTSIDE = {
    "ptrace": "ctypes.CDLL(None).ptrace(0, 0, 0, 0)",
    "execve": "os.execv('/bin/true', ['true'])",
    "unlink": "os.unlink('/nothing')",
    "kill": "os.kill(os.getpid(), 0)",
    "setsid": "os.setsid()",
}


@pytest.mark.parametrize("call", OUTSIDE)
def test_a_call_that_is_not_listed_ends_the_process(call: str, tmp_path: Path) -> None:
    """What shows that the filter of the tests above is one. The call comes after the filter was told of."""
    script = tmp_path / "outside.py"
    (go, end), (told, tell) = os.pipe(), os.pipe()
    script.write_text(
        f"import ctypes, os, sys\nos.read({told}, 1)\nos.write(1, b'relaying\\n')\nwhile True:\n    {OUTSIDE[call]}\n"
    )
    with calls(tmp_path, RELAYING) as names:
        command = [sys.executable, "-I", "-S", LAUNCHER, names, str(go), str(script)]
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "pass_fds": [go, told]}
        with subprocess.Popen(command, **pipes) as process:
            for number in (go, end, told):
                os.close(number)
            assert process.stderr
            confined = process.stderr.readline()
            os.close(tell)
            said, _ = process.communicate(timeout=PATIENCE)
    assert (confined, process.returncode, said) == (b"confined\n", -signal.SIGSYS, b"relaying\n")


# Calls that are refused, as a sandbox does it that was made for something else

NEEDED = """accept4 bind clone clone3 dup2 epoll_create1 epoll_ctl epoll_wait ftruncate getsockname getsockopt listen pipe2 poll
recvmsg rt_sigaction sendmsg sendto setsockopt socket socketpair wait4""".split()
WITHOUT = ["memfd_create", "eventfd2", "sched_getaffinity", "prlimit64", "prctl", "close_range", "chdir", "waitid"]
CALLED = {"clone": "fork(2)", "clone3": "clone(2)"}  # by what it is called in C
NUMBERS = [errno.EPERM, errno.ENOSYS]


def refusing(call: str, number: int, runtime: str, bundle: Path, target: str, *more: str) -> Proxy:
    command = [sys.executable, "-I", "-S", LAUNCHER, "refuse", call, str(number), sys.executable, "-I", "-S", str(bundle)]
    return Proxy(command, "-t", target, "-p0", "--timestamps=preserve", f"--runtime={runtime}", *more)


@pytest.mark.parametrize(("call", "number"), list(zip(NEEDED, itertools.cycle(NUMBERS))))
def test_a_call_that_is_refused_is_named_in_one_line_if_it_is_needed(call: str, number: int, bundle: Path) -> None:
    """With processes, which need more of them than threads."""
    with contextlib.closing(refusing(call, number, "processes", bundle, "127.0.0.1:9", "--workers=1")) as proxy:
        with contextlib.suppress(AssertionError):  # it does not start
            proxy.line("start")
        code = proxy.wait() if call == "getsockopt" else proxy.stop()  # its worker ends, and with it the whole
        said = proxy.stderr().splitlines()
    assert code in (0, 1, 69, 75)
    assert len(said) <= 1
    told = said + [line["message"] for line in proxy.lines if line["event"] == "error"]
    assert "Traceback" not in "".join(told)
    if code:
        assert any(CALLED.get(call, f"{call}(2)") in line for line in told), told


@pytest.mark.parametrize(("runtime", "number"), list(zip(["processes", "threads"], NUMBERS)))
@pytest.mark.parametrize("call", WITHOUT)
def test_a_call_that_can_be_done_without_may_be_refused(
    call: str, runtime: str, number: int, bundle: Path, echoing: Exchange
) -> None:
    with contextlib.closing(refusing(call, number, runtime, bundle, echoing.target)) as proxy:
        with proxy.connect() as client:
            client.sendall(b"order")
            assert receive_exactly(client, 5) == b"order"
        assert proxy.line("connection")["reason"] == "closed"
        assert ("wakeup=pipe" in proxy.line("start")["knobs"]) == (call == "eventfd2" or not hasattr(os, "eventfd"))
        assert proxy.stop() == 0
        assert proxy.stderr() == ""
    assert proxy.count("error") == 0


@pytest.mark.parametrize("call", ["clone", "wait4"])
def test_where_processes_are_refused_auto_takes_another_runtime(call: str, bundle: Path, echoing: Exchange) -> None:
    with contextlib.closing(refusing(call, errno.EPERM, "auto", bundle, echoing.target)) as proxy:
        assert proxy.line("start")["runtime"] in ("threads", "interpreters")
        with proxy.connect() as client:
            client.sendall(b"order")
            assert receive_exactly(client, 5) == b"order"
        assert proxy.stop() == 0
        assert proxy.stderr() == ""


@pytest.mark.root
@pytest.mark.parametrize("runtime", ["processes", "threads"])
@pytest.mark.parametrize("closed", ["", "<&- 2>&-"], ids=["", "standard-descriptors-closed"])
def test_preserve_needs_neither_proc_nor_dev_null(runtime: str, closed: str, bundle: Path, echoing: Exchange) -> None:
    """As in a chroot that nobody has furnished. (strip reads /proc: that it can't is said, with 78.)"""
    require_root()
    bare = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none /proc && mount -t tmpfs none /dev && exec "$@" {closed}']
    words = ["-t", echoing.target, "-p0", "--timestamps=preserve", "--workers=2", f"--runtime={runtime}"]
    with contextlib.closing(Proxy([*bare, "sh", sys.executable, "-I", "-S", str(bundle)], *words)) as proxy:
        for _ in range(4):
            with proxy.connect() as client:
                client.sendall(b"order")
                assert receive_exactly(client, 5) == b"order"
        assert proxy.stop() == 0
        assert proxy.stderr() == ""
    assert (proxy.count("connection"), proxy.count("error")) == (4, 0)


@pytest.mark.root
def test_strip_without_proc_asks_for_proc_and_for_nothing_else(bundle: Path) -> None:
    """No lever would help: what it reads is not there."""
    require_root()
    bare = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh"]
    command = [*bare, sys.executable, "-I", "-S", str(bundle), "-t", "127.0.0.1:9", "-p0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.returncode == 78
    first, *rest = done.stderr.splitlines()
    path = "/proc/sys/net/ipv4/tcp_timestamps"
    assert first == f"tsproxy: --timestamps=strip can't be honoured here: can't read {path}: No such file or directory."
    assert [line.strip() for line in rest if line.startswith("    ")] == ["mount -t proc proc /proc"]


# What is made from the list


@functools.lru_cache
def group(name: str) -> FrozenSet[str]:
    """The calls in one of systemd's groups."""
    said = subprocess.run(["systemd-analyze", "syscall-filter", name], capture_output=True, text=True, check=True).stdout
    words = [line.strip() for line in said.splitlines()[1:] if line.strip() and not line.strip().startswith("#")]
    return expand(words)


def expand(words: Sequence[str]) -> FrozenSet[str]:
    return frozenset(call for word in words for call in (group(word) if word.startswith("@") else [word]))


@pytest.mark.parametrize("more", [[], ["--cpus=0"]])
def test_the_unit_that_is_generated_allows_each_listed_call_and_none_of_the_dangerous_ones(more: List[str]) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("LOUD: no systemd-analyze")
    said = subprocess.run([*CHECKOUT, "generate", "systemd", "-ta:1", *more], capture_output=True, text=True, check=True).stdout
    allowed = set(group("@default"))  # implicitly (systemd.exec(5))
    for words in re.findall(r"^SystemCallFilter=(.*)$", said, re.M):
        names = expand(words.lstrip("~").split())
        allowed = allowed - names if words.startswith("~") else allowed | names
    for_cpus = frozenset({"sched_setaffinity"})
    assert (RELAYING | STARTING | OTHERS) - FOR_USER - (frozenset() if more else for_cpus) <= allowed
    dangerous = {"ptrace", "mount", "bpf", "setuid", "capset", "keyctl", "io_uring_setup", "process_vm_readv", "kcmp"}
    assert not allowed & (dangerous | {"init_module", "kexec_load", "unshare", "setns", "userfaultfd", "perf_event_open"})
    assert "LimitCORE=0" in said.splitlines()


def test_apparmor_can_read_the_profile() -> None:
    parser = shutil.which("apparmor_parser") or shutil.which("apparmor_parser", path="/usr/sbin:/sbin")
    if not parser:
        leave_out("no apparmor_parser: that it can read the profile is NOT tested here")
    for words in (["-Q", "-K"], ["-p"]):
        done = subprocess.run([parser, *words], input=block("apparmor"), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    broken = block("apparmor").replace("network inet stream,", "network inet stream")
    assert subprocess.run([parser, "-Q", "-K"], input=broken, capture_output=True, text=True, check=False).returncode != 0
