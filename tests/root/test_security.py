"""What tsproxy may do once it relays: no right of root left in any thread, and no option that opens more than it says."""

from __future__ import annotations

import contextlib
import functools
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Iterator, List

import pytest
from harness import CHECKOUT, ROOT, Exchange, Proxy, receive_exactly, statuses, wait_until
from namespaces import Namespace, require_root
from program import EACH_RUNTIME, python_for, starter
from unprivileged import for_everybody

NOBODY = pwd.getpwnam("nobody")


@pytest.fixture(params=EACH_RUNTIME)
def start_readable(request: pytest.FixtureRequest, bundle: Path) -> Iterator[Any]:
    """Start the bundle under one runtime, in a place that every user may read."""
    require_root()
    with for_everybody(python_for(request.param), bundle) as command:
        for start in starter(command, None):
            yield functools.partial(_under, start, request.param)


def _under(start: Any, kind: str, far: Exchange, *options: str, **popen: Any) -> Proxy:
    return start(far, f"--runtime={kind}", *options, **popen)


def works(proxy: Proxy) -> None:
    with proxy.connect() as client:
        client.sendall(b"order")
        assert receive_exactly(client, 5) == b"order"


@pytest.mark.root
def test_no_thread_of_any_process_keeps_anything_of_root(start_readable: Any, echoing: Exchange, request: Any) -> None:
    """Main, reporter, resolver, fork server, workers: credentials are kept for each thread in Linux."""
    proxy = start_readable(echoing, "--user=nobody", "--workers=2")
    assert proxy.line("start")["runtime"] in request.node.name
    for _ in range(4):
        works(proxy)
    found = statuses(proxy)
    assert len(found) >= 4, "main, reporter, two workers"
    for status in found:
        assert status["Uid"].split() == [str(NOBODY.pw_uid)] * 4
        assert status["Gid"].split() == [str(NOBODY.pw_gid)] * 4
        assert set(status["Groups"].split()) == set(map(str, os.getgrouplist("nobody", NOBODY.pw_gid)))
        assert {int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
        assert status["NoNewPrivs"] == "1"
    assert proxy.stop() == 0
    assert proxy.stderr() == ""


@pytest.mark.root
def test_its_memory_is_closed_to_other_processes_of_the_same_user(start_readable: Any, echoing: Exchange) -> None:
    """Not dumpable (prctl(2), PR_SET_DUMPABLE): no core file with orders in it, no ptrace(2), no /proc/PID/mem."""
    proxy = start_readable(echoing, "--user=nobody", "--workers=1")
    works(proxy)
    become = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--bounding-set=-all"]
    for pid in proxy.family():
        for file in ("mem", "environ", "maps", "fd"):
            said = subprocess.run([*become, "head", "-c1", f"/proc/{pid}/{file}"], capture_output=True, text=True, check=False)
            assert "Permission denied" in said.stderr, (pid, file)
        assert Path(f"/proc/{pid}/mem").stat().st_uid == 0


def test_who_started_without_root_can_gain_no_right_either(start: Any, echoing: Exchange) -> None:
    proxy = start(echoing, "--runtime=processes", "--workers=1")
    works(proxy)
    assert {status["NoNewPrivs"] for status in statuses(proxy)} == {"1"}


REGAIN = """
import os, subprocess, sys
from _tsproxy.linux import privileges
if sys.argv[2:]:
    privileges.set_no_new_privs = privileges._verify = lambda *_: None
privileges.drop(privileges.account("nobody"))
print(subprocess.run([sys.argv[1], "-u"], capture_output=True, text=True).stdout, end="")
"""


@pytest.mark.root
@pytest.mark.parametrize(("sabotage", "uid"), [([], "65534"), (["without"], "0")])
def test_a_setuid_program_gives_root_back_to_nobody(sabotage: List[str], uid: str) -> None:
    """The second case is the proof of the first: without no_new_privs the program does give it."""
    require_root()
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        program = shutil.copy("/usr/bin/id", place)
        os.chmod(program, 0o4755)
        words = [sys.executable, "-c", REGAIN, program, *sabotage]
        env = {**os.environ, "PYTHONPATH": str(ROOT / "lib")}
        assert subprocess.run(words, capture_output=True, text=True, env=env, check=True).stdout == f"{uid}\n"


def refused(*options: str) -> str:
    done = subprocess.run(
        [*CHECKOUT, "-t127.0.0.1:9", "--timestamps=preserve", *options], capture_output=True, text=True, check=False, timeout=30
    )
    assert (done.returncode, done.stdout) == (2, "")
    return done.stderr


@pytest.mark.root
def test_root_is_no_user_to_become() -> None:
    require_root()
    assert refused("-p0", "--user=root") == "tsproxy.py: --user: given 'root'; allowed: a user that is not root\n"


@pytest.mark.root
def test_a_user_who_may_not_read_python_gets_processes_not_a_traceback(bundle: Path, echoing: Exchange) -> None:
    """auto is tried anew as that user: an interpreter starts from Python's own files."""
    require_root()
    with tempfile.TemporaryDirectory() as closed, for_everybody(python_for("interpreters"), bundle) as command:
        for start in starter([*command[:6], *[word.replace(command[7], f"{closed}/p") for word in command[6:]]], None):
            (Path(closed) / "p").mkdir()
            proxy = start(echoing, "--user=nobody", "--workers=1")
            assert proxy.line("start")["runtime"] == "processes"
            works(proxy)
            assert proxy.stop() == 0


# Options


def reaches(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), 5).close()
    except ConnectionRefusedError:
        return False
    except ConnectionResetError:  # the target refuses at once
        return True
    return True


