"""What a parent leaves behind: signals blocked or ignored, descriptors, children, limits, a directory (SECURITY.md)."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest
from _tsproxy.linux import children as host_children
from handover import hand_over, listeners
from harness import CHECKOUT, ROOT, SUPPORT, Exchange, Proxy, children, free_port, receive_exactly, statuses, target, wait_until
from name_server import Named
from namespaces import require_root
from program import RUNTIMES, python_for
from unprivileged import as_nobody, nobody_else

ASKED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def serves(proxy: Proxy) -> None:
    with proxy.connect() as client:
        client.sendall(b"order")
        assert receive_exactly(client, 5) == b"order"


def relaying(command: List[str], to: Exchange, *options: str, **popen: Any) -> Any:
    """A proxy that is started by other words than the usual ones."""
    return contextlib.closing(Proxy([*command, "-t", to.target, "-p0", "--timestamps=preserve", *options], **popen))


# Signals


def blocking(*numbers: int) -> Callable[[], None]:
    return lambda: signal.pthread_sigmask(signal.SIG_BLOCK, numbers) and None


def ignoring(*numbers: int) -> Callable[[], None]:
    return lambda: [signal.signal(number, signal.SIG_IGN) for number in numbers] and None


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_signals_that_are_blocked_at_the_start_are_unblocked_in_each_thread_and_process(
    start: Any, echoing: Exchange, kind: str
) -> None:
    """Else SIGKILL would be the only end."""
    everything = sorted(signal.valid_signals())
    proxy = start(echoing, f"--runtime={kind}", "--workers=2", preexec_fn=blocking(*everything))
    serves(proxy)
    assert {int(status["SigBlk"], 16) for status in statuses(proxy)} == {0}
    assert proxy.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT], ids=["nohup", "background"])
def test_a_sighup_or_sigint_that_is_ignored_at_the_start_stays_ignored(start: Any, echoing: Exchange, number: int) -> None:
    proxy = start(echoing, preexec_fn=ignoring(number))
    proxy.line("start")
    proxy.process.send_signal(number)
    serves(proxy)
    proxy.metrics()
    assert proxy.count("drain") == 0
    assert proxy.stop() == 0
    assert proxy.line("stop")["reason"] == "SIGTERM"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_is_not_ignored_at_the_start_drains(start: Any, echoing: Exchange, number: int) -> None:
    proxy = start(echoing)
    proxy.line("start")
    assert proxy.stop(number) == 0
    assert proxy.line("stop")["reason"] == signal.Signals(number).name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_sigterm_or_sigusr1_that_is_ignored_at_the_start_is_taken_all_the_same(
    start: Any, echoing: Exchange, number: int
) -> None:
    proxy = start(echoing, preexec_fn=ignoring(number))
    proxy.metrics()
    assert proxy.stop() == 0


def test_an_ignored_sigchld_costs_no_exit_status(start: Any, echoing: Exchange) -> None:
    """With it the kernel reaps by itself, and waitpid(2) says ECHILD."""
    proxy = start(echoing, "--runtime=processes", "--workers=1", preexec_fn=ignoring(signal.SIGCHLD))
    serves(proxy)
    (fork_server,) = children(proxy.process.pid)
    os.kill(fork_server, signal.SIGKILL)
    assert "died (killed by SIGKILL)" in proxy.line("error")["message"]
    serves(proxy)
    assert proxy.stop() == 0
    assert proxy.stderr() == ""


@pytest.mark.parametrize("number", ASKED)
def test_a_signal_that_comes_before_the_first_line_is_not_lost(start: Any, echoing: Exchange, number: int) -> None:
    """It is pending from before execve(2), so no moment is earlier: SIGUSR1 prints metrics, the others end it with 0."""

    def send() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [number])
        os.kill(os.getpid(), number)

    proxy = start(echoing, preexec_fn=send)
    if number == signal.SIGUSR1:
        proxy.line("metrics")
        proxy.process.send_signal(signal.SIGTERM)
    assert proxy.wait() == 0
    assert proxy.line("stop")["reason"] == ("SIGTERM" if number == signal.SIGUSR1 else signal.Signals(number).name)
    assert proxy.stderr() == ""


def inside_of(proxy: Proxy) -> int:
    """The process behind unshare(1)."""
    return int(wait_until(lambda: children(proxy.process.pid), "unshare has forked")[0])


@pytest.mark.root
@pytest.mark.parametrize("first", [False, True], ids=["as any process", "as PID 1"])
def test_a_sigterm_during_the_first_look_up_ends_it_at_once_with_0(named: Named, first: bool) -> None:
    """getaddrinfo(3) goes on for seconds, and nothing interrupts it; for PID 1 the default action would be none."""
    named.names.address = None
    words = ("unshare", "--pid", "--fork", "--kill-child") if first else ()
    named._wrap = (*named._wrap, *words)
    proxy = named.start()
    wait_until(lambda: named.names.asked, "the name is looked up")
    os.kill(inside_of(proxy) if first else proxy.process.pid, signal.SIGTERM)
    assert proxy.wait() == 0
    assert "ended by a signal while the targets' names were looked up" in proxy.stderr()
    assert not proxy.lines


def looking_up(named: Named, *words: str) -> Tuple[Proxy, int]:
    """A proxy that has asked for its target's address and gets no answer, and the process that waits for it."""
    named.names.address = None
    named._wrap = (*named._wrap, *words)
    proxy = named.start()
    wait_until(lambda: named.names.asked, "the name is looked up")
    return proxy, int(children(proxy.process.pid)[0])


