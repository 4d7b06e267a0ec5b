"""The connections that `check` makes to the targets, and what of them leaves this host.

Each is made as a worker makes it, by the same gate, and closed in order. Those of one route follow one another, as for a
client; those of different routes are made at the same time, so that thirty routes which nobody answers take as long as one.
One capture watches them all. Knows gates, sockets and the capture. Knows nothing of what it means for a host.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

from _tsproxy.capture.outgoing import Capture, Seen
from _tsproxy.cli.config import Route
from _tsproxy.linux import sockets, uapi, wakeup
from _tsproxy.linux.addresses import Address
from _tsproxy.policy.evidence import FAMILY_NAMES, Answer, Evidence
from _tsproxy.policy.gates import LeverGate, gate_for
from _tsproxy.policy.inspector import PolicyCheck
from _tsproxy.policy.levers import MONITORED, Lever, Policy
from _tsproxy.supervisor.host_policy import HostPolicy
from _tsproxy.supervisor.worker_args import egress_of
from _tsproxy.tools.check_report import Connection

_FOLLOW_S = 2.0  # how long the wire is watched after the connections were closed
_AT_ONCE = 256  # connections that are being made; a process may have 1024 descriptors
_CHANGED = "the policy does not hold any more"


class Attempt(NamedTuple):
    """One connection: how it went, what was seen of it on the wire, and whether tsproxy would have relayed on it."""

    connection: Connection
    seen: List[Seen]
    blind: str  # why the wire was not watched; "" if it was
    lost: int = 0  # packets that the capture dropped, of whichever connection


class Errand(NamedTuple):
    """The addresses to try for a route, and what its policy rests on."""

    route: Route
    addresses: Sequence[Address]
    policy: Policy
    policy_check: PolicyCheck


def attempts(errands: Sequence[Errand], host: HostPolicy) -> List[List[Attempt]]:
    """For each errand, one for each address; none is made where the policy does not hold. `host` has checked the policies."""
    made = [errand for errand in errands if errand.policy_check.lever is not None]
    with contextlib.ExitStack() as stack:
        capture, blind = _capture([address for errand in made if not errand.policy.trusted for address in errand.addresses])
        if capture:
            stack.callback(capture.close)
        callers = {
            errand.policy: stack.enter_context(contextlib.closing(_Caller(errand, host))) for errand in _of_each_policy(made)
        }
        tries = _tries(made, callers)
        left = _Left.of([one for some in tries for one in some], capture)
        tried = {errand.route.name: some for errand, some in zip(made, tries)}
        return [_attempts(errand, tried.get(errand.route.name), left, blind) for errand in errands]


def _of_each_policy(errands: Sequence[Errand]) -> List[Errand]:
    """The first errand of each policy."""
    return list({errand.policy: errand for errand in reversed(errands)}.values())


def _attempts(errand: Errand, tries: Optional[List[_Try]], left: _Left, blind: str) -> List[Attempt]:
    """Each connection with all that left for it, to its end and for some time after it: FIN, answers to the far end's."""
    if tries is None:
        not_tried = [Connection(str(address), "not tried", "its SYN would be the leak") for address in errand.addresses]
        return [Attempt(connection, [], "no SYN was sent") for connection in not_tried]
    if errand.policy.trusted:
        return [Attempt(one.connection, [], "with --trust-host it is changed where this host can't see it") for one in tries]
    seen = [left.of_try(one) for one in tries]
    return [
        Attempt(one.connection, some, blind or ("" if some else _unseen(one, left.lost)), left.lost)
        for one, some in zip(tries, seen)
    ]


# The connections


class _Try(NamedTuple):
    """How one connection went, and its own end of it, if there was one."""

    connection: Connection
    target: Address
    ours: Tuple[object, ...] = ()


def _tries(errands: Sequence[Errand], callers: Dict[Policy, _Caller]) -> List[List[_Try]]:
    """For each errand its connections. In a turn each has its next one, at the same time as the others'."""
    tries: List[List[_Try]] = [[] for _ in errands]
    for turn in range(max((len(errand.addresses) for errand in errands), default=0)):
        due = [number for number, errand in enumerate(errands) if turn < len(errand.addresses)]
        for some in (due[at : at + _AT_ONCE] for at in range(0, len(due), _AT_ONCE)):
            for caller in callers.values():
                caller.forget()
            begun = [callers[errands[n].policy].begin(errands[n].route, errands[n].addresses[turn]) for n in some]
            for number, one in zip(some, _ended(begun)):
                tries[number].append(one)
    return tries


