"""A far end that misbehaves, rehearsed on loopback: whether packet filter rules also hold where our SYN alone shows nothing.

While the sysctl is not 0, Linux accepts a TSopt that its own SYN did not offer, in a SYN-ACK and in the SYN of a
simultaneous open (RFC 9293, section 3.5), and sends TSopt from then on. In TIME_WAIT it answers with TSopt when the socket,
and conntrack's entry, no longer exist. So rules have to strip it from each segment, and this module checks that.

The rehearsal needs no right. A listener whose backlog is full drops a SYN; then another socket is bound to its address and
sends its own SYN: a simultaneous open, in which Linux offers TSopt whatever it has received. TCP_INFO of either end says what
was negotiated. With the right to attach a filter to a TCP socket (CAP_NET_ADMIN on recent kernels) each segment is checked as
well: first the filter passes only segments that fit the policy, and if none came, only those that do not.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from socket import SocketType
from typing import Callable, Iterator, List, NamedTuple, Optional, Tuple

from _tsproxy.linux import bpf, sockets, uapi
from _tsproxy.linux.addresses import Address, from_sockaddr
from _tsproxy.policy.levers import Policy
from _tsproxy.policy.witness import (
    NoWitness,
    closing_by_reset,
    connect,
    listening,
    poll,
    raising_no_witness,
    reuseaddr_socket,
    upstream_like,
)

MISBEHAVES = "the rules hold for our SYN, but not against a far end that misbehaves"
CROSSING = "a SYN with TSopt while ours is under way"
UNASKED = "a SYN-ACK with TSopt that ours never offered"
RESET = "a reset of such a connection"
TIME_WAIT = "a SYN to a port in TIME_WAIT"
DATA = "data, which carries another timestamp than our SYN"
UNVERIFIED = f"{UNASKED} is taken up, and what is sent then can't be seen without CAP_NET_ADMIN"
_ATTEMPTS = 16  # connections with a random offset, of which half will do
_MIN_BEHIND_MS = 60_000  # that a connection's clock must be behind the constant
_SCENARIO_TIMEOUT_S = 0.1  # loopback answers within microseconds; a SYN that was not answered is sent again after 1 s


class Filter(NamedTuple):
    """Which of our segments the far end's socket receives: those that fit the policy, or those that do not."""

    allowed: Optional[int]
    fitting: bool

    def attach(self, sock: SocketType) -> None:
        """Receive only those from now on. PermissionError without the right to."""
        bpf.attach(sock, bpf.by_timestamp(self.allowed, fitting=self.fitting))


class Scenario(NamedTuple):
    """One thing a far end can do. `run` returns whether our answer passed the filter in time."""

    what: str
    run: Callable[[int, Filter, float], bool]


class Outcome(NamedTuple):
    """The scenario in which a timestamp left that the policy does not allow, "" if none, and whether each segment was seen."""

    leak: str
    saw_segments: bool


def rehearse(family: int, policy: Policy, deadline: float, *, seen_before: bool) -> Outcome:
    """Run all scenarios. `seen_before`: an earlier rehearsal, before a right was dropped, has seen each segment fit.

    NoWitness if a scenario can't be completed by `deadline` (monotonic). OSError without a descriptor or memory.
    """
    allowed = policy.tsval if policy.mode == "rewrite" else None
    with raising_no_witness(family):
        leak, took_up = _check_tcp_info(family, deadline) if allowed is None else ("", False)
        if leak:
            return Outcome(leak, True)
        try:
            return Outcome(_by_segment(family, policy, allowed, deadline), True)
        except PermissionError:
            if allowed is not None:
                return Outcome("" if _sends_constant_tsval(family, allowed, deadline) else DATA, False)
            return Outcome(UNVERIFIED if took_up and not seen_before else "", False)


def scenarios(policy: Policy) -> Tuple[Scenario, ...]:
    """All scenarios for the policy. Under strip no connection with TSopt is relayed, so none reaches TIME_WAIT."""
    always = (Scenario(CROSSING, _answers_a_syn), Scenario(UNASKED, _sends_data), Scenario(RESET, _resets))
    return (*always, Scenario(TIME_WAIT, _answers_from_time_wait)) if policy.mode == "rewrite" else always


def rehearsed(policy: Policy, saw_segments: bool) -> List[str]:
    """What a rehearsal has checked, for people."""
    if saw_segments:
        return [scenario.what for scenario in scenarios(policy)]
    return ["data behind our SYN"] if policy.mode == "rewrite" else [CROSSING, UNASKED]


def _by_segment(family: int, policy: Policy, allowed: Optional[int], deadline: float) -> str:
    return next((scenario.what for scenario in scenarios(policy) if not _fits(scenario, family, allowed, deadline)), "")


def _fits(scenario: Scenario, family: int, allowed: Optional[int], deadline: float) -> bool:
    """Whether the segment that passes a filter fits the policy. Runs again while none comes, as where loopback is slow."""
    while time.monotonic() < deadline:
        for fitting in (True, False):
            with contextlib.suppress(NoWitness):
                if _passes(scenario, family, Filter(allowed, fitting), deadline):
                    return fitting
    raise NoWitness(f"{scenario.what}, rehearsed on loopback: our answer did not come in time")


def _passes(scenario: Scenario, family: int, segment_filter: Filter, deadline: float) -> bool:
    return scenario.run(family, segment_filter, min(deadline, time.monotonic() + _SCENARIO_TIMEOUT_S))


# Checks by TCP_INFO