@pytest.mark.root
def test_nothing_is_left_of_a_look_up_that_a_sigterm_has_ended(named: Named) -> None:
    """Where prctl(2) is refused, too, with which the kernel ends it: standard output and inherited listeners are open there."""
    proxy, child = looking_up(named, sys.executable, str(SUPPORT / "seccomp_launcher.py"), "refuse", "prctl", "1")
    proxy.process.send_signal(signal.SIGTERM)
    assert proxy.wait() == 0
    assert not Path(f"/proc/{child}").exists()


@pytest.mark.root
def test_a_look_up_that_is_killed_ends_the_start_with_75(named: Named) -> None:
    proxy, child = looking_up(named)
    os.kill(child, signal.SIGKILL)
    assert proxy.wait() == 75
    assert "can't be resolved: the process that looks names up ended without an answer" in proxy.stderr()


@pytest.mark.root
def test_a_sigusr1_during_the_first_look_up_prints_metrics_when_it_relays(named: Named, tmp_path: Path) -> None:
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:5\n")
    proxy, _ = looking_up(named)
    proxy.process.send_signal(signal.SIGUSR1)
    named.names.address = "127.0.0.2"  # for the question that is asked again after a second
    proxy.line("metrics")
    assert proxy.stop() == 0


# Children


def orphan(pid: int) -> None:
    """Let a process end whose parent, in PID `pid`'s namespace, has ended before."""
    script = "(read end; exit 7) <&0 &"
    subprocess.run(["nsenter", f"--pid=/proc/{pid}/ns/pid", "sh", "-c", script], stdin=subprocess.DEVNULL, check=True)


@pytest.mark.root
def test_pid_1_reaps_orphans_and_takes_no_status_of_its_own_children(echoing: Exchange) -> None:
    """Else each is a zombie for ever. Its own: the fork server, whose end is still told as it was."""
    require_root()
    words = ["unshare", "--pid", "--fork", "--kill-child", *CHECKOUT]
    with relaying(words, echoing, "--runtime=processes", "--workers=1") as proxy:
        serves(proxy)
        pid = inside_of(proxy)
        (fork_server,) = children(pid)
        for _ in range(3):
            orphan(pid)
        wait_until(lambda: children(pid) == [fork_server], "the orphans are reaped")
        os.kill(fork_server, signal.SIGKILL)
        assert "died (killed by SIGKILL)" in proxy.line("error")["message"]
        orphan(pid)
        wait_until(lambda: len(children(pid)) <= 1, "orphans are reaped without a fork server, too: its worker is one")
        os.kill(pid, signal.SIGTERM)
        assert proxy.wait() == 0


def test_a_child_from_before_execve_is_reaped(echoing: Exchange) -> None:
    words = ["sh", "-c", 'true & exec "$@"', "sh", *CHECKOUT]
    with relaying(words, echoing, "--runtime=threads", "--workers=1") as proxy:
        serves(proxy)
        wait_until(lambda: children(proxy.process.pid) == [], "no zombie")
        assert proxy.stop() == 0


def test_reaping_leaves_the_status_of_ours_to_whoever_waits_for_it() -> None:
    ours, other = (os.fork() or os._exit(code) for code in (3, 4))
    wait_until(lambda: Path(f"/proc/{ours}/stat").read_text().rsplit(")")[1].split()[0] == "Z")
    wait_until(lambda: Path(f"/proc/{other}/stat").read_text().rsplit(")")[1].split()[0] == "Z")
    host_children.reap_others([ours])
    assert os.waitstatus_to_exitcode(os.waitpid(ours, 0)[1]) == 3
    host_children.reap_others([])
    with pytest.raises(ChildProcessError):
        os.waitpid(other, 0)


# Descriptors


def inode(fd: int) -> str:
    return os.readlink(f"/proc/self/fd/{fd}")