class _Caller:
    """Connects for the routes of one policy, by the gate that their workers would have."""

    def __init__(self, errand: Errand, host: HostPolicy) -> None:
        lever = errand.policy_check.lever or Lever.NONE
        self._inspector, self._lever, self._evidence = host.inspector, lever, Evidence.create()
        self._asked = {family: wakeup.create() for family in FAMILY_NAMES}
        self._gate = gate_for(lever, errand.policy, self._evidence, self._asked, for_rules=host.for_rules)

    def begin(self, route: Route, address: Address) -> Union[_Try, _Call]:
        """Send the SYN. What stands in the way of one connection is told, not raised."""
        obstacle = self._obstacle(address.family)
        if obstacle:
            return _Try(Connection(str(address), "not tried", obstacle), address)
        try:
            source = _source(route, address.family)
            sock = sockets.dial(address.family, source, self._gate.for_rules, egress_of(route), self._gate.tagged)
        except OSError as error:
            return _Try(Connection(str(address), "failed", error.strerror or str(error)), address)
        call = _Call(sock, address, self._gate, route.connect_timeout_s)
        return call if call.is_pending else call.end(True)

    def forget(self) -> None:
        """What was found before does not count any more."""
        for family in FAMILY_NAMES:
            self._evidence.publish(family, Answer.NEVER, 0)

    def _obstacle(self, family: int) -> str:
        """What stands in the way of a SYN, "" if nothing does. Looks anew where the gate asks for it, as for any connect()."""
        problem = "" if self._gate.may_connect(family) or self._lever not in MONITORED else self._look(family)
        return problem or ("" if self._gate.may_connect(family) else _CHANGED)

    def _look(self, family: int) -> str:
        began = time.monotonic_ns()
        policy_check = self._inspector.check((family,))
        answer = policy_check.answer(family, self._lever)
        self._evidence.publish(family, answer, began)
        found = policy_check.families.get(family)
        return "" if answer is Answer.HOLDS else (found.problem if found else policy_check.problem) or _CHANGED

    def close(self) -> None:
        """Close what the gate would have woken the monitors with."""
        for wake in self._asked.values():
            wake.close()


class _Call:
    """A connection that is being made."""

    def __init__(self, sock: socket.SocketType, target: Address, gate: LeverGate, timeout_s: float) -> None:
        self._sock, self._target, self._gate, self._timeout_s = sock, target, gate, timeout_s
        self._begun_ns = time.monotonic_ns()
        self._number = sock.connect_ex(target.sockaddr)  # without a route this is all there is
        self._ours = sock.getsockname()
        self.deadline = time.monotonic() + timeout_s

    @property
    def is_pending(self) -> bool:
        """Whether an answer may come."""
        return self._number in uapi.RETRY

    def fileno(self) -> int:
        """For poll(2)."""
        return self._sock.fileno()

    def end(self, answered: bool) -> _Try:
        """Say how it went, and close it in order."""
        with contextlib.closing(self._sock):
            return _Try(self._outcome() if answered else self._timed_out(), self._target, self._ours)

    def _timed_out(self) -> Connection:
        return Connection(str(self._target), "timed out", f"no answer within {self._timeout_s:g} s")

    def _outcome(self) -> Connection:
        number = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) if self.is_pending else self._number
        if number:
            return Connection(str(self._target), "failed", os.strerror(number))
        took_us = (time.monotonic_ns() - self._begun_ns) // 1000
        info = sockets.tcp_info(self._sock)
        what = "timestamps negotiated" if info.timestamps else "no timestamps negotiated"
        relays = self._gate.may_relay(self._sock, info)
        return Connection(str(self._target), "connected", what, took_us, info.timestamps, relays)


def _ended(begun: Sequence[Union[_Try, _Call]]) -> List[_Try]:
    """All of them, when each is connected, has failed, or has timed out."""
    poller, waiting, ended = select.poll(), {}, {}
    for number, one in enumerate(begun):
        if isinstance(one, _Call):
            waiting[one.fileno()] = (number, one)
            poller.register(one.fileno(), select.POLLOUT)
        else:
            ended[number] = one
    while waiting:
        timeout_s = min(call.deadline for _, call in waiting.values()) - time.monotonic()
        answered = {fd for fd, _ in poller.poll(max(0.0, timeout_s) * 1000)}
        now = time.monotonic()
        for fd, (number, call) in list(waiting.items()):
            if fd in answered or call.deadline <= now:
                poller.unregister(fd)
                del waiting[fd]
                ended[number] = call.end(fd in answered)
    return [ended[number] for number in range(len(begun))]


def _source(route: Route, family: int) -> Optional[Address]:
    """The first --source of that family."""
    return next((Address(family, ip, 0) for ip in route.sources if (":" in ip) == (family == socket.AF_INET6)), None)


# The wire


def _capture(addresses: Sequence[Address]) -> Tuple[Optional[Capture], str]:
    """The tap, or None and why there is none."""
    if not addresses:
        return None, ""
    try:
        return Capture({address.port for address in addresses}), ""
    except PermissionError:
        return None, f"that takes CAP_NET_RAW, which uid {os.geteuid()} does not have here: run check as root once"
    except OSError as error:
        return None, f"no packet socket here: {error.strerror or error}"


class _Left(NamedTuple):
    """What left this host, by the source port, and how many packets the capture dropped."""

    by_port: Dict[object, List[Seen]]
    lost: int

    @classmethod
    def of(cls, tries: Sequence[_Try], capture: Optional[Capture]) -> _Left:
        """What left so far; where one of our SYNs did, what follows as well: one that was given up may still be answered."""
        left = cls({}, 0)
        if capture is None:
            return left
        left._add(capture.take())
        if any(left.of_try(one) for one in tries):
            time.sleep(_FOLLOW_S)
            left._add(capture.take())
        return left._replace(lost=capture.lost())

    def _add(self, segments: Sequence[Seen]) -> None:
        for segment in segments:
            self.by_port.setdefault(segment.source.port, []).append(segment)

    def of_try(self, one: _Try) -> List[Seen]:
        """The segments of that connection. A packet filter may have changed one of the addresses."""
        if not one.ours:
            return []
        ours, theirs = one.ours[0], one.target._replace(scope=0)
        return [seen for seen in self.by_port.get(one.ours[1], ()) if seen.source.ip == ours or seen.destination == theirs]


def _unseen(one: _Try, lost: int) -> str:
    if not one.ours:
        return "no SYN was sent"
    return "its SYN may be among the packets that were dropped" if lost else "no SYN left"
