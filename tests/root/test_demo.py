"""`demo` as people start it: real namespaces, a real relay, the picture, and nothing left behind however it ends."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import uuid
from pathlib import Path
from typing import Any, Iterator, List, Sequence, Tuple

import pytest
from harness import CHECKOUT, wait_until
from namespaces import require_root
from pty_session import PtySession
from unprivileged import BECOME, as_nobody

pytestmark = pytest.mark.root

MARK = "TSPROXY_TEST_MARK"


def demo(command: Sequence[str], mark: str = "", **run: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, MARK: mark or uuid.uuid4().hex, **run.pop("env", {})}
    done = subprocess.run(
        [*command, "demo"],
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        stdin=subprocess.DEVNULL,
        env=environment,
        check=False,
        **run,
    )
    assert "Traceback" not in done.stderr
    assert marked(environment[MARK]) == []
    return done


def marked(mark: str) -> List[int]:
    """The processes that carry the mark in their environment, zombies not counted: they have none."""
    found = []
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if entry.isdigit() and f"{MARK}={mark}".encode() in Path(f"/proc/{entry}/environ").read_bytes().split(b"\0"):
                found.append(int(entry))
    return found


def legs(picture: str) -> Tuple[List[str], List[str]]:
    """What stands under the two legs, line by line."""
    lines = picture.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("  client -> tsproxy"))
    at = lines[start].index("tsproxy -> exchange")
    block = lines[start : lines.index("", start)]
    return [line[:at].strip() for line in block], [line[at:].strip() for line in block]


def audited(picture: str) -> List[Tuple[str, str]]:
    """Each leg that was captured, and its verdict."""
    return re.findall(r"^  ((?:client|tsproxy) -> \w+) +([A-Z]+) +[0-9]+ of [0-9]+ segments have", picture, re.MULTILINE)


def assert_strips(done: subprocess.CompletedProcess[str]) -> None:
    assert (done.returncode, done.stderr) == (0, "")
    client, upstream = legs(done.stdout)
    tsval = [line for line in client if re.fullmatch(r"TS val [0-9]+ ecr 0", line)]
    assert len(tsval) == 1
    assert "TCP_INFO: timestamps negotiated" in client
    assert any(re.match(r"that had TSval [0-9]+, read by", line) for line in client)
    assert not any(line.startswith("TS ") for line in upstream)
    assert any(line.startswith("mss ") for line in upstream)
    assert "TCP_INFO: timestamps not negotiated" in upstream
    assert audited(done.stdout) == [("client -> tsproxy", "LEAK"), ("tsproxy -> exchange", "CLEAN")]
    assert 'tsproxy\'s line says the same: "upstream_timestamps":false' in done.stdout
    assert re.search(r"CLEAN +0 of [1-9][0-9]* segments have a timestamp$", done.stdout, re.MULTILINE)
    assert "The client offered timestamps; the exchange got none." in done.stdout
    assert all(len(line) <= 80 for line in done.stdout.splitlines())


def assert_relayed(picture: str) -> None:
    orders = int(re.search(r"([0-9,]+) orders of 64 bytes", picture)[1].replace(",", ""))  # type: ignore[index]
    up, down = re.search(r"relayed +([0-9,]+) bytes to the exchange, ([0-9,]+) bytes back", picture).groups()  # type: ignore[union-attr]
    assert orders > 0
    assert int(up.replace(",", "")) == int(down.replace(",", "")) == 64 * orders
    shares = [float(share) for share in re.findall(r" ([0-9.]+) %$", picture, re.MULTILINE)]
    assert 99.9 < sum(shares) < 100.1


def test_root_sees_a_leg_with_timestamps_and_a_leg_without(form: Tuple[List[str], Any]) -> None:
    require_root()
    command, cwd = form
    done = demo(command, cwd=cwd)
    assert_strips(done)
    assert_relayed(done.stdout)
    assert "tcp_timestamps=1" in done.stdout
    assert "tcp_timestamps=0" in done.stdout


@pytest.fixture
def unprivileged(bundle: Path) -> Iterator[List[str]]:
    """The program as user 65534 runs it."""
    with as_nobody(bundle) as command:
        yield command


def test_a_user_without_rights_sees_the_same(unprivileged: List[str]) -> None:
    if subprocess.run([*BECOME, "unshare", "-rn", "true"], capture_output=True, check=False).returncode:
        pytest.skip("LOUD: this host forbids user namespaces, so the demo without root is NOT tested here")
    done = demo(unprivileged)
    assert_strips(done)
    assert_relayed(done.stdout)
    assert "uid 65534, strip" in done.stdout


def in_a_user_namespace(script: str, *options: str) -> List[str]:
    """Words that run a shell script as the root of a fresh user namespace, then what follows without a capability."""
    require_root()
    drop = "exec setpriv --bounding-set=-all --inh-caps=-all"
    return ["unshare", "--user", "--map-root-user", *options, "sh", "-c", f'{script} && {drop} -- "$@"', "sh"]


def assert_preserves(done: subprocess.CompletedProcess[str], *reasons: str) -> None:
    assert (done.returncode, done.stderr) == (0, "")
    said = done.stdout.splitlines()[0]
    assert said.startswith("tsproxy demo: ")
    for reason in reasons:
        assert reason in said
    client, upstream = legs(done.stdout)
    for leg in (client, upstream):
        assert any(re.fullmatch(r"TS val [0-9]+ ecr 0", line) for line in leg)
        assert "TCP_INFO: timestamps negotiated" in leg
    assert_relayed(done.stdout)


def test_where_namespaces_are_forbidden_it_says_so_and_shows_preserve() -> None:
    before = in_a_user_namespace("echo 0 > /proc/sys/user/max_user_namespaces")
    done = demo([*before, *CHECKOUT])
    assert_preserves(done, "No space left on device", "sysctl -w user.max_user_namespaces=")
    assert audited(done.stdout) == []
    words = " ".join(done.stdout.split())
    assert "no audit of the wire: a packet socket can't be had by uid 0 here (Operation not permitted); as root:" in words
    assert "what the kernel says of both legs, above, needs no such right" in words


def test_where_the_sysctl_can_not_be_written_it_says_so_and_shows_preserve() -> None:
    require_root()
    mount = "mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys"
    done = demo(["unshare", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh", *CHECKOUT])
    assert_preserves(done, "Read-only file system", "mount /proc/sys writable")
    assert audited(done.stdout) == [("client -> tsproxy", "LEAK"), ("tsproxy -> exchange", "LEAK")]
    assert 'tsproxy\'s line says the same: "upstream_timestamps":true' in done.stdout


def test_no_namespaces_and_no_loopback_is_one_clear_line() -> None:
    before = in_a_user_namespace("echo 0 > /proc/sys/user/max_user_namespaces", "--net")
    done = demo([*before, *CHECKOUT])
    assert done.returncode == 1
    assert done.stderr == "tsproxy.py: demo: the loopback interface is down; to raise it: ip link set lo up\n"


def test_a_tsproxy_that_can_not_start_is_one_clear_line() -> None:
    require_root()
    done = demo(["unshare", "--net", "prlimit", "--nofile=64:64", "setpriv", "--bounding-set=-sys_resource", *CHECKOUT])
    assert done.returncode == 1
    assert done.stderr.startswith("tsproxy.py: demo: tsproxy said no more: --max-connections: given 4;")
    assert done.stderr.count("\n") == 1


def test_output_that_can_not_show_it_gets_plain_ascii() -> None:
    require_root()
    done = demo(CHECKOUT, env={"PYTHONIOENCODING": "ascii"})
    assert done.stdout.isascii()
    assert "?" not in done.stdout
    assert_strips(done)


@pytest.fixture
def running() -> Iterator[Tuple[subprocess.Popen[bytes], str]]:
    """A demo whose tsproxy runs by now, and its mark."""
    require_root()
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        [*CHECKOUT, "demo"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, MARK: mark},
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_until(lambda: any(is_tsproxy(pid) for pid in marked(mark)), "tsproxy is started by the demo")
    yield process, mark
    process.kill()
    process.communicate()


def is_tsproxy(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return b"--timestamps=strip" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return False


def test_ctrl_c_ends_it_with_130_and_nothing_left(running: Tuple[subprocess.Popen[bytes], str]) -> None:
    process, mark = running
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, b"", b"")
    assert marked(mark) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_however_it_is_killed_its_children_go_too(running: Tuple[subprocess.Popen[bytes], str], number: signal.Signals) -> None:
    process, mark = running
    process.send_signal(number)
    process.wait(30)
    wait_until(lambda: marked(mark) == [], "its children are gone")


def test_a_child_that_is_killed_takes_tsproxy_along_and_the_demo_says_so(running: Tuple[subprocess.Popen[bytes], str]) -> None:
    process, mark = running
    (child,) = (pid for pid in marked(mark) if pid != process.pid and not is_tsproxy(pid))
    os.kill(child, signal.SIGKILL)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (1, b"tsproxy.py: demo: its child process ended without a word\n")
    wait_until(lambda: marked(mark) == [], "tsproxy is gone")


@pytest.mark.parametrize(("no_colour", "coloured"), [("", True), ("1", False)])
def test_a_terminal_gets_colours_unless_no_color_says_no(no_colour: str, coloured: bool) -> None:
    require_root()
    with PtySession([*CHECKOUT, "demo"], env={"NO_COLOR": no_colour}) as session:
        assert session.wait() == 0
    assert (b"\x1b[" in session.output) == coloured
    plain = re.sub(r"\x1b\[[0-9]*m", "", session.output.decode())
    assert all(len(line) <= 80 for line in plain.splitlines())
