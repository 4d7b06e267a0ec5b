"""`demo`: a client, a real tsproxy and an exchange on this host, and what the kernel says of the two legs between them.

A child process leaves for a network namespace where timestamps stay on, makes the listener and the client's socket
there, moves on to one with net.ipv4.tcp_timestamps=0, and starts tsproxy and the exchange there: sockets stay in the
namespace that they were made in. Where namespaces are forbidden the same runs here with --timestamps=preserve.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import sys
import traceback
from typing import Any, Callable, Dict, Iterator

from _tsproxy.cli import exits
from _tsproxy.cli.exits import Exit
from _tsproxy.linux import namespaces, sockets
from _tsproxy.linux.addresses import Address
from _tsproxy.linux.children import Child
from _tsproxy.linux.sockets import Tuning
from _tsproxy.policy.sysctl import PATH
from _tsproxy.policy.witness import NoWitness
from _tsproxy.tools import demo_picture, terminal
from _tsproxy.tools.demo_trade import Trouble, trade

Facts = Dict[str, Any]
_LOOPBACK = Address(socket.AF_INET, "127.0.0.1", 0)
_GRACE_S = 5.0  # the child needs up to three seconds to end its own child
# What may be in the way: the file, what it reads then, and what an administrator could say instead
_SWITCHES = (
    ("user/max_user_namespaces", "0", "sysctl -w user.max_user_namespaces=10000"),
    ("user/max_net_namespaces", "0", "sysctl -w user.max_net_namespaces=10000"),
    ("kernel/unprivileged_userns_clone", "0", "sysctl -w kernel.unprivileged_userns_clone=1"),
    ("kernel/apparmor_restrict_unprivileged_userns", "1", "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"),
)
_SANDBOX = "let this container or user call unshare(2) (seccomp, AppArmor or SELinux), or run the demo as root"


def run() -> int:
    """Show it and end by itself; 0, whether or not namespaces are allowed. Exit 1 if tsproxy could not be started."""
    facts = _in_a_child(_strip)
    if "forbidden" in facts:
        print(f"tsproxy demo: {facts['forbidden']}\n", flush=True)
        facts = _in_a_child(_preserve)
    if "trouble" in facts:
        raise Exit(exits.FAILED, f"demo: {facts['trouble']}")
    print(demo_picture.draw(facts, terminal.style_of(sys.stdout)), flush=True)
    return exits.DRAINED


# The two ways to show it


def _strip() -> Facts:
    """Two namespaces of our own."""
    with _forbidden("no private network namespace"):
        namespaces.new_network_namespace()
    namespaces.set_parent_death_signal(signal.SIGTERM)  # only now: a new user namespace may take the setting away
    with _forbidden("the loopback interface of a new network namespace can't be raised"):
        namespaces.set_loopback_up()
    with sockets.listener(_LOOPBACK, 16, Tuning()) as listener:
        return trade(listener, "strip", _move_on)


def _move_on() -> None:
    """From the client's namespace to the exchange's."""
    with _forbidden("no second network namespace"):
        namespaces.unshare_network()
        namespaces.set_loopback_up()
    with _forbidden(f"{PATH} of a new network namespace can't be written"), open(PATH, "w", encoding="ascii") as sysctl:
        sysctl.write("0")


def _preserve() -> Facts:
    """No namespace: all three live here, and timestamps are only detected."""
    namespaces.set_parent_death_signal(signal.SIGTERM)
    if not namespaces.is_up("lo"):
        raise Trouble("the loopback interface is down; to raise it: ip link set lo up")
    with sockets.listener(_LOOPBACK, 16, Tuning()) as listener:
        return trade(listener, "preserve", lambda: None)


class _Forbidden(Exception):
    """The kernel or the administrator says no; the text says to what, why, and what would allow it."""


@contextlib.contextmanager
def _forbidden(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        why = f"{what}: {error.strerror or error}"
        raise _Forbidden(f"{why}; an administrator could {_advice(error.errno)}. Shown with preserve instead.") from None


def _advice(number: Any) -> str:
    """What would allow it: the switch that is off here, or what is commonly in the way."""
    for path, off, command in _SWITCHES:
        if _read(f"/proc/sys/{path}") == off:
            return f"run: {command}"
    return "mount /proc/sys writable" if number == errno.EROFS else _SANDBOX


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""


# The child


def _in_a_child(show: Callable[[], Facts]) -> Facts:
    """What `show` returned in a process of its own, since a namespace can't be left again. Nothing of it outlives this."""
    sys.stdout.flush()
    sys.stderr.flush()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _be_the_child(show, writer)
    child = Child(pid)
    os.close(writer)
    try:
        with os.fdopen(reader, "rb") as pipe:
            said = pipe.read()
        child.has_exited(_GRACE_S)
    finally:
        child.terminate(_GRACE_S)
    facts: Facts = json.loads(said) if said else {"trouble": "its child process ended without a word"}
    return facts


def _be_the_child(show: Callable[[], Facts], writer: int) -> None:
    """Never returns. In a process group of its own: a terminal's Ctrl-C is for the parent, which ends us in order."""
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGTERM, _raise_end)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.write(writer, json.dumps(_facts(show)).encode())
    except SystemExit:
        pass  # told to end; what was open is closed by now
    except BaseException:
        traceback.print_exc()  # a bug: said in full here, since the parent's own work must not go on in this process
    finally:
        os._exit(0)


def _raise_end(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # putting things away is not to be interrupted again
    raise SystemExit


def _facts(show: Callable[[], Facts]) -> Facts:
    try:
        return show()
    except _Forbidden as no:
        return {"forbidden": str(no)}
    except (Trouble, NoWitness) as trouble:
        return {"trouble": str(trouble)}
    except OSError as error:
        return {"trouble": error.strerror or str(error)}
