"""The listening sockets: inherited, or one that is bound here. Refuses those by which tsproxy would connect to itself.

Knows addresses, inherited descriptors and the options that limit clients. Knows nothing of accepting.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
from typing import Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from _tsproxy.cli import exits
from _tsproxy.cli.config import Route
from _tsproxy.cli.exits import Exit
from _tsproxy.linux import privileges, reuseport, sockets, systemd
from _tsproxy.linux.addresses import Address, from_sockaddr
from _tsproxy.linux.needs import needing
from _tsproxy.linux.sockets import Tuning
from _tsproxy.supervisor.worker_args import tuning_of

_BACKLOG = 4096  # the kernel takes the smaller of this and net.core.somaxconn
_SANDBOX = " (does a sandbox refuse socket(2), setsockopt(2), bind(2) or listen(2)? SECURITY.md lists the system calls)"
_HINTS = {
    errno.EADDRINUSE: " (ss -ltnp shows by whom; --reuse-port shares a port)",
    errno.EACCES: " (ports below 1024 need root; --user drops it after binding)",
    errno.EADDRNOTAVAIL: " (--bind takes an address of this host)",
    errno.EPERM: _SANDBOX,
    errno.ENOSYS: _SANDBOX,
}
_HINTS_LATER = {
    **_HINTS,
    errno.EADDRINUSE: " (ss -ltnp shows by whom)",
    errno.EACCES: " (ports below 1024 need root: that takes a restart)",
}
_ANY: Dict[int, str] = {socket.AF_INET: "0.0.0.0", socket.AF_INET6: "::"}
_LOOPBACK: Dict[int, str] = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}


class Ends(NamedTuple):
    """What a route connects to, and from which addresses of --source."""

    upstreams: Sequence[Address]
    sources: Sequence[Address]


def listeners(
    route: Route,
    reuse_port: bool,
    ends: Ends,
    handed: Sequence[socket.socket] = (),
    *,
    sharer: Optional[int] = None,
    starts: bool = True,
) -> List[socket.socket]:
    """The sockets that were handed over for the route, or a new one, each with TCP_SAVE_SYN. Exit 2 or 69 if there is none.

    A new one is bound: listen() is for when nothing else can fail. `sharer`: the user, root becomes whom later, whose port it
    may be. Not `starts`: it relays already, and no option of the process may be given any more.
    """
    ours = (*route.listen_options, *(["--reuse-port"] if reuse_port else []))
    if handed and ours:
        raise Exit(exits.USAGE, f"{ours[0]}: given with LISTEN_FDS; allowed: only without inherited listeners")
    found = [_prepared(listener, route, ends) for listener in handed] or [_own(route, reuse_port, ends, sharer, starts)]
    for listener in found:
        sockets.save_syns(listener)
    return found


def listen(found: Iterable[socket.socket], reuse_port: bool, *, starts: bool = True) -> None:
    """Have new sockets listen; those that do are left alone. Exit 69 if another one has come to listen there since bind(2).

    On a shared port (SO_REUSEPORT) the kernel sends clients there from now on, and close(2) would reset them, though another
    instance serves that port.
    """
    for listener in found:
        with needing("getsockopt(2) or getsockname(2)", "to listen"):
            listens = listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            address = from_sockaddr(listener.family, listener.getsockname())
        if not listens:
            with _naming(address, starts):
                listen_again(listener)
            if reuse_port:
                reuseport.attach(listener)


def inherited(environment: Mapping[str, str]) -> Dict[str, List[socket.socket]]:
    """The sockets that a service manager has handed over, by name. Exit 2 if one is no listener."""
    found: Dict[str, List[socket.socket]] = {}
    try:
        for handed in systemd.inherited(environment, os.getpid()):
            found.setdefault(handed.name, []).append(systemd.listener_from(handed))
    except systemd.BadHandover as problem:
        raise Exit(exits.USAGE, str(problem)) from None
    return found


def family_of(ip: str) -> int:
    """The address family of a bare address."""
    return socket.AF_INET6 if ":" in ip else socket.AF_INET


def is_local(address: Address, interface: str = "") -> bool:
    """Whether it is an address of this network namespace, or of a socket that is bound to `interface`: bind(2) takes it."""
    try:
        with socket.socket(address.family, socket.SOCK_STREAM) as probe:
            if interface:
                sockets.bind_to_interface(probe, interface)
            probe.bind(address._replace(port=0).sockaddr)
    except OSError:  # or socket(2) does not have the family
        return False
    return True


def unbounded(route: Route, found: Sequence[socket.socket]) -> Optional[str]:
    """The warning for a listener that other hosts can reach, where no option limits one client; None if there is no need."""
    if route.max_connections_per_client or route.idle_timeout_s or route.allow:
        return None
    addresses = [from_sockaddr(listener.family, listener.getsockname()) for listener in found]
    reachable = [str(address) for address in addresses if not ipaddress.ip_address(address.ip).is_loopback]
    if not reachable:
        return None
    return (
        f"one client of {', '.join(reachable)} can hold all {route.max_connections} connections for ever: "
        "missing --max-connections-per-client, --idle-timeout or --allow"
    )


def _prepared(listener: socket.socket, route: Route, ends: Ends) -> socket.socket:
    """A socket that was handed over, as one of our own would be."""
    refuse_loop(listener, ends)
    reuse(listener, route)
    return listener


def reuse(listener: socket.socket, route: Route) -> None:
    """Set the options for what it accepts from now on."""
    sockets.reset_inherited_options(listener)
    tuning_of(route).apply(listener)


def _own(route: Route, reuse_port: bool, ends: Ends, sharer: Optional[int], starts: bool) -> socket.socket:
    address = Address(family_of(route.bind), route.bind, route.port)
    _refuse_loop(address, True, ends)
    with _naming(address, starts):
        return _bound(address, tuning_of(route), reuse_port, sharer)


def _bound(address: Address, tuning: Tuning, reuse_port: bool, sharer: Optional[int]) -> socket.socket:
    """Bound by this user; or by the sharer, whose port it is where a reload of another instance has bound it, after --user."""
    try:
        return sockets.bound(address, tuning, reuse_port)
    except OSError as error:
        if reuse_port and sharer is not None and error.errno == errno.EADDRINUSE:
            with contextlib.suppress(OSError), privileges.acting_as(sharer):
                return sockets.bound(address, tuning, reuse_port)
        raise


@contextlib.contextmanager
def _naming(address: Address, starts: bool) -> Iterator[None]:
    """Exit 69, with the address and what helps, for an OSError of bind(2) or listen(2)."""
    try:
        yield
    except OSError as error:
        hint = (_HINTS if starts else _HINTS_LATER).get(error.errno or 0, "")
        option = "bind" if error.errno == errno.EADDRNOTAVAIL else "port"
        raise Exit(exits.CANNOT_BIND, f"can't listen on {address}: {error.strerror}{hint}", option) from None


def rest(listener: socket.socket) -> None:
    """Listen no more, but stay bound: others with SO_REUSEADDR may listen there. Who is in the backlog is reset.

    shutdown(2) of a listener leaves it its address and port (SOCK_BINDADDR_LOCK and SOCK_BINDPORT_LOCK, net/ipv4/tcp.c). After
    close(2) a port below 1024 could not be had again without root's rights, nor any port without a descriptor.
    """
    listener.shutdown(socket.SHUT_RD)


def listen_again(listener: socket.socket) -> None:
    """After rest(). OSError (EADDRINUSE) if another one listens there."""
    listener.listen(_BACKLOG)


def refuse_loop(listener: socket.socket, ends: Ends) -> None:
    """Exit 2 for a target that is this listener."""
    refuse_loops(reachable([listener]), ends)


def reachable(found: Iterable[socket.socket]) -> Dict[int, List[Tuple[Address, bool]]]:
    """The listeners that a target may be, by port: each one's address, and whether it takes IPv4 too."""
    own: Dict[int, List[Tuple[Address, bool]]] = {}
    for listener in found:
        if sockets.shares_our_namespace(listener):
            address = from_sockaddr(listener.family, listener.getsockname())
            own.setdefault(address.port, []).append((address, sockets.accepts_ipv4(listener)))
    return own


