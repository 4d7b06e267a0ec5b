"""Network namespaces that a test makes for itself and that are gone when it ends."""

from __future__ import annotations

import ctypes
import os
import subprocess
from typing import List, Optional

from harness import leave_out

_libc = ctypes.CDLL(None, use_errno=True)
_CLONE_NEWNET = 0x40000000


may_be_root = True  # set for each test: it is marked so


def require_root() -> None:
    """Skip, loudly, where namespaces can't be made; in CI that is a failure, and everywhere in a test not marked `root`."""
    assert may_be_root, "a test that needs root is to be marked: @pytest.mark.root"
    if os.geteuid() == 0:
        return
    leave_out("not root, so no network namespace: what this test holds is NOT tested here")


class Namespace:
    """A namespace with lo up. `with namespace:` puts this thread in it, so that sockets made there belong to it."""

    def __init__(self, **sysctls: str) -> None:
        """`sysctls` are names under net.ipv4, e.g. tcp_timestamps="0"."""
        require_root()
        self._holder = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "ip link set lo up && echo ready && exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._holder.stdout
        assert self._holder.stdout.readline() == b"ready\n"
        self.pid = self._holder.pid
        self.path = f"/proc/{self.pid}/ns/net"
        self._home: List[int] = []
        for name, value in sysctls.items():
            self.sysctl(name, value)

    def __enter__(self) -> Namespace:
        self._home.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY))
        there = os.open(self.path, os.O_RDONLY)
        _setns(there)
        os.close(there)
        return self

    def __exit__(self, *_: object) -> None:
        home = self._home.pop()
        _setns(home)
        os.close(home)

    @property
    def enter(self) -> List[str]:
        """The words to put before a command to run it in here."""
        return ["nsenter", f"--net={self.path}"]

    def run(self, *command: str, input: Optional[str] = None) -> str:
        """Run a command in here; its output. CalledProcessError, with what it said, if it fails."""
        done = subprocess.run([*self.enter, *command], input=input, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr or done.stdout}"
        return done.stdout

    def sysctl(self, name: str, value: str) -> None:
        """Set net.ipv4.NAME in here."""
        with self, open(f"/proc/sys/net/ipv4/{name}", "w") as file:
            file.write(value)

    def receive_on_one_cpu(self) -> None:
        """One CPU takes all packets of the loopback in here, one after the other (RPS: Documentation/networking/scaling.rst).

        A kernel's own race is out of the way then. Where one CPU puts the socket of a new connection in the place of its
        handshake, another one, with the client's first bytes, may find neither, and the listener answers them with a
        reset: the client is gone, and the server has a connection that nobody else has. It takes a handshake that was
        finished by a timer on another CPU (a SYN sent again), and came three times in some 150 bursts (Linux 6.18, seen
        with perf: tcp:tcp_send_reset by a socket in LISTEN for the data of a connection that is established).
        """
        script = "mount -t sysfs none /sys && echo 1 >/sys/class/net/lo/queues/rx-0/rps_cpus"
        self.run("unshare", "--mount", "sh", "-c", script)

    def close(self) -> None:
        """Give it up; it goes when its last process and socket do."""
        assert self._holder.stdin
        assert self._holder.stdout
        self._holder.stdin.close()
        self._holder.wait()
        self._holder.stdout.close()


def _setns(fd: int) -> None:
    if _libc.setns(fd, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")
