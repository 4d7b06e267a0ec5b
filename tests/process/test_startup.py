"""What an operator gets wrong before the first connection: one clear line, the right exit code, no traceback."""

from __future__ import annotations

import ast
import os
import pwd
import re
import resource
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Iterator, List, Sequence

import pytest
from harness import CHECKOUT, ROOT, Exchange, children, first_free, free_port, receive_exactly
from unprivileged import as_nobody


def refuse(*options: str, command: Sequence[str] = CHECKOUT, **run: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*command, *options], capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL, check=False, **run
    )
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    return done


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert re.match(r"tsproxy(\.py)?: ", done.stderr)  # the checkout, or a bundle
    assert done.stderr.count("\n") == 1
    return done.stderr


PRESERVE = ["--timestamps=preserve", "-p0"]


def test_a_port_in_use_ends_with_69() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = refuse("-t", "127.0.0.1:9", "--timestamps=preserve", "-p", str(taken.getsockname()[1]))
    assert done.returncode == 69
    assert "Address already in use" in one_line(done)


def test_a_listening_address_that_is_not_ours_ends_with_69() -> None:
    done = refuse("-t", "127.0.0.1:9", *PRESERVE, "--bind=192.0.2.1")
    assert done.returncode == 69
    assert "192.0.2.1" in one_line(done)


def test_a_target_that_can_not_be_resolved_is_named() -> None:
    done = refuse("-t", "no-such-host.invalid:443", *PRESERVE)
    assert done.returncode == 75
    assert "--target: given 'no-such-host.invalid:443'" in one_line(done)


@pytest.mark.parametrize("bind", ["127.0.0.1", "0.0.0.0"])
def test_a_target_that_is_tsproxy_itself_is_refused(bind: str) -> None:
    port = free_port()
    done = refuse("-t", f"127.0.0.1:{port}", "--timestamps=preserve", f"-p{port}", "-b", bind)
    assert done.returncode == 2
    assert "tsproxy's own" in one_line(done)


@pytest.mark.parametrize(
    ("keys", "code", "said"),
    [
        ("target = 127.0.0.1:{port}\nport = {port}", 2, ":5: [b] target: given '127.0.0.1:{port}'; allowed: any address but"),
        ("port = 0\ntarget = 127.0.0.1:9\nsource = 192.0.2.1", 75, ":7: [b] source: given '192.0.2.1'; allowed: an address "),
        ("port = 0\ntarget = 127.0.0.1:9\ninterface = none0", 75, ":7: [b] interface: given 'none0'; allowed: an interface "),
        ("port = 0\ntarget = no-such-host.invalid:443", 75, ":6: [b] target: given 'no-such-host.invalid:443'; can't be "),
        ("port = 0\nbind = 192.0.2.1\ntarget = 127.0.0.1:9", 69, ":6: [b] can't listen on 192.0.2.1:0: "),
    ],
)
def test_what_only_the_host_shows_to_be_wrong_in_a_file_of_routes_has_its_line_too(
    tmp_path: Path, keys: str, code: int, said: str
) -> None:
    port, file = free_port(), tmp_path / "r.ini"
    file.write_text("[a]\nport = 0\ntarget = 127.0.0.1:9\n[b]\n" + keys.format(port=port))
    done = refuse(f"--routes={file}", "--timestamps=preserve")
    assert done.returncode == code
    assert one_line(done).startswith(f"tsproxy.py: {file}{said.format(port=port)}")
    assert "--" not in done.stderr.replace("--reuse-port", "")


@pytest.fixture
def unprivileged(bundle: Path) -> Iterator[List[str]]:
    """The program as user 65534 runs it."""
    with as_nobody(bundle) as words:
        yield words


@pytest.mark.root
def test_too_few_descriptors_are_said_before_the_first_connection(unprivileged: List[str]) -> None:
    options = ["-t", "127.0.0.1:9", *PRESERVE, "--max-connections=1000", "--workers=1"]
    done = refuse(*options, command=["prlimit", "--nofile=256:256", *unprivileged])
    assert done.returncode == 2
    assert "--max-connections: given 1000; allowed: up to 76" in one_line(done)
    file = Path(unprivileged[-1]).with_name("routes.ini")
    file.write_text("[DEFAULT]\nport = 0\ntarget = 127.0.0.1:9\n" + "".join(f"[route-{number}]\n" for number in range(100)))
    done = refuse(
        f"--routes={file}", "--timestamps=preserve", "--workers=1", command=["prlimit", "--nofile=256:256", *unprivileged]
    )
    assert done.returncode == 2
    assert "--routes: given 100 routes; allowed: fewer with this process's hard limit of 256 descriptors" in one_line(done)


def test_the_soft_limit_is_raised_as_far_as_needed(start: Any, echoing: Exchange) -> None:
    def low() -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))

    proxy = start(echoing, "--max-connections=2000", preexec_fn=low)
    limits: List[str] = proxy.line("start")["limits"]
    (nofile,) = (int(text.split("=")[1]) for text in limits if text.startswith("nofile="))
    assert nofile >= 4000


@pytest.mark.root
@pytest.mark.parametrize("user", ["root", "daemon"])
def test_an_unprivileged_user_can_not_become_another(user: str, unprivileged: List[str]) -> None:
    done = refuse("-t", "127.0.0.1:9", *PRESERVE, f"--user={user}", command=unprivileged)
    assert done.returncode == 2
    assert f"--user={user}: only root" in one_line(done)


def test_a_user_that_does_not_exist_is_named() -> None:
    done = refuse("-t", "127.0.0.1:9", *PRESERVE, "--user=nobody-at-all")
    assert done.returncode == 2
    assert "--user: given 'nobody-at-all'" in one_line(done)


