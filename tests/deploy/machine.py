"""A machine with a real systemd, by systemd-nspawn(1) on an overlay over a root file system, and an exchange's place beside it.

    host (its network namespace, with a default route) --- exchange

Knows how it is booted in mount, PID and cgroup namespaces of its own, how a command gets in, and how all of it goes away, also
when the test is killed. Knows nothing of tsproxy.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

from harness import wait_until
from namespaces import Namespace
from roots import machine_refuses, remove, require, scratch
from wire import UPSTREAM, join

HOST, EXCHANGE = "10.2.0.1", "10.2.0.2"
_BOOT_S = 120
_END_S = 60
_PACE_S = 0.2  # of questions that cost a process each
# nspawn wants to write to /run and /tmp, so it is given others. The overlay's layers are on the checkout's file system.
_BOOT = """
echo $$ >"$1/cgroup.procs"
shift
exec unshare --mount --pid --fork --kill-child sh -euc '
mount --make-rprivate /
mount --bind "$1" /mnt
mount --bind "$2" /mnt/root
mount --bind "$3" /mnt/network
mount -t proc proc /proc
mount -t tmpfs none /run
mount -t tmpfs none /tmp
cd /
mount -t overlay -o lowerdir=/mnt/root,upperdir=/mnt/upper,workdir=/mnt/work overlay /mnt/merged
shift 3
exec systemd-nspawn --boot --register=no --keep-unit --console=pipe \\
    --directory=/mnt/merged --network-namespace-path=/mnt/network "$@"
