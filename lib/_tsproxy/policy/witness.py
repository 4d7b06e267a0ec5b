"""The SYN witness: what this kernel really puts into a SYN from a socket like the upstream ones, read back on loopback.

TCP_INFO can't show it: it says what was negotiated, and a peer may refuse what our SYN has leaked. So a socket with
the same tags connects to an own listener that keeps the SYN (TCP_SAVE_SYN). It sees the sysctl and rules in the output
path; it does not see rules on addresses, other interfaces, or what happens behind this namespace.

Each look has a listener of its own, on an address and port that nobody could know before, and one deadline for all it
does. So another user of the host can neither fill it nor make it late; at worst it is not seen.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import time
from socket import SocketType
from typing import Dict, Iterator, TypeVar

from _tsproxy.linux import namespaces, sockets, uapi
from _tsproxy.linux.addresses import Address, from_sockaddr
from _tsproxy.linux.sockets import Tuning
from _tsproxy.policy import syn
from _tsproxy.policy.syn import Syn

_NO_FAMILY = frozenset({errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.ENETUNREACH})
_NO_HOME = frozenset({errno.EADDRNOTAVAIL, errno.ENETUNREACH, errno.EHOSTUNREACH})
_COOKIES = "sysctl -w net.ipv4.tcp_syncookies=1"  # with 2 no SYN is kept


class NoWitness(Exception):
    """The witness could not be made; the text says why. `fix` is the command that would help, "" if none is known."""

    def __init__(self, why: str, fix: str = "") -> None:
        super().__init__(why)
        self.fix = fix


class FamilyAbsent(NoWitness):
    """No interface of this network namespace has an address of the family, so nothing can be sent over it either."""


def saved(family: int, until: float) -> Syn:
    """The SYN of one upstream-like socket as it left just now. NoWitness if that can't be seen by `until` (monotonic).

    OSError where there is no descriptor or memory for it (EMFILE and friends): that tells nothing of timestamps.
    """
    with explained(family), listening(family) as listener:
        sockets.save_syns(listener)
        with closing(ours(family)) as client:
            connect(client, from_sockaddr(family, listener.getsockname()))
            return _accepted(listener, client.getsockname(), until)


@contextlib.contextmanager
def explained(family: int) -> Iterator[None]:
    """Turns what may go wrong with sockets on loopback into NoWitness with the reason."""
    try:
        yield
    except OSError as error:
        if error.errno in uapi.CAPACITY:
            raise
        raise _reason(family, error) from None
    except syn.Malformed as problem:
        raise NoWitness(f"the kernel kept no SYN that can be read: {problem}", _COOKIES) from None


def _reason(family: int, error: OSError) -> NoWitness:
    if not _is_lo_up():
        return NoWitness(f"the loopback interface is down ({error.strerror})", "ip link set lo up")
    if family == socket.AF_INET6 and error.errno in _NO_FAMILY and not namespaces.has_ipv6():
        return FamilyAbsent("no interface has an IPv6 address here, so nothing can be sent over IPv6")
    if error.errno in _NO_HOME:
        return NoWitness(f"the loopback interface has no {_HOMES[family]} ({error.strerror})", _raising(family))
    late = "; does a packet filter drop what passes on lo?" if error.errno == errno.ETIMEDOUT else ""
    return NoWitness(f"the witness connection on loopback failed: {error.strerror or error}{late}")


def _raising(family: int) -> str:
    """The command that gives lo its address."""
    if family == socket.AF_INET6 and namespaces.is_ipv6_off("lo"):
        return "sysctl -w net.ipv6.conf.lo.disable_ipv6=0"
    return f"ip address add {_HOMES[family]}/{128 if family == socket.AF_INET6 else 8} dev lo"


def _is_lo_up() -> bool:
    try:
        return namespaces.is_up(namespaces.loopback())
    except OSError:
        return False


def _accepted(listener: socket.socket, ours: object, until: float) -> Syn:
    """The SYN of our own connection; what somebody else sent to the port is closed and passed over."""
    while wait(listener, select.POLLIN, until):
        accepted, peer = listener.accept()
        with closing(accepted):
            if peer == ours:
                return syn.parse(sockets.saved_syn(accepted))
    raise TimeoutError(errno.ETIMEDOUT, "it was not accepted in time")


# What other looks at loopback stand on as well

_HOMES: Dict[int, str] = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}


@contextlib.contextmanager
def listening(family: int, backlog: int = 16) -> Iterator[socket.socket]:
    """A listener of our own, closed at the end, where nobody expects one."""
    with contextlib.closing(_bound(family)) as sock:
        sock.listen(backlog)
        yield sock


def _bound(family: int) -> socket.socket:
    """A port of the kernel's choice, on IPv4 at one of 16 million addresses; at 127.0.0.1 where lo has no others."""
    high, middle, low = os.urandom(3)
    anywhere = f"127.{high}.{middle}.{low % 254 + 1}"
    for ip in (anywhere, _HOMES[family]) if family == socket.AF_INET else (_HOMES[family],):
        sock = reusing(family)
        try:
            sock.bind(Address(family, ip, 0).sockaddr)
            return sock
        except OSError as error:
            sock.close()
            failure = error
    raise failure


def ours(family: int) -> SocketType:
    """A socket like the upstream ones, that can reach loopback alone."""
    return _kept_in(sockets.dial(family, Tuning(), None, for_rules=True))


def reusing(family: int) -> socket.socket:
    """An ordinary one that may take an address over from one just closed, and can reach loopback alone."""
    return _kept_in(sockets.reusing(family))


_Sock = TypeVar("_Sock", bound=SocketType)


def _kept_in(sock: _Sock) -> _Sock:
    """Bind it to lo: an address that lo has not would be looked for elsewhere, with the SYN that must not leave.

    Without a right before Linux 5.7: then bind(2) and the routes decide, as they do for everybody (ip_nonlocal_bind).
    """
    with contextlib.suppress(PermissionError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, os.fsencode(namespaces.loopback()) + b"\0")
    return sock


@contextlib.contextmanager
def closing(sock: SocketType) -> Iterator[SocketType]:
    """Close with a reset at the end, unless it is closed by then: nothing of a look stays in TIME_WAIT."""
    try:
        yield sock
    finally:
        if sock.fileno() >= 0:
            sockets.reset_on_close(sock)
            sock.close()


def connect(sock: SocketType, to: Address) -> None:
    """Begin the handshake. OSError as it comes, but for what only says that the answer is not here yet."""
    code = sock.connect_ex(to.sockaddr)
    if code and code not in uapi.RETRY:
        raise OSError(code, os.strerror(code))


def wait(sock: SocketType, events: int, until: float) -> bool:
    """poll(2) for an event, or an error of the socket; False if none came in time."""
    poller = select.poll()
    poller.register(sock, events)
    return bool(poller.poll(max(0.0, until - time.monotonic()) * 1000))
