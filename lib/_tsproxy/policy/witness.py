"""The SYN witness: the options that this kernel sends in a SYN from a socket like the upstream ones, read back on loopback.

TCP_INFO can't show them: it says what was negotiated, and a peer may decline what our SYN has leaked. So a socket with the
same tags connects to a listener of our own that saves the SYN (TCP_SAVE_SYN). This shows the effect of the sysctl and of rules
in the output path; not of rules for addresses or other interfaces, or of anything outside this namespace.

Each call has a listener of its own, on an address and port that can't be guessed, and one deadline. So another user of the host
can neither fill its backlog nor delay it; at worst the result is NoWitness.
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
from _tsproxy.policy import syn
from _tsproxy.policy.syn import Syn

_FAMILY_ERRNOS = frozenset({errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.ENETUNREACH})
_NO_LOOPBACK_ADDRESS = frozenset({errno.EADDRNOTAVAIL, errno.ENETUNREACH, errno.EHOSTUNREACH})
_COOKIES = "sysctl -w net.ipv4.tcp_syncookies=1"  # with 2 the kernel saves no SYN


class NoWitness(Exception):
    """No witness SYN could be captured; the text says why. `fix` is the command that would help, "" if none is known."""

    def __init__(self, why: str, fix: str = "") -> None:
        super().__init__(why)
        self.fix = fix


class FamilyAbsent(NoWitness):
    """No interface of this network namespace has an address of the family, so nothing can be sent over it either."""


def capture_syn(family: int, deadline: float) -> Syn:
    """Send and capture the SYN of one upstream-like socket. NoWitness if that fails, or takes beyond `deadline` (monotonic).

    OSError without a descriptor or memory for it (EMFILE, ENFILE, ENOBUFS, ENOMEM), which says nothing of timestamps.
    """
    with raising_no_witness(family), listening(family) as listener:
        sockets.save_syns(listener)
        with closing_by_reset(upstream_like(family)) as client:
            connect(client, from_sockaddr(family, listener.getsockname()))
            return _accept_own(listener, client.getsockname(), deadline)


@contextlib.contextmanager
def raising_no_witness(family: int) -> Iterator[None]:
    """Turn an OSError of sockets on loopback into NoWitness with the reason; not EMFILE and the other errnos of CAPACITY."""
    try:
        yield
    except OSError as error:
        if error.errno in uapi.CAPACITY:
            raise
        raise _no_witness(family, error) from None
    except syn.Malformed as problem:
        raise NoWitness(f"the kernel kept no SYN that can be read: {problem}", _COOKIES) from None


def _no_witness(family: int, error: OSError) -> NoWitness:
    if not _is_lo_up():
        return NoWitness(f"the loopback interface is down ({error.strerror})", "ip link set lo up")
    if family == socket.AF_INET6 and error.errno in _FAMILY_ERRNOS and not namespaces.has_ipv6():
        return FamilyAbsent("no interface has an IPv6 address here, so nothing can be sent over IPv6")
    if error.errno in _NO_LOOPBACK_ADDRESS:
        return NoWitness(f"the loopback interface has no {_LOOPBACK[family]} ({error.strerror})", _address_command(family))
    late = "; does a packet filter drop what passes on lo?" if error.errno == errno.ETIMEDOUT else ""
    return NoWitness(f"the witness connection on loopback failed: {error.strerror or error}{late}")


def _address_command(family: int) -> str:
    """The command that adds its address to lo."""
    if family == socket.AF_INET6 and namespaces.is_ipv6_off("lo"):
        return "sysctl -w net.ipv6.conf.lo.disable_ipv6=0"
    return f"ip address add {_LOOPBACK[family]}/{128 if family == socket.AF_INET6 else 8} dev lo"


def _is_lo_up() -> bool:
    """OSError if there is no descriptor to look with."""
    try:
        return namespaces.is_up(namespaces.loopback())
    except OSError as error:
        if error.errno in uapi.CAPACITY:
            raise
        return False


def _accept_own(listener: socket.socket, client_address: object, deadline: float) -> Syn:
    """The SYN of our own connection. Connections from elsewhere to the port are closed and ignored."""
    while poll(listener, select.POLLIN, deadline):
        accepted, peer = listener.accept()
        with closing_by_reset(accepted):
            if peer == client_address:
                return syn.parse(sockets.saved_syn(accepted))
    raise TimeoutError(errno.ETIMEDOUT, "it was not accepted in time")


# Sockets on loopback, for rehearsals as well

_LOOPBACK: Dict[int, str] = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}


@contextlib.contextmanager
def listening(family: int, backlog: int = 16) -> Iterator[socket.socket]:
    """A listener of our own on an address and port that can't be guessed. Closed at the end."""
    with contextlib.closing(_bound(family)) as sock:
        sock.listen(backlog)
        yield sock


def _bound(family: int) -> socket.socket:
    """Bound to a port that the kernel chooses; over IPv4 to one of 16 million addresses, or to 127.0.0.1 if lo has no other."""
    high, middle, low = os.urandom(3)
    anywhere = f"127.{high}.{middle}.{low % 254 + 1}"
    for ip in (anywhere, _LOOPBACK[family]) if family == socket.AF_INET else (_LOOPBACK[family],):
        sock = reuseaddr_socket(family)
        try:
            sock.bind(Address(family, ip, 0).sockaddr)
            return sock
        except OSError as error:
            sock.close()
            failure = error
    raise failure


def upstream_like(family: int) -> SocketType:
    """A socket like the upstream ones, bound to lo."""
    return _bound_to_lo(sockets.dial(family, None, for_rules=True))


def reuseaddr_socket(family: int) -> socket.socket:
    """A plain socket with SO_REUSEADDR, bound to lo."""
    return _bound_to_lo(sockets.reuseaddr_socket(family))


_Sock = TypeVar("_Sock", bound=SocketType)


def _bound_to_lo(sock: _Sock) -> _Sock:
    """Bind it to lo (SO_BINDTODEVICE): a SYN for an address that lo has not would be routed to another interface, and leave.

    EPERM without CAP_NET_RAW before Linux 5.7: then bind(2) and the routes decide, as for any program (ip_nonlocal_bind).
    """
    with contextlib.suppress(PermissionError):
        sockets.bind_to_interface(sock, namespaces.loopback())
    return sock


@contextlib.contextmanager
def closing_by_reset(sock: SocketType) -> Iterator[SocketType]:
    """Close with a reset at the end, unless it is closed by then: no socket of a check stays in TIME_WAIT."""
    try:
        yield sock
    finally:
        if sock.fileno() >= 0:
            sockets.reset_on_close(sock)
            sock.close()


def connect(sock: SocketType, to: Address) -> None:
    """Begin the handshake, without blocking. OSError for any errno but EINPROGRESS and the like."""
    code = sock.connect_ex(to.sockaddr)
    if code and code not in uapi.RETRY:
        raise OSError(code, os.strerror(code))


def poll(sock: SocketType, events: int, deadline: float) -> bool:
    """Wait for an event, or an error of the socket; False if none came in time."""
    poller = select.poll()
    poller.register(sock, events)
    return bool(poller.poll(max(0.0, deadline - time.monotonic()) * 1000))
