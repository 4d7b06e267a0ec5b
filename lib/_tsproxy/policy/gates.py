"""What must hold before a SYN leaves, and before a byte is relayed: one gate for each lever, asked by the data path.

A gate never waits and opens nothing. It compares what is known of the address family (Evidence) with what it can read
in a microsecond. What it needs to know anew it asks for; its answer is None meanwhile.
"""

from __future__ import annotations

import socket
import time
from typing import Mapping, Optional, Union

from _tsproxy.linux import sockets, timens
from _tsproxy.linux.sockets import TcpInfo
from _tsproxy.linux.wakeup import Wakeup
from _tsproxy.policy.evidence import Answer, Evidence
from _tsproxy.policy.levers import Lever, Policy
from _tsproxy.policy.sysctl import Sysctl

FRESH_NS = 100_000_000  # how old an answer may be that a SYN leaves by, or is refused by
_OLDEST_CLOCK_MS = 60_000


class Unwatched:
    """What the gates without evidence have in common: a SYN may always leave, and nothing ends for a drift."""

    proves_each_syn = for_rules = False

    def may_connect(self, family: int) -> Optional[bool]:
        """Always."""
        return True

    def is_absent(self, family: int) -> bool:
        """Not known, so no."""
        return False

    def ends(self, family: int, established: bool) -> bool:
        """Never."""
        return False


class Preserve(Unwatched):
    """Timestamps pass as the kernel makes them; they are only counted."""

    witness = int(Lever.NONE)

    def may_relay(self, upstream: socket.SocketType, info: TcpInfo) -> bool:
        """Always."""
        return True


class ByTrust(Unwatched):
    """The user says that something beyond this namespace strips or rewrites; what can be checked still is."""

    witness = int(Lever.TRUSTED)

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def may_relay(self, upstream: socket.SocketType, info: TcpInfo) -> bool:
        """Strip: only if nothing was negotiated, since a stripped SYN leaves nothing to negotiate."""
        return self._policy.mode == "rewrite" or not info.timestamps


class Watched:
    """What the gates with evidence have in common."""

    proves_each_syn = True

    def __init__(self, policy: Policy, evidence: Evidence, asked: Mapping[int, Wakeup]) -> None:
        """`asked`, by family, is rung when an answer is needed that there is not."""
        self._policy, self._evidence, self._asked = policy, evidence, asked

    def is_absent(self, family: int) -> bool:
        """By the last look."""
        return self._evidence.of(family).answer is Answer.ABSENT

    def ends(self, family: int, established: bool) -> bool:
        """Strip: what connects, for its SYN may leave again. Rewrite: all, since each packet would carry the real clock."""
        exempt = established and self._policy.mode != "rewrite"
        return not exempt and self._evidence.of(family).answer is Answer.FAILS

    def _by_answer(self, family: int, *, stands: bool) -> Optional[bool]:
        """`stands`: that it held once is enough, until a look shows otherwise."""
        answer, at_ns = self._evidence.of(family)
        if answer is Answer.HOLDS and stands:
            return True
        if answer in _SURE and time.monotonic_ns() - at_ns <= FRESH_NS:
            return answer is Answer.HOLDS
        self._evidence.need(family)
        self._asked[family].ring()
        return None


_SURE = frozenset({Answer.HOLDS, Answer.FAILS, Answer.ABSENT})


class StripBySysctl(Watched):
    """Strip where this namespace's sysctl is 0. One flipped to 2 and back between two reads is not seen."""

    witness = int(Lever.SYSCTL)
    for_rules = False

    def __init__(self, policy: Policy, evidence: Evidence, asked: Mapping[int, Wakeup], sysctl: Sysctl) -> None:
        super().__init__(policy, evidence, asked)
        self._sysctl = sysctl
        self._clock_shift_ns = timens.monotonic_shift_ns()

    def may_connect(self, family: int) -> Optional[bool]:
        """Only while the sysctl reads 0, else the SYN itself would be the leak; and where the witness has seen it at work."""
        return self._is_off() and self._by_answer(family, stands=True)

    def _is_off(self) -> bool:
        try:
            return self._sysctl.value() == 0
        except (OSError, ValueError):
            return False  # what can't be read is not known to be off

    def may_relay(self, upstream: socket.SocketType, info: TcpInfo) -> bool:
        """Only if nothing was negotiated, and the one SYN of this connection was sent under 0, which it still is."""
        return not info.timestamps and not info.retransmits and self._is_off() and not self._has_random_offset(upstream)

    def _has_random_offset(self, sock: socket.SocketType) -> bool:
        """Whether this connection's clock got the random offset that connect() gives it only while the sysctl is 1.

        TCP_TIMESTAMP is CLOCK_MONOTONIC in ms, as of now or, on some kernels, of the connection's last packet, plus the
        offset: without one it is at most a little older than now. One random offset in 70,000 looks like that, too. A
        connection that counts in microseconds (a route's feature) tells nothing.
        """
        clock = sockets.timestamp_clock(sock)
        # After it: a worker that is preempted between the two must not find a clock ahead of its own.
        now = (time.monotonic_ns() - self._clock_shift_ns) // 1_000_000
        age = (now - clock) % 2**32
        looks_random = _OLDEST_CLOCK_MS < age < 2**32 - 2
        return looks_random and not sockets.counts_microseconds(sock)


class ByRules(Watched):
    """Strip or rewrite by nftables: nothing on a socket proves it, so a fresh witness precedes each SYN."""

    witness = int(Lever.NFTABLES)

    def __init__(self, policy: Policy, evidence: Evidence, asked: Mapping[int, Wakeup], *, for_rules: bool) -> None:
        """`for_rules`: the rules know the mark that upstream sockets can carry, and take it off again."""
        super().__init__(policy, evidence, asked)
        self.for_rules = for_rules

    def may_connect(self, family: int) -> Optional[bool]:
        """Only by a look no older than 100 ms. Looks go on while there is need for them."""
        self._evidence.need(family)
        return self._by_answer(family, stands=False)

    def may_relay(self, upstream: socket.SocketType, info: TcpInfo) -> bool:
        """Only if the SYN left once. Strip: and if nothing was negotiated. Rewrite: TSval can't be read off a socket."""
        return not info.retransmits and (self._policy.mode == "rewrite" or not info.timestamps)


Gate = Union[Preserve, StripBySysctl, ByRules, ByTrust]


def gate_for(lever: Lever, policy: Policy, evidence: Evidence, asked: Mapping[int, Wakeup], *, for_rules: bool = False) -> Gate:
    """The gate that a worker asks; `for_rules`: see ByRules. OSError if the sysctl can't be opened."""
    if lever is Lever.SYSCTL:
        return StripBySysctl(policy, evidence, asked, Sysctl())
    if lever is Lever.NFTABLES:
        return ByRules(policy, evidence, asked, for_rules=for_rules)
    return ByTrust(policy) if lever is Lever.TRUSTED else Preserve()