def held(proxy: Proxy) -> Dict[int, List[str]]:
    """What each of its processes has open."""
    return {pid: [target(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()] for pid in proxy.family()}


@pytest.fixture
def left_open() -> Iterator[Tuple[List[int], str]]:
    """A pipe's writing end, under a low and a high number, and what it is."""
    reader, writer = os.pipe()
    high = fcntl.fcntl(writer, fcntl.F_DUPFD, 900)
    yield [writer, high], inode(writer)
    for fd in (reader, writer, high):
        os.close(fd)


@pytest.mark.root
@pytest.mark.parametrize("options", [[f"--runtime={kind}"] for kind in RUNTIMES] + [["--runtime=processes", "--user=nobody"]])
def test_no_descriptor_that_was_left_open_stays(
    bundle: Path, echoing: Exchange, left_open: Tuple[List[int], str], options: List[str]
) -> None:
    if "--user=nobody" in options:
        require_root()
    python = python_for("interpreters") if "--runtime=interpreters" in options else sys.executable
    fds, what = left_open
    with relaying([python, "-I", "-S", str(bundle)], echoing, *options, pass_fds=fds) as proxy:
        serves(proxy)
        assert not [pid for pid, names in held(proxy).items() if what in names]
        assert proxy.stop() == 0


def test_handed_over_listeners_stay_and_what_lies_behind_them_does_not(
    echoing: Exchange, left_open: Tuple[List[int], str]
) -> None:
    fds, what = left_open
    with listeners(2) as socks:
        proxy = hand_over(socks, "-t", echoing.target, "--timestamps=preserve", pass_also=fds)
    with contextlib.closing(proxy):
        assert len(proxy.line("start")["listeners"]) == 2
        serves(proxy)
        assert not any(what in names for names in held(proxy).values())
        assert proxy.stop() == 0


CLOSE = """
import fcntl, os, resource, sys
from _tsproxy.linux import inherited, libc
if "old" in sys.argv:
    def call(*_): raise OSError(38, "no close_range(2)")
    libc.call = call
low, high = os.dup(2), fcntl.fcntl(2, fcntl.F_DUPFD, 500)
kept = fcntl.fcntl(2, fcntl.F_DUPFD, 400)
if "limit" in sys.argv:
    resource.setrlimit(resource.RLIMIT_NOFILE, (20, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
inherited.close_all_but([kept, 0, 1])
def is_open(fd):
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
print(*(is_open(fd) for fd in (0, 1, 2, low, kept, high)))
"""


@pytest.mark.root
@pytest.mark.parametrize("how", ["new", "old", "new limit", "old limit"])
@pytest.mark.parametrize("proc", [True, False], ids=["with /proc", "without"])
def test_all_are_closed_but_those_to_keep(how: str, proc: bool) -> None:
    """Whatever the host lacks: close_range(2), /proc, or a limit above the highest descriptor."""
    if not proc:
        require_root()
    without = [] if proc else ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh"]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "lib")}
    words = [*without, sys.executable, "-c", CLOSE, *how.split()]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=env)
    assert done.stdout.split() == ["True", "True", "True", "False", "True", "False"]


# Directory and limits


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_the_directory_that_it_was_started_in_is_left(echoing: Exchange, tmp_path: Path, kind: str) -> None:
    with relaying(CHECKOUT, echoing, f"--runtime={kind}", cwd=tmp_path) as proxy:
        serves(proxy)
        assert {os.readlink(f"/proc/{pid}/cwd") for pid in proxy.family()} == {"/"}
        assert proxy.stop() == 0


def test_a_directory_that_is_deleted_does_not_matter(echoing: Exchange, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    with relaying(["sh", "-c", 'rmdir "$PWD" && exec "$@"', "sh", *CHECKOUT], echoing, cwd=gone) as proxy:
        serves(proxy)
        assert proxy.stop() == 0
        assert proxy.stderr() == ""


def refused(*options: str, before: Callable[[], None]) -> Tuple[int, str]:
    words = [*CHECKOUT, "-t127.0.0.1:9", "-p0", "--timestamps=preserve", *options]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=30, preexec_fn=before)
    assert done.stderr.count("\n") == 1
    return done.returncode, done.stderr


def test_a_limit_on_files_that_is_too_low_for_the_counters_is_said() -> None:
    def low() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    code, said = refused("--workers=1", before=low)
    assert (code, said.partition(";")[0]) == (
        2,
        "tsproxy.py: the limit on file sizes (RLIMIT_FSIZE, ulimit -f): given 4096 bytes",
    )


@pytest.mark.root
@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_a_limit_on_processes_that_is_too_low_is_said(bundle: Path, kind: str) -> None:
    with as_nobody(bundle, nobody_else()) as command:
        words = ["prlimit", "--nproc=1:1", *command, "-t127.0.0.1:9", "-p0", "--timestamps=preserve", f"--runtime={kind}"]
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=30)
    assert (done.returncode, done.stdout) == (75, "")
    assert "ulimit -u" in done.stderr
    assert done.stderr.count("\n") == 1


def test_standard_descriptors_that_are_closed_do_not_become_a_connection(echoing: Exchange) -> None:
    port = free_port()
    words = [
        "sh",
        "-c",
        'exec "$@" 0<&- 1>&- 2>&-',
        "sh",
        *CHECKOUT,
        "-t",
        echoing.target,
        f"-p{port}",
        "--timestamps=preserve",
    ]
    process = subprocess.Popen(words)
    try:

        def connects() -> bool:
            with contextlib.suppress(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port), 5).close()
                return True
            return False

        wait_until(connects, "it listens")
        assert {os.readlink(f"/proc/{process.pid}/fd/{fd}") for fd in (0, 1, 2)} == {"/dev/null"}
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