def refuse_loops(own: Mapping[int, Sequence[Tuple[Address, bool]]], ends: Ends) -> None:
    """Exit 2 for a target that is one of these listeners."""
    for upstream in ends.upstreams:
        for address, takes_ipv4 in own.get(upstream.port, ()):
            _refuse_loop(address, takes_ipv4, Ends([upstream], ends.sources))


def _refuse_loop(listening: Address, takes_ipv4: bool, ends: Ends) -> None:
    """Exit 2 for a target that is the listener itself: each client would connect on until --max-connections."""
    for upstream in ends.upstreams:
        reached = _reached(upstream, ends.sources) if upstream.port == listening.port else ()
        if any(_takes(listening, takes_ipv4, end) for end in reached):
            raise Exit(exits.USAGE, f"--target: given {str(upstream)!r}; allowed: any address but tsproxy's own", "target")


def _reached(upstream: Address, sources: Sequence[Address]) -> Iterator[Address]:
    """The addresses that connect(2) may reach. For 0.0.0.0 and :: its loopback address or, in IPv4, the bound source.

    (tcp_v6_connect() and ip_route_output_key_hash_rcu() in net/.)
    """
    if upstream.ip != _ANY[upstream.family]:
        yield upstream
        return
    yield upstream._replace(ip=_LOOPBACK[upstream.family])
    yield from (source for source in sources if source.family == upstream.family)


def _takes(listening: Address, takes_ipv4: bool, end: Address) -> bool:
    """Whether connect(2) to `end` reaches the listener, if the ports are the same."""
    if listening.ip == _ANY[listening.family]:
        return (end.family == listening.family or (takes_ipv4 and end.family == socket.AF_INET)) and is_local(end)
    return listening.ip == end.ip and (listening.scope == end.scope or not (listening.scope and end.scope))