' sh "$@"
"""
# More than nspawn allows by itself: what runc asks the kernel for.
_FOR_CONTAINERS = ["--capability=all", "--system-call-filter=add_key keyctl bpf"]

HEALED_S = 120


class Machine:
    """Booted when it is made; close() leaves nothing."""

    def __init__(self, root: Path, *, containers: bool = False) -> None:
        """`root` is only read. `containers`: Docker shall run in there."""
        require("systemd-nspawn", "setpriv", "nsenter", "ip")
        self._root, self._containers = root, containers
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as undo:
            undo.callback(self._stack.close)
            self._make_place()
            self.host, self.exchange = (self._stack.enter_context(contextlib.closing(Namespace())) for _ in range(2))
            join(self.host, self.exchange, UPSTREAM, 1)
            self.host.run("ip", "route", "add", "default", "via", EXCHANGE)
            if not containers:
                self._mask("docker.service", "docker.socket", "containerd.service")
            self.boot()
            self._stack.callback(self._kill)
            undo.pop_all()

    def _make_place(self) -> None:
        place = scratch("machine")
        self._stack.callback(remove, place)
        for each in ("root", "upper", "work", "merged", "docker"):
            (place / each).mkdir()
        (place / "network").touch()
        self._place = place
        self._console = place / "console"

    def _mask(self, *units: str) -> None:
        """As `systemctl mask` does, before there is a systemd to ask."""
        place = self._place / "upper/etc/systemd/system"
        place.mkdir(parents=True)
        for unit in units:
            (place / unit).symlink_to("/dev/null")

    def boot(self) -> None:
        """Start it, again too: what was written stays."""
        self._cgroup = _own_cgroup()
        words = [*_FOR_CONTAINERS, "--bind=/mnt/docker:/var/lib/docker"] if self._containers else ["--capability=CAP_NET_ADMIN"]
        environment = {**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1", "SYSTEMD_NSPAWN_API_VFS_WRITABLE": "network"}
        places = [str(self._cgroup), str(self._place), str(self._root), self.host.path]
        command = ["setpriv", "--pdeathsig=KILL", "sh", "-euc", _BOOT, "sh", *places]
        with self._console.open("wb") as console:
            self._process = subprocess.Popen(
                [*command, *words], stdin=subprocess.DEVNULL, stdout=console, stderr=console, env=environment
            )
        try:
            wait_until(self._is_up, "systemd is up", _BOOT_S, _PACE_S)
        except AssertionError as late:
            self._kill()
            said = self._console.read_text(errors="replace").strip().splitlines()
            machine_refuses(f"systemd does not boot in systemd-nspawn: {late}; {'; '.join(said[-3:])}")

    def _is_up(self) -> bool:
        """Known by then: `leader`, the first process of the innermost PID namespace, by the number that it has here."""
        assert self._process.poll() is None, "systemd-nspawn has ended"
        self.leader = next((pid for pid in _descendants(self._process.pid) if _is_systemd(pid)), 0)
        up = {"running", "degraded"}
        return bool(self.leader) and self.try_run("systemctl", "is-system-running").stdout.strip() in up

    def outside(self, inside: int) -> int:
        """The number here of a process that is called `inside` in there."""
        found = [pid for pid in _descendants(self.leader) if _status(pid).get("NSpid", "").split()[2:] == [str(inside)]]
        assert found, f"no process is called {inside} in there"
        return found[0]

    @property
    def enter(self) -> List[str]:
        """The words to put before a command to run it in here."""
        return ["nsenter", f"--target={self.leader}", "--all", "--root", "--wd"]

    def try_run(self, *command: str, input: Optional[str] = None) -> subprocess.CompletedProcess[str]:
        """Run a command in here, whatever comes of it."""
        return subprocess.run([*self.enter, *command], input=input, capture_output=True, text=True, check=False)

    def run(self, *command: str, input: Optional[str] = None) -> str:
        """Run a command in here; its output. AssertionError with all that it said if it fails."""
        done = self.try_run(*command, input=input)
        assert done.returncode == 0, f"{command} ended with {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout

    def sh(self, script: str) -> str:
        return self.run("sh", "-euc", script)

    def write(self, path: str, data: str, mode: str = "644") -> None:
        self.run("sh", "-euc", 'cat >"$1" && chmod "$2" "$1"', "sh", path, mode, input=data)

    def shut_down(self) -> None:
        """Power it off as a person would, and wait."""
        self.try_run("systemctl", "poweroff")
        self._process.wait(_END_S)
        self._forget()

    def _kill(self) -> None:
        self._process.kill()  # unshare(1), which takes along the first process of its PID namespace, and so all others
        self._process.wait()
        self._forget()

    def _forget(self) -> None:
        wait_until(lambda: _removed(self._cgroup), f"nobody is in {self._cgroup} any more", _END_S, _PACE_S)

    def close(self) -> None:
        self._stack.close()


def _own_cgroup() -> Path:
    """A new one below that of this process, in the cgroup2 tree as it is mounted. Those of processes that were killed go."""
    ours = Path("/proc/self/cgroup").read_text().split("0::/")[-1].split("\n")[0]
    mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    places = [Path(fields[4] + ours) for fields in mounts if fields[fields.index("-") + 1] == "cgroup2"]
    if not places:
        machine_refuses("no cgroup2 file system is mounted")
    for old in places[0].glob("tsproxy-*"):
        if not Path("/proc", old.name.split("-")[1]).exists():
            _removed(old)
    try:
        return Path(tempfile.mkdtemp(prefix=f"tsproxy-{os.getpid()}-", dir=places[0]))
    except OSError as problem:
        machine_refuses(f"no cgroup can be made: {problem}")


def _removed(cgroup: Path) -> bool:
    """Try to, and in the trees where nspawn has made it, too; they go when their last processes have."""
    for tree in [cgroup, *Path("/sys/fs/cgroup").glob(f"*/{cgroup.name}")]:
        for path, _, _ in os.walk(tree, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(path)
    return not cgroup.exists()


def _status(pid: int) -> Dict[str, str]:
    with contextlib.suppress(OSError):
        return dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {}


def _is_systemd(pid: int) -> bool:
    """The first process of the innermost of three PID namespaces, once it is no nspawn any more."""
    status = _status(pid)
    return status.get("NSpid", "").split()[2:] == ["1"] and status["Name"].strip() == "systemd"


def _descendants(pid: int) -> List[int]:
    found = [pid]
    for each in found:
        with contextlib.suppress(OSError):
            found += map(int, Path(f"/proc/{each}/task/{each}/children").read_text().split())
    return found


def eventually(look: Callable[[], Any], what: str, deadline: float = HEALED_S) -> None:
    """Wait for it; what is asked about may have gone, or not be there yet."""

    def once() -> bool:
        with contextlib.suppress(AssertionError, OSError, ValueError, LookupError):
            return bool(look())
        return False

    wait_until(once, what, deadline, 0.1)


def steps(text: str, heading: str) -> str:
    """The commands below a word of the comment at the top, as a person would copy them."""
    block = re.search(rf"^# {heading}:(.*?)^#? *(?:[A-Z][a-z]+:|$)", text, re.MULTILINE | re.DOTALL)
    assert block, text
    lines = [re.sub(r"^#? *(\d\. )?", "", line) for line in block.group(1).splitlines()]
    return "\n".join(line for line in lines if not line.endswith("which this does:"))