def test_root_is_dropped_for_good_after_binding(start: Any, echoing: Exchange) -> None:
    if os.geteuid() != 0:
        pytest.skip("LOUD: needs root to drop it")
    nobody = pwd.getpwnam("nobody")
    proxy = start(echoing, "--user=nobody")
    proxy.line("start")
    status = Path(f"/proc/{proxy.process.pid}/status").read_text()
    fields = {line.split(":")[0]: line.split(":")[1].split() for line in status.splitlines()}
    assert fields["Uid"] == [str(nobody.pw_uid)] * 4
    assert fields["Gid"] == [str(nobody.pw_gid)] * 4
    assert all(int(fields[name][0], 16) == 0 for name in ("CapPrm", "CapEff"))
    assert "0" not in fields["Groups"]
    with proxy.connect() as client:
        client.sendall(b"still works")
        assert receive_exactly(client, 11) == b"still works"


def test_descriptors_that_run_out_pause_accepting_and_come_back(start: Any, echoing: Exchange) -> None:
    """EMFILE at accept(): the listener rests, nothing spins, and who waits is served when there is room again."""
    proxy = start(echoing, "--runtime=threads", "--workers=1", "--max-connections=100")
    with proxy.connect() as first:
        first.sendall(b"x")
        assert first.recv(1) == b"x"
    pid = proxy.process.pid
    free = first_free(pid, sockets=2)
    old = resource.prlimit(pid, resource.RLIMIT_NOFILE, (free, 20000))
    clients = [proxy.connect() for _ in range(6)]
    assert proxy.line("error")["message"].startswith("accept: Too many open files (raise LimitNOFILE)")
    before = proxy.cpu_seconds()
    with pytest.raises(subprocess.TimeoutExpired):
        proxy.process.wait(0.5)
    assert proxy.cpu_seconds() - before < 0.1
    resource.prlimit(pid, resource.RLIMIT_NOFILE, old)
    for client in clients:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        client.close()


def test_a_worker_process_without_descriptors_loses_clients_not_itself(start: Any, echoing: Exchange) -> None:
    handed = "--max-connections-per-client=100"  # so that the main thread accepts, and hands the client over
    proxy = start(echoing, "--runtime=processes", "--workers=1", "--max-connections=100", handed)
    with proxy.connect() as first:
        first.sendall(b"x")
        assert first.recv(1) == b"x"
    proxy.line("connection")
    (fork_server,) = children(proxy.process.pid)
    (worker,) = children(fork_server)
    free = first_free(worker, sockets=1)
    for room in (0, 1):  # none for the client's descriptor; one for it, and none for the upstream socket
        old = resource.prlimit(worker, resource.RLIMIT_NOFILE, (free + room, 20000))
        proxy.expect_end()
        assert "LimitNOFILE" in proxy.line("error", after=len(proxy.lines))["message"]
        resource.prlimit(worker, resource.RLIMIT_NOFILE, old)
    proxy.wait_metrics(lambda line: line["downstream_cx_active"] == 0)
    with proxy.connect() as later:
        later.sendall(b"x")
        assert later.recv(1) == b"x"


def test_two_instances_share_a_port_when_asked(start: Any, echoing: Exchange) -> None:
    first = start(echoing, "--reuse-port")
    port = first.address[1]
    second = start(echoing, "--reuse-port", f"-p{port}")
    assert second.address == first.address
    assert first.stop() == 0
    for _ in range(20):
        with second.connect() as client:
            client.sendall(b"x")
            assert client.recv(1) == b"x"


@pytest.mark.parametrize("words", [("check",), ("-p0",)], ids=["check", "relaying"])
def test_too_few_descriptors_to_see_the_policy_are_75_and_no_loopback_that_is_down(words: Sequence[str]) -> None:
    """EMFILE says nothing of timestamps, nor of lo."""
    done = refuse(*words, "-t127.0.0.1:9", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (5, 5)))
    assert done.returncode == 75
    assert "Too many open files; raise the number of descriptors that are allowed (ulimit -n, LimitNOFILE=)" in one_line(done)


# What it is run with


def test_the_older_docopt_is_told_from_docopt_ng(tmp_path: Path) -> None:
    (tmp_path / "docopt.py").write_text("def docopt(doc, argv=None, help=True, version=None, options_first=False): pass\n")
    command = [sys.executable, "-S", str(ROOT / "tsproxy.py")]
    done = refuse("--version", command=command, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2
    assert "docopt-ng is missing (docopt is another one): pip install docopt-ng" in one_line(done)


AS_OLD = """
import runpy, sys
sys.argv = sys.argv[1:]
sys.version_info, sys.version = (3, 8, 18, "final", 0), "3.8.18 (default)"
runpy.run_path(sys.argv[0], run_name="__main__")
"""
TOO_OLD = [
    [sys.executable, "-c", AS_OLD],
    *([str(path)] for path in sorted((Path.home() / ".pyenv/versions").glob("3.[678].*/bin/python3"))),
]


@pytest.mark.parametrize("form", ["checkout", "bundle"])
@pytest.mark.parametrize("python", TOO_OLD, ids=lambda words: "pretended" if "-c" in words else Path(words[0]).parts[-3])
def test_a_python_that_is_too_old_is_said_in_one_line(bundle: Path, python: List[str], form: str) -> None:
    script = str(bundle if form == "bundle" else ROOT / "tsproxy.py")
    done = refuse("-t", "127.0.0.1:9", *PRESERVE, command=[*python, script])
    assert done.returncode == 2
    assert re.search(r": needs Python 3\.9 or later; this is 3\.[678]\.\d+\n", one_line(done))


def test_what_says_so_can_be_read_by_python_3_6(bundle: Path) -> None:
    for script in (ROOT / "tsproxy.py", bundle):
        ast.parse(script.read_text(), feature_version=(3, 6))