@pytest.mark.root
@pytest.mark.parametrize(
    ("bind", "bindv6only", "reached"),
    [
        ([], "0", {"127.0.0.1"}),
        (["--bind=127.0.0.2"], "0", {"127.0.0.2"}),
        (["--bind=0.0.0.0"], "0", {"127.0.0.1", "127.0.0.2"}),
        (["--bind=::1"], "0", {"::1"}),
        (["--bind=::"], "0", {"127.0.0.1", "127.0.0.2", "::1"}),
        (["--bind=::"], "1", {"::1"}),
        (["--bind=::ffff:127.0.0.2"], "0", {"127.0.0.2"}),
    ],
)
def test_it_listens_where_it_says_and_nowhere_else(bind: List[str], bindv6only: str, reached: set[str]) -> None:
    with contextlib.closing(Namespace()) as space:
        space.run("sysctl", "-qw", f"net.ipv6.bindv6only={bindv6only}")
        for start in starter([*space.enter, *CHECKOUT], None):
            proxy = start("127.0.0.1:9", "-p8080", *bind)
            proxy.line("start")
            with space:
                assert {ip for ip in ("127.0.0.1", "127.0.0.2", "::1") if reaches(ip, 8080)} == reached
            proxy.close()


@pytest.mark.parametrize(
    ("allow", "let_in"),
    [
        ("127.0.0.1", {"127.0.0.1"}),
        ("::/0", {"::1"}),
        ("0.0.0.0/0", {"127.0.0.1", "127.0.0.2"}),
        ("::ffff:127.0.0.2", {"127.0.0.2"}),
        ("::ffff:0:0/96", {"127.0.0.1", "127.0.0.2"}),
        ("::/90", {"::1"}),
    ],
)
def test_an_ipv4_client_of_an_ipv6_listener_is_let_in_by_ipv4_blocks_alone(
    start: Any, echoing: Exchange, allow: str, let_in: set[str]
) -> None:
    proxy = start(echoing, "--bind=::", f"--allow={allow}")
    port = proxy.address[1]

    def served(ip: str) -> bool:
        with contextlib.suppress(ConnectionResetError), socket.create_connection((ip, port), source_address=(ip, 0)) as client:
            client.sendall(b"x")
            return client.recv(1) == b"x"
        return False

    assert {ip for ip in ("127.0.0.1", "127.0.0.2", "::1") if served(ip)} == let_in
    assert proxy.metrics()["downstream_cx_denied"] == 3 - len(let_in)


TAKE = """
import os, socket, sys
os.setresuid(*3 * [int(sys.argv[1])])
with socket.socket() as late:
    late.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        late.bind(("127.0.0.1", int(sys.argv[2])))
        print("shared")
    except OSError as error:
        print(error.strerror)
"""


@pytest.mark.root
@pytest.mark.parametrize(("uid", "said"), [(0, "shared"), (65534, "Address already in use"), (1, "Address already in use")])
def test_a_shared_port_is_open_to_the_user_who_bound_it_alone(start: Any, echoing: Exchange, uid: int, said: str) -> None:
    """That is root where root started it, even after --user (the socket's uid is its maker's, inet_rcv_saddr_equal())."""
    require_root()
    proxy = start(echoing, "--reuse-port", "--user=nobody")
    done = subprocess.run(
        [sys.executable, "-c", TAKE, str(uid), str(proxy.address[1])], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{said}\n"


def test_without_reuse_port_nobody_shares_the_port(start: Any, echoing: Exchange) -> None:
    port = str(start(echoing).address[1])
    done = subprocess.run([sys.executable, "-c", TAKE, str(os.getuid()), port], capture_output=True, text=True, check=True)
    assert done.stdout == "Address already in use\n"


def test_no_byte_of_an_order_stands_in_any_line_or_on_standard_error(start: Any, echoing: Exchange) -> None:
    secret = b"NEW-ORDER-7f3a91"
    proxy = start(echoing, "--log-level=debug")
    with proxy.connect() as client:
        client.sendall(secret)
        assert receive_exactly(client, len(secret)) == secret
    wait_until(lambda: proxy.metrics()["downstream_cx_active"] == 0)
    assert proxy.stop() == 0
    assert not any("7f3a91" in str(line) for line in proxy.lines)
    assert proxy.stderr() == ""


_READ_ONLY = 'mount -o remount,bind,ro / && mount -o remount,bind,ro /dev/shm && ! touch "$PWD/probe" 2>&- && exec "$@"'


@pytest.mark.root
@pytest.mark.parametrize("kind", EACH_RUNTIME)
def test_no_file_is_written(bundle: Path, echoing: Exchange, kind: str) -> None:
    """It relays, replaces nothing, reports and ends where each file system is read-only."""
    require_root()
    words = ["unshare", "--mount", "sh", "-c", _READ_ONLY, "sh", python_for(kind), "-I", "-S", str(bundle)]
    for start in starter(words, None):
        proxy = start(echoing, f"--runtime={kind}")
        works(proxy)
        assert proxy.metrics()["downstream_cx_total"] == 1
        assert proxy.stop() == 0
        assert proxy.stderr() == ""
