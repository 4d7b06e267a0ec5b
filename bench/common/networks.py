"""A second network namespace, joined to this process's own by a veth with both families on it. Needs root, ip(8), nft(8).

It is gone when its holder and its last process are. Knows commands; knows nothing of what is sent there.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from typing import Dict, List, Tuple

from common.tap import mac_of
from common.trouble import Failed, Refusal

_CLONE_NEWNET = 0x40000000  # include/uapi/linux/sched.h
WIRE = "wire"  # the veth's name on both ends
ADDRESSES: Dict[int, Tuple[str, str, int]] = {4: ("10.3.0.1", "10.3.0.2", 24), 6: ("fd03::1", "fd03::2", 64)}


def require() -> None:
    """Refusal where it can't be had."""
    missing = [tool for tool in ("ip", "nft", "nsenter", "unshare", "setpriv") if not shutil.which(tool)]
    if os.geteuid() != 0:
        raise Refusal("needs root: it makes network namespaces and reads a wire")
    if missing:
        raise Refusal(f"needs {', '.join(missing)}")


class Network:
    """The namespace; there it has the first of ADDRESSES, here this process gets the second."""

    def __init__(self, sysctls: Dict[str, str]) -> None:
        """`sysctls` are names under net/ipv4."""
        words = ["unshare", "--net", "sh", "-c", "ip link set lo up && echo ready && exec cat"]
        self._holder = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.path = f"/proc/{self._holder.pid}/ns/net"
        if not self._holder.stdout or not self._holder.stdout.readline():
            raise Failed("no network namespace can be made")
        settings = " && ".join(f"echo '{value}' >/proc/sys/net/ipv4/{name}" for name, value in sysctls.items())
        self.run("sh", "-c", settings)
        self._join()

    def _join(self) -> None:
        command("ip", "link", "add", WIRE, "type", "veth", "peer", "name", WIRE, "netns", self.path)
        for run, last in ((self.run, 0), (command, 1)):
            for *hosts, length in ADDRESSES.values():
                dad = ["nodad"] if ":" in str(hosts[0]) else []
                run("ip", "address", "add", f"{hosts[last]}/{length}", "dev", WIRE, *dad)
            run("ip", "link", "set", WIRE, "up")
        for _, host, _ in ADDRESSES.values():  # else the first SYN waits for an answer
            self.run("ip", "neigh", "replace", host, "lladdr", mac_of(WIRE).hex(":"), "dev", WIRE, "nud", "permanent")

    @property
    def enter(self) -> List[str]:
        """The words to put before a command to run it there."""
        return ["nsenter", f"--net={self.path}"]

    def run(self, *words: str, given: str = "") -> str:
        """Run a command there; its output. Failed, with what it said, if it fails."""
        return command(*self.enter, *words, given=given)

    def mac(self) -> bytes:
        """The hardware address of its end of the wire."""
        text = self.run("ip", "-brief", "link", "show", WIRE)
        return bytes.fromhex(text.split()[2].replace(":", ""))

    def go_there(self) -> None:
        """Move this thread into it, for good (setns(2))."""
        libc = ctypes.CDLL(None, use_errno=True)
        there = os.open(self.path, os.O_RDONLY)
        if libc.setns(there, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
        os.close(there)

    def close(self) -> None:
        """Give it up."""
        self._holder.communicate()


def command(*words: str, given: str = "") -> str:
    """Run a command here."""
    done = subprocess.run(words, input=given, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(f"{' '.join(words)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout
