"""A far end that misbehaves, rehearsed on loopback: whether packet filter rules hold where our SYN alone shows nothing.

While the sysctl is not 0, Linux takes a TSopt that its own SYN never offered, in a SYN-ACK and in the SYN of a
simultaneous open (RFC 9293, section 3.5), and sends it from then on. TIME_WAIT answers with it when the socket, and
conntrack's entry, are gone. So rules have to take it off each segment, and are seen to do so here.

No right is needed to play such a far end. A listener whose queue is full swallows a SYN; another socket takes its place
and sends its own: a simultaneous open, in which Linux offers TSopt whatever it has received. TCP_INFO of either end tells
what it took up. Who may filter what a TCP socket receives (CAP_NET_ADMIN on recent kernels) sees each segment as well:
once only those come through that fit the policy, and if nothing came, once more only those that do not.
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
from _tsproxy.policy.witness import NoWitness, closing, connect, explained, listening, ours, reusing, wait

MISBEHAVES = "the rules hold for our SYN, but not against a far end that misbehaves"
CROSSING = "a SYN with TSopt while ours is under way"
UNASKED = "a SYN-ACK with TSopt that ours never offered"
RESET = "a reset of such a connection"
TIME_WAIT = "a SYN to a port in TIME_WAIT"
DATA = "data, which carries another timestamp than our SYN"
UNSEEN = f"{UNASKED} is taken up, and what is sent then can't be seen without CAP_NET_ADMIN"
_OFFSETS = 16  # random ones, of which half will do
_CLEARLY = 60_000  # ms that a clock must be behind
_SCENE_S = 0.1  # loopback answers within microseconds; a SYN that was not answered is sent again after 1 s


class Filter(NamedTuple):
    """Which of our segments the far end's socket lets in: those that fit the policy, or those that do not."""

    allowed: Optional[int]
    fitting: bool

    def attach(self, sock: SocketType) -> None:
        """Let only those in from now on. PermissionError without the right to."""
        bpf.attach(sock, bpf.by_timestamp(self.allowed, fitting=self.fitting))


class Scene(NamedTuple):
    """One thing a far end can do. `play` is whether our answer came through the filter in time."""

    what: str
    play: Callable[[int, Filter, float], bool]


class Outcome(NamedTuple):
    """What pulled a timestamp out that the policy does not allow ("": nothing did), and whether each segment was seen."""

    leak: str
    saw_all: bool


def rehearse(family: int, policy: Policy, until: float, *, seen_before: bool) -> Outcome:
    """Play all scenes. `seen_before`: each segment was seen to fit once, when there was still a right to look at them.

    NoWitness if a scene can't be played to its end by `until` (monotonic). OSError for want of descriptors or memory.
    """
    allowed = policy.tsval if policy.mode == "rewrite" else None
    with explained(family):
        leak, taken = _taken_up(family, until) if allowed is None else ("", False)
        if leak:
            return Outcome(leak, True)
        try:
            return Outcome(_by_segment(family, policy, allowed, until), True)
        except PermissionError:
            if allowed is not None:
                return Outcome("" if _sends_the_constant(family, allowed, until) else DATA, False)
            return Outcome(UNSEEN if taken and not seen_before else "", False)


def scenes(policy: Policy) -> Tuple[Scene, ...]:
    """All there are for the policy. Under strip no connection with TSopt lives, so none comes to TIME_WAIT."""
    always = (Scene(CROSSING, _answers_a_syn), Scene(UNASKED, _sends_data), Scene(RESET, _resets))
    return (*always, Scene(TIME_WAIT, _answers_from_time_wait)) if policy.mode == "rewrite" else always


def tried(policy: Policy, saw_all: bool) -> List[str]:
    """What a rehearsal has seen to hold, in words."""
    if saw_all:
        return [scene.what for scene in scenes(policy)]
    return ["data behind our SYN"] if policy.mode == "rewrite" else [CROSSING, UNASKED]


def _by_segment(family: int, policy: Policy, allowed: Optional[int], until: float) -> str:
    return next((scene.what for scene in scenes(policy) if not _fits(scene, family, allowed, until)), "")


def _fits(scene: Scene, family: int, allowed: Optional[int], until: float) -> bool:
    """Whether what comes through fits the policy; played again while nothing comes, as where loopback is slow."""
    while time.monotonic() < until:
        for fitting in (True, False):
            with contextlib.suppress(NoWitness):
                if _comes_through(scene, family, Filter(allowed, fitting), until):
                    return fitting
    raise NoWitness(f"{scene.what}, rehearsed on loopback: our answer did not come in time")


def _comes_through(scene: Scene, family: int, through: Filter, until: float) -> bool:
    return scene.play(family, through, min(until, time.monotonic() + _SCENE_S))


# What TCP itself tells


def _taken_up(family: int, until: float) -> Tuple[str, bool]:
    """Whether our SYN-ACK had TSopt (which scene), and whether our kernel took up one that it had never offered."""
    with _crossed(family, until, ours_first=True) as (near, far):
        if sockets.tcp_info(far).timestamps:
            return CROSSING, True
        taken = sockets.tcp_info(near).timestamps
    with _crossed(family, until, ours_first=False) as (near, far):
        return "", taken or sockets.tcp_info(near).timestamps


def _sends_the_constant(family: int, tsval: int, until: float) -> bool:
    """Whether data of ours carries the same TSval as our SYN, and so not our clock.

    By PAWS (RFC 7323, section 5.3): a far end drops data whose TSval is older than the SYN's. So take a connection whose
    clock is behind the constant, as half of all random offsets make it: its data comes through only with the constant.
    """
    for _ in range(_OFFSETS):
        with listening(family) as listener, closing(ours(family)) as near:
            connect(near, _name(family, listener))
            if not wait(listener, select.POLLIN, until):
                raise NoWitness("a connection on loopback was not accepted in time")
            far, _ = listener.accept()
            with closing(far):
                if not _CLEARLY < (tsval - sockets.timestamp_clock(near)) % 2**32 < 2**31:
                    continue
                answers = sockets.segments_received(near)
                near.send(b".")
                if wait(far, select.POLLIN, min(until, time.monotonic() + _SCENE_S)):
                    return True
                was_refused = sockets.segments_received(near) > answers  # it came, was dropped, and acknowledged once more
                if wait(far, select.POLLIN, time.monotonic()):
                    return True
                if was_refused:
                    return False
                raise NoWitness("data on loopback was not received in time")
    why = "no connection's clock is behind the constant, so that it could be told from it: the clocks need a random offset"
    raise NoWitness(why, "sysctl -w net.ipv4.tcp_timestamps=1")


# What a filter lets through


def _answers_a_syn(family: int, through: Filter, until: float) -> bool:
    with closing(ours(family)) as near:
        with _swallowing(family, until) as there:
            connect(near, there)
        with closing(_at(there)) as far:
            through.attach(far)
            connect(far, _name(family, near))
            return _established(far, until)


def _sends_data(family: int, through: Filter, until: float) -> bool:
    with _crossed(family, until, ours_first=False) as (near, far):
        through.attach(far)
        near.send(b".")
        return wait(far, select.POLLIN, until)


def _resets(family: int, through: Filter, until: float) -> bool:
    with _crossed(family, until, ours_first=False) as (near, far):
        through.attach(far)
        sockets.reset_on_close(near)
        near.close()
        return wait(far, 0, until)


def _answers_from_time_wait(family: int, through: Filter, until: float) -> bool:
    """The answer makes a socket that is connecting send a reset, and its SYN again at once, not after a second."""
    with _crossed(family, until, ours_first=False) as (near, far):
        here, there = _name(family, near), _name(family, far)
        near.shutdown(socket.SHUT_WR)
        if not wait(far, select.POLLIN, until):
            return False
        far.close()
        if not wait(near, select.POLLIN, until) or not sockets.is_closed(near):
            return False
        with closing(_at(there)) as again:
            through.attach(again)
            connect(again, here)
            return wait(again, select.POLLOUT, until) or sockets.tcp_info(again).retransmits > 0


# The sockets


@contextlib.contextmanager
def _crossed(family: int, until: float, *, ours_first: bool) -> Iterator[Tuple[SocketType, SocketType]]:
    """A connection of ours by a simultaneous open.

    Ours first: we get a SYN with TSopt, and answer it. Else we get a SYN-ACK with TSopt, whatever our SYN offered.
    """
    first = ours(family) if ours_first else reusing(family)
    with closing(first):
        with _swallowing(family, until) as there:
            connect(first, there)
        with closing(_at(there, _reusing_ours(family) if not ours_first else None)) as second:
            connect(second, _name(family, first))
            for end in (first, second):
                if not _established(end, until):
                    raise NoWitness("a simultaneous open on loopback was not finished in time")
            yield (first, second) if ours_first else (second, first)


def _established(sock: SocketType, until: float) -> bool:
    return wait(sock, select.POLLOUT, until) and sockets.tcp_state(sock) == uapi.TCP_ESTABLISHED


@contextlib.contextmanager
def _swallowing(family: int, until: float) -> Iterator[Address]:
    """An address that swallows SYNs, since its queue of one is full; free for another socket at the end (listen(2))."""
    with listening(family, backlog=0) as listener, closing(reusing(family)) as filler:
        connect(filler, _name(family, listener))
        if not _established(filler, until):
            raise NoWitness("a connection on loopback was not finished in time")
        yield _name(family, listener)


def _reusing_ours(family: int) -> SocketType:
    sock = ours(family)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return sock


def _at(address: Address, sock: Optional[SocketType] = None) -> SocketType:
    """The socket, or a new one, bound there."""
    sock = sock or reusing(address.family)
    try:
        sock.bind(address.sockaddr)
    except BaseException:
        sock.close()
        raise
    return sock


def _name(family: int, sock: SocketType) -> Address:
    return from_sockaddr(family, sock.getsockname())
