"""The policies, and what makes one hold here: a lever, or the user who vouches for it (--trust-host).

Knows which SYN fits a policy. Checks nothing itself.
"""

from __future__ import annotations

import socket
from enum import IntEnum
from typing import NamedTuple, Sequence, Tuple

from _tsproxy.policy.syn import Syn


class Lever(IntEnum):
    """What makes a policy hold. Records have it as this number."""

    NONE = 0
    SYSCTL = 1
    NFTABLES = 2
    TRUSTED = 3

    @property
    def label(self) -> str:
        """Its name in JSON lines."""
        return self.name.lower()


WITNESS_NAMES = tuple(lever.label for lever in Lever)
MONITORED = frozenset({Lever.SYSCTL, Lever.NFTABLES})  # those that the monitors check again and again


class Policy(NamedTuple):
    """The policy as asked for. `tsval` is the TSval of each packet under `rewrite`.

    `families` are those of the addresses known at the start. A target's name may resolve to another one later.
    """

    mode: str
    tsval: int = 0
    trusted: bool = False
    families: Tuple[int, ...] = (socket.AF_INET,)

    @property
    def is_checked(self) -> bool:
        """Whether the host decides if it holds: nobody vouches for it, and something is asked for."""
        return self.mode != "preserve" and not self.trusted

    def fits(self, seen: Syn) -> bool:
        """Whether this SYN honours the policy."""
        return seen.tsval == self.tsval if self.mode == "rewrite" else not seen.has_timestamps


def common(policies: Sequence[Policy]) -> Policy:
    """The policy by which to check a host for all of these: for the families of those that it decides."""
    checked = [policy for policy in policies if policy.is_checked]
    families = dict.fromkeys(family for policy in checked for family in policy.families)
    return checked[0]._replace(families=tuple(families)) if checked else policies[0]
