"""The policies, and what one is attained by here: a lever that somebody pulled, or the word of the user (--trust-host).

Knows what fits a policy. Looks at nothing itself.
"""

from __future__ import annotations

import socket
from enum import IntEnum
from typing import NamedTuple, Tuple

from _tsproxy.policy.syn import Syn


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


WITNESS_NAMES = tuple(lever.word for lever in Lever)
WATCHED = frozenset({Lever.SYSCTL, Lever.NFTABLES})  # those that are looked at again and again


class Policy(NamedTuple):
    """The policy as asked for. `tsval` is what each packet shall carry under `rewrite`.

    `families` are those of the addresses known at the start; a name may move to another one later.
    """

    mode: str
    tsval: int = 0
    trusted: bool = False
    families: Tuple[int, ...] = (socket.AF_INET,)

    def fits(self, seen: Syn) -> bool:
        """Whether a SYN like this one honours the policy."""
        return seen.tsval == self.tsval if self.mode == "rewrite" else not seen.has_timestamps
