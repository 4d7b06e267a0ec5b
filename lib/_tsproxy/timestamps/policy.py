"""The policies: what must hold before a SYN leaves and before a byte is relayed, and what it rests on here.

A policy is attained through one of a few levers, found out at the start: this namespace's sysctl, nftables rules that
the loopback witness sees, or the word of the user (--trust-host). Each lever has its own gate for the data path.
Knows what is true of the kernel; knows nothing of relays.
"""

from __future__ import annotations

import socket
import time
from enum import IntEnum
from typing import Dict, NamedTuple, Optional, Tuple, Union

from _tsproxy.host import sockets, timens
from _tsproxy.timestamps.syn import Syn
from _tsproxy.timestamps.sysctl import PATH, Sysctl
from _tsproxy.timestamps.witness import NAMES, NoWitness, Witness

_OLDEST_CLOCK_MS = 60_000
_FRESH_NS = 100_000_000  # how old a witness may be when a SYN leaves by the word of nftables alone


class Lever(IntEnum):
    """What a policy rests on; the number travels in the records."""

    NONE = 0
    SYSCTL = 1
    NFTABLES = 2
    TRUSTED = 3

    @property
    def word(self) -> str:
        """How the lines call it."""
        return self.name.lower()


WITNESS_WORDS = tuple(lever.word for lever in Lever)


class Wanted(NamedTuple):
    """The policy as asked for. `tsval` is what each packet shall carry under `rewrite`."""

    mode: str
    tsval: int = 0
    trusted: bool = False
    families: Tuple[int, ...] = (socket.AF_INET,)

    def fits(self, seen: Syn) -> bool:
        """Whether a SYN like this one honours the policy."""
        return seen.tsval == self.tsval if self.mode == "rewrite" else not seen.has_timestamps


class Finding(NamedTuple):
    """What one look at this host showed. `lever` is None if the policy does not hold; `problem` then says why."""

    lever: Optional[Lever]
    sysctl: Optional[int]
    syns: Dict[int, Syn]
    problem: str = ""

    @property
    def evidence(self) -> str:
        """What was seen, for people."""
        seen = [f"{NAMES[family]} SYN with {syn}" for family, syn in self.syns.items()]
        return "; ".join([f"net.ipv4.tcp_timestamps={self.sysctl}", *seen])


class Inspector:
    """Looks whether the policy holds, at the start and again every few seconds; keeps its descriptors open."""

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted
        self._witness = Witness(wanted.families)
        self._sysctl: Optional[Sysctl] = None

    def look(self) -> Finding:
        """One look: the sysctl and, unless the host is trusted, a witness SYN for each family."""
        if self.wanted.mode == "preserve":
            return Finding(Lever.NONE, self._seen_sysctl(), {})
        try:
            self._sysctl = self._sysctl or Sysctl()
            value = self._sysctl.value()
        except (OSError, ValueError) as error:
            return Finding(None, None, {}, f"can't read {PATH}: {getattr(error, 'strerror', None) or error}")
        early = _without_witness(self.wanted, value)
        if early:
            return early
        try:
            syns = self._witness.look()
        except NoWitness as problem:
            return Finding(None, value, {}, str(problem))
        return _judge(self.wanted, value, syns)

    def _seen_sysctl(self) -> Optional[int]:
        """The value, where nothing rests on it: None where /proc can't be read."""
        try:
            self._sysctl = self._sysctl or Sysctl()
            return self._sysctl.value()
        except (OSError, ValueError):
            return None

    def close(self) -> None:
        """Close the descriptors."""
        self._witness.close()
        if self._sysctl:
            self._sysctl.close()


def _without_witness(wanted: Wanted, value: int) -> Optional[Finding]:
    """The cases that no SYN needs to be looked at for."""
    if wanted.mode == "rewrite" and value == 0:
        return Finding(None, value, {}, "net.ipv4.tcp_timestamps is 0 here, so there is no timestamp to rewrite")
    return Finding(Lever.TRUSTED, value, {}) if wanted.trusted else None


def _judge(wanted: Wanted, value: int, syns: Dict[int, Syn]) -> Finding:
    bad = [family for family, syn in syns.items() if not wanted.fits(syn)]
    if bad:
        what = f"not TSval {wanted.tsval}" if wanted.mode == "rewrite" else "TSopt"
        return Finding(None, value, syns, f"the witness SYN ({', '.join(NAMES[family] for family in bad)}) carries {what}")
    return Finding(Lever.SYSCTL if value == 0 else Lever.NFTABLES, value, syns)


class Preserve:
    """Timestamps pass as the kernel makes them; they are only counted."""

    witness = int(Lever.NONE)

    def may_connect(self) -> bool:
        """Always."""
        return True

    def may_relay(self, upstream: socket.SocketType, timestamps: bool) -> bool:
        """Always."""
        return True


class BySysctl:
    """Strip where this namespace's sysctl is 0. One flipped to 2 and back between the two reads is not seen."""

    witness = int(Lever.SYSCTL)

    def __init__(self, sysctl: Sysctl) -> None:
        self._sysctl = sysctl
        self._clock_shift_ns = timens.monotonic_shift_ns()

    def may_connect(self) -> bool:
        """Only while the sysctl reads 0: else the SYN itself would be the leak."""
        try:
            return self._sysctl.value() == 0
        except (OSError, ValueError):
            return False  # what can't be read is not known to be off

    def may_relay(self, upstream: socket.SocketType, timestamps: bool) -> bool:
        """Only if nothing was negotiated, the sysctl still reads 0, and no SYN of this connection was sent under 1."""
        return not timestamps and self.may_connect() and not self._has_random_offset(upstream)

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


class ByRules:
    """Strip or rewrite by nftables: nothing on a socket proves it, so a fresh witness precedes each connect()."""

    witness = int(Lever.NFTABLES)

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self._inspector = Inspector(wanted)
        self._held_at = -_FRESH_NS

    def may_connect(self) -> bool:
        """Only if a witness no older than 100 ms fits; makes one if need be, which takes some 50 us a family.

        OSError if there is no descriptor for one.
        """
        now = time.monotonic_ns()
        if now - self._held_at > _FRESH_NS:
            if self._inspector.look().lever is None:
                return False
            self._held_at = now
        return True

    def may_relay(self, upstream: socket.SocketType, timestamps: bool) -> bool:
        """Strip: only if nothing was negotiated. Rewrite: TSval can't be read off a socket; the witness stands for it."""
        return self._wanted.mode == "rewrite" or not timestamps


class ByTrust:
    """The user says that something beyond this namespace strips or rewrites; what can be checked still is."""

    witness = int(Lever.TRUSTED)

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted

    def may_connect(self) -> bool:
        """Always: our SYN is stripped where we can't see it."""
        return True

    def may_relay(self, upstream: socket.SocketType, timestamps: bool) -> bool:
        """Strip: only if nothing was negotiated, since a stripped SYN leaves nothing to negotiate."""
        return self._wanted.mode == "rewrite" or not timestamps


Gate = Union[Preserve, BySysctl, ByRules, ByTrust]


def gate_for(lever: Lever, wanted: Wanted) -> Gate:
    """The gate that a worker asks. OSError if the sysctl can't be opened."""
    if lever is Lever.SYSCTL:
        return BySysctl(Sysctl())
    if lever is Lever.NFTABLES:
        return ByRules(wanted)
    return ByTrust(wanted) if lever is Lever.TRUSTED else Preserve()
