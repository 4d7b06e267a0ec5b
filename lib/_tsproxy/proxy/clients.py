"""Counts the connections of each client address, for --max-connections-per-client. Memory is bounded; there is no lock.

A client address with connections has a slot of two counters in each worker's row: sessions begun and ended there. The acceptor
counts what it dispatches; what has not ended is open. A slot whose sessions have all ended is reused for another address when
none is unused. Ends are counted in shared memory, not by records, so a dropped record can't make the count wrong.
"""

from __future__ import annotations

from typing import Callable, Dict, List, Optional

from _tsproxy.linux.addresses import without_port
from _tsproxy.stats.counters import SharedCounters, slot_offset


def slots_for(max_connections: int, per_client: int) -> int:
    """How many slots to make: 1.5 for each possible connection, so that the search for a vacant one is short."""
    return max_connections + max_connections // 2 + 1 if per_client else 0


class Clients:
    """See the module. Only the acceptor uses it. A client is an address, IPv4-mapped as IPv4, link-local with its zone."""

    def __init__(
        self, shared_counters: SharedCounters, slots: int, limit: int, elsewhere: Callable[[bytes], int] = lambda _: 0
    ) -> None:
        """At most `limit` connections a client; 0 is no limit. `slots` is the number of client slots in the shared counters.

        `elsewhere` tells how many a client has that count as well: those of open_of() from before a change of the route.
        """
        self._shared_counters, self._slots, self._limit, self._elsewhere = shared_counters, slots, limit, elsewhere
        self._slot_of: Dict[bytes, int] = {}
        self._owners: List[bytes] = []  # by slot; it grows to `slots` at most
        self._given: List[int] = []  # by slot: connections dispatched, for its owners so far
        self._hand = 0  # the slot where the next search for a vacant one begins (clock algorithm)

    def enter(self, packed: bytes) -> Optional[int]:
        """Count one more connection of the client; its slot in the rows (0: not counted), or None if it is at its limit."""
        if not self._limit:
            return 0
        client = without_port(packed)
        slot = self._find(client)
        if slot is None or self._open(slot) + self._elsewhere(client) >= self._limit:
            return None
        self._given[slot] += 1
        return slot_offset(slot)

    def open_of(self, client: bytes) -> int:
        """How many connections of a client, as without_port() gives it, are open; 0 where there is no limit."""
        slot = self._slot_of.get(client)
        return 0 if slot is None else self._open(slot)

    def leave(self, packed: bytes) -> None:
        """Undo the last enter(): the connection was not dispatched."""
        if self._limit:
            self._given[self._slot_of[without_port(packed)]] -= 1

    def _open(self, slot: int) -> int:
        return self._given[slot] - self._shared_counters.client_ended(slot_offset(slot))

    def _find(self, client: bytes) -> Optional[int]:
        """The client's slot, or a vacant one for it; None if all slots have open connections."""
        slot = self._slot_of.get(client)
        if slot is None:
            slot = self._fresh() if len(self._owners) < self._slots else self._vacant()
            if slot is not None:
                self._slot_of.pop(self._owners[slot], None)
                self._slot_of[client], self._owners[slot] = slot, client
        return slot

    def _fresh(self) -> int:
        self._owners.append(b"")
        self._given.append(0)
        return len(self._owners) - 1

    def _vacant(self) -> Optional[int]:
        for _ in range(self._slots):
            self._hand = (self._hand + 1) % self._slots
            if self._open(self._hand) == 0:
                return self._hand
        return None