def _check_tcp_info(family: int, deadline: float) -> Tuple[str, bool]:
    """The scenario in which our SYN-ACK had TSopt, "" if none, and whether our kernel accepted a TSopt it had not offered."""
    with _simultaneous_open(family, deadline, ours_first=True) as (near, far):
        if sockets.tcp_info(far).timestamps:
            return CROSSING, True
        took_up = sockets.tcp_info(near).timestamps
    with _simultaneous_open(family, deadline, ours_first=False) as (near, far):
        return "", took_up or sockets.tcp_info(near).timestamps


def _sends_constant_tsval(family: int, tsval: int, deadline: float) -> bool:
    """Whether data of ours has the same TSval as our SYN, and so not our clock.

    By PAWS (RFC 7323, section 5.3): a receiver drops data whose TSval is older than the SYN's. So use a connection whose
    clock is behind the constant, as it is with half of all random offsets: its data is received only with the constant.
    """
    for _ in range(_ATTEMPTS):
        with listening(family) as listener, closing_by_reset(upstream_like(family)) as near:
            connect(near, _address_of(family, listener))
            if not poll(listener, select.POLLIN, deadline):
                raise NoWitness("a connection on loopback was not accepted in time")
            far, _ = listener.accept()
            with closing_by_reset(far):
                if not _MIN_BEHIND_MS < (tsval - sockets.timestamp_clock(near)) % 2**32 < 2**31:
                    continue
                answers = sockets.tcp_info(near).segments_received
                near.send(b".")
                if poll(far, select.POLLIN, min(deadline, time.monotonic() + _SCENARIO_TIMEOUT_S)):
                    return True
                was_refused = sockets.tcp_info(near).segments_received > answers  # PAWS dropped it, and sent another ACK
                if poll(far, select.POLLIN, time.monotonic()):
                    return True
                if was_refused:
                    return False
                raise NoWitness("data on loopback was not received in time")
    why = "no connection's clock is behind the constant, so that it could be told from it: the clocks need a random offset"
    raise NoWitness(why, "sysctl -w net.ipv4.tcp_timestamps=1")


# Checks by a filter on each segment


def _answers_a_syn(family: int, segment_filter: Filter, deadline: float) -> bool:
    with closing_by_reset(upstream_like(family)) as near:
        with _full_backlog(family, deadline) as address:
            connect(near, address)
        with closing_by_reset(_bound_to(address)) as far:
            segment_filter.attach(far)
            connect(far, _address_of(family, near))
            return _is_established(far, deadline)


def _sends_data(family: int, segment_filter: Filter, deadline: float) -> bool:
    with _simultaneous_open(family, deadline, ours_first=False) as (near, far):
        segment_filter.attach(far)
        near.send(b".")
        return poll(far, select.POLLIN, deadline)


def _resets(family: int, segment_filter: Filter, deadline: float) -> bool:
    with _simultaneous_open(family, deadline, ours_first=False) as (near, far):
        segment_filter.attach(far)
        sockets.reset_on_close(near)
        near.close()
        return poll(far, 0, deadline)


def _answers_from_time_wait(family: int, segment_filter: Filter, deadline: float) -> bool:
    """On the answer a connecting socket sends a reset, and its SYN again at once instead of after a second."""
    with _simultaneous_open(family, deadline, ours_first=False) as (near, far):
        near_address, address = _address_of(family, near), _address_of(family, far)
        near.shutdown(socket.SHUT_WR)
        if not poll(far, select.POLLIN, deadline):
            return False
        far.close()
        if not poll(near, select.POLLIN, deadline) or not sockets.is_closed(near):
            return False
        with closing_by_reset(_bound_to(address)) as retry:
            segment_filter.attach(retry)
            connect(retry, near_address)
            return poll(retry, select.POLLOUT, deadline) or sockets.tcp_info(retry).retransmits > 0


# The sockets


@contextlib.contextmanager
def _simultaneous_open(family: int, deadline: float, *, ours_first: bool) -> Iterator[Tuple[SocketType, SocketType]]:
    """A connection by simultaneous open: the upstream-like socket, and the far end's.

    `ours_first`: ours receives a SYN with TSopt, and answers it. Else it receives a SYN-ACK with TSopt, whatever it offered.
    """
    first = upstream_like(family) if ours_first else reuseaddr_socket(family)
    with closing_by_reset(first):
        with _full_backlog(family, deadline) as address:
            connect(first, address)
        with closing_by_reset(_bound_to(address, _upstream_like_reuseaddr(family) if not ours_first else None)) as second:
            connect(second, _address_of(family, first))
            for end in (first, second):
                if not _is_established(end, deadline):
                    raise NoWitness("a simultaneous open on loopback was not finished in time")
            yield (first, second) if ours_first else (second, first)


def _is_established(sock: SocketType, deadline: float) -> bool:
    return poll(sock, select.POLLOUT, deadline) and sockets.tcp_state(sock) == uapi.TCP_ESTABLISHED


@contextlib.contextmanager
def _full_backlog(family: int, deadline: float) -> Iterator[Address]:
    """The address of a listener that drops SYNs, since its backlog of 0 is full (listen(2)). Closed at the end."""
    with listening(family, backlog=0) as listener, closing_by_reset(reuseaddr_socket(family)) as filler:
        connect(filler, _address_of(family, listener))
        if not _is_established(filler, deadline):
            raise NoWitness("a connection on loopback was not finished in time")
        yield _address_of(family, listener)


def _upstream_like_reuseaddr(family: int) -> SocketType:
    sock = upstream_like(family)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return sock


def _bound_to(address: Address, sock: Optional[SocketType] = None) -> SocketType:
    """The socket, or a new one, bound to the address."""
    sock = sock or reuseaddr_socket(address.family)
    try:
        sock.bind(address.sockaddr)
    except BaseException:
        sock.close()
        raise
    return sock


def _address_of(family: int, sock: SocketType) -> Address:
    return from_sockaddr(family, sock.getsockname())
