"""The gates: whether a SYN may leave, and whether bytes may be relayed. One for each lever; the data path calls it.

A gate never blocks, and opens no descriptor after it was made. It combines the evidence of the address family with what it can
read in a microsecond. If the evidence is too old it requests a check from the monitor's thread, and answers None until then.
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

MAX_AGE_NS = 100_000_000  # of an answer by which a SYN is allowed or refused
_MAX_CLOCK_AGE_MS = 60_000


class UnmonitoredGate:
    """Base of the gates without evidence: a SYN may always leave, and no session ends by a drift."""

    proves_each_syn = for_rules = False
    tagged = True

    def may_connect(self, family: int) -> Optional[bool]:
        """Always."""
        return True

    def is_absent(self, family: int) -> bool:
        """Not known: False."""
        return False

    def ends(self, family: int, established: bool) -> bool:
        """Never."""
        return False


class Preserve(UnmonitoredGate):
    """--timestamps=preserve: timestamps are sent as the kernel makes them, and counted. Rules for others leave it alone."""

    witness = int(Lever.NONE)
    tagged = False

    def may_relay(self, upstream: socket.SocketType, info: TcpInfo) -> bool:
        """Always."""
        return True


class ByTrust(UnmonitoredGate):
    """--trust-host: the user vouches that something outside this namespace strips or rewrites. TCP_INFO is still checked."""

    witness = int(Lever.TRUSTED)

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def may_relay(self, upstream: socket.SocketType, info: TcpInfo) -> bool:
        """Strip: only if TSopt was not negotiated, since it can't be after a SYN without it."""
        return self._policy.mode == "rewrite" or not info.timestamps


class MonitoredGate:
    """Base of the gates with evidence."""

    proves_each_syn = tagged = True

    def __init__(self, policy: Policy, evidence: Evidence, asked: Mapping[int, Wakeup]) -> None:
        """`asked`, by family, wakes the monitor when the gate needs a newer answer."""
        self._policy, self._evidence, self._asked = policy, evidence, asked

    def is_absent(self, family: int) -> bool:
        """By the last check."""
        return self._evidence.of(family).answer is Answer.ABSENT

    def ends(self, family: int, established: bool) -> bool:
        """Strip: sessions that connect, since their SYN may be sent again. Rewrite: all, since each packet carries a TSval."""
        exempt = established and self._policy.mode != "rewrite"
        return not exempt and self._evidence.of(family).answer is Answer.FAILS

    def _from_evidence(self, family: int, *, until_refuted: bool) -> Optional[bool]:
        """`until_refuted`: HOLDS counts however old it is; a later check replaces it."""
        answer, at_ns = self._evidence.of(family)
        if answer is Answer.HOLDS and until_refuted:
            return True
        if answer in _CONCLUSIVE and time.monotonic_ns() - at_ns <= MAX_AGE_NS:
            return answer is Answer.HOLDS
        self._evidence.need(family)
        self._asked[family].wake()
        return None


_CONCLUSIVE = frozenset({Answer.HOLDS, Answer.FAILS, Answer.ABSENT})


class StripBySysctl(MonitoredGate):
    """Strip by net.ipv4.tcp_timestamps=0 of this namespace. A change to 2 and back between two reads is not noticed."""

    witness = int(Lever.SYSCTL)
    for_rules = False

    def __init__(self, policy: Policy, evidence: Evidence, asked: Mapping[int, Wakeup], sysctl: Sysctl) -> None:
        super().__init__(policy, evidence, asked)
        self._sysctl = sysctl
        self._clock_shift_ns = timens.monotonic_shift_ns()

    def may_connect(self, family: int) -> Optional[bool]:
        """Only while the sysctl reads 0, else the SYN itself would be the leak; and only if a witness SYN had no TSopt."""
        return self._sysctl.is_zero() and self._from_evidence(family, until_refuted=True)

    def may_relay(self, upstream: socket.SocketType, info: TcpInfo) -> bool:
        """Only if TSopt was not negotiated, one SYN was sent, and the sysctl was 0 at that time, and still is."""
        return not info.timestamps and not info.retransmits and self._sysctl.is_zero() and not self._has_random_offset(upstream)

    def _has_random_offset(self, sock: socket.SocketType) -> bool:
        """Whether this connection's timestamps have the random offset that connect(2) sets only while the sysctl is 1.

        TCP_TIMESTAMP is CLOCK_MONOTONIC in ms, as of now or, on some kernels, of the connection's last packet, plus the
        offset. Without an offset it is at most a little less than now; so is one random offset in 70,000. For a connection
        that counts microseconds (a feature of its route) this can't be decided: False.
        """
        clock = sockets.timestamp_clock(sock)
        # Read it second: if the thread is preempted between the two reads, the first must not be ahead of the second.
        now = (time.monotonic_ns() - self._clock_shift_ns) // 1_000_000
        age = (now - clock) % 2**32
        looks_random = _MAX_CLOCK_AGE_MS < age < 2**32 - 2
        return looks_random and not sockets.counts_microseconds(sock)


class ByRules(MonitoredGate):
    """Strip or rewrite by nftables rules. No socket option shows their effect, so each SYN needs a recent witness SYN."""

    witness = int(Lever.NFTABLES)

    def __init__(self, policy: Policy, evidence: Evidence, asked: Mapping[int, Wakeup], *, for_rules: bool) -> None:
        """`for_rules`: the rules match the DSCP mark that upstream sockets can set, and replace it."""
        super().__init__(policy, evidence, asked)
        self.for_rules = for_rules

    def may_connect(self, family: int) -> Optional[bool]:
        """Only by a check no older than 100 ms. The monitor checks again and again while SYNs are sent."""
        self._evidence.need(family)
        return self._from_evidence(family, until_refuted=False)

    def may_relay(self, upstream: socket.SocketType, info: TcpInfo) -> bool:
        """Only if one SYN was sent, and under strip only if TSopt was not negotiated. No socket option has the TSval sent."""
        return not info.retransmits and (self._policy.mode == "rewrite" or not info.timestamps)


LeverGate = Union[Preserve, StripBySysctl, ByRules, ByTrust]


def gate_for(
    lever: Lever, policy: Policy, evidence: Evidence, asked: Mapping[int, Wakeup], *, for_rules: bool = False
) -> LeverGate:
    """The gate for a worker; `for_rules`: see ByRules. OSError if the sysctl can't be opened."""
    if lever is Lever.SYSCTL:
        return StripBySysctl(policy, evidence, asked, Sysctl())
    if lever is Lever.NFTABLES:
        return ByRules(policy, evidence, asked, for_rules=for_rules)
    return ByTrust(policy) if lever is Lever.TRUSTED else Preserve()
