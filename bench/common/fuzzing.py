"""A far end that lets chance decide what to send, and a judge of all that comes back.

Each connection gets a plan when its SYN comes: to behave well, to behave well at first, to answer with anything, to open
from its own side, to refuse, or to say nothing. Besides, noise goes to connections that live and to ports that are closed:
segments with any flags and numbers, in and around the window, any options, what was sent before, and ICMP errors.
Knows segments; knows nothing of who sends or receives them. Everything follows from the seed and from what comes when.
"""

from __future__ import annotations

import random
import struct
import time
from collections import Counter, deque
from typing import Callable, Deque, Dict, List, Optional

from common.segments import ACK, FIN, PSH, RST, SYN, URG, End, Segment, icmp_error, mss, packed, parsed, timestamp
from common.tap import Tap

_KEPT = 12  # of a connection's last segments, for who has to understand a violation
_LIVE, _DEAD = 400, 4000  # connections that get noise
_KNOWN = 10_000
_BATCH = 1000
_MOST_PROVOKED = 40  # what answers an answer would go on for ever
_WORD = 1 << 32
_PLACES = (0, 0, 0, 1, -1, 2, 1460, -1460, 30000, 65535, 65536, -65536, 1 << 20, -(1 << 20), (1 << 31) - 1, 1 << 31)
_FLAGS = (ACK, ACK, ACK | PSH, SYN, SYN | ACK, FIN | ACK, RST, RST | ACK, FIN, SYN | FIN, ACK | URG | PSH, 0, 255)
_WINDOWS = (0, 0, 1, 512, 65535, 65535)


class Flow:
    """One connection as the far end keeps it."""

    __slots__ = (
        "acknowledged",
        "fin_sent",
        "last",
        "offered",
        "ours",
        "patience",
        "plan",
        "recent",
        "sent",
        "sequence",
        "theirs",
    )

    def __init__(self, syn: Segment, plan: Callable[[Flow, Segment], None], sequence: int) -> None:
        self.theirs, self.ours, self.plan = syn.source, syn.target, plan
        self.offered = syn.tsval
        self.sequence, self.acknowledged = sequence, (syn.sequence + 1) % _WORD
        self.fin_sent = False
        self.patience = _MOST_PROVOKED
        self.last = syn
        self.sent: Deque[Segment] = deque(maxlen=4)
        self.recent: Deque[str] = deque(maxlen=_KEPT)


class FarEnd:
    """Give it the tap's packets and time by turn(); read `counts` and `violations`."""

    def __init__(self, tap: Tap, ports: List[int], constant: Optional[int], seed: int, rate: float) -> None:
        """`ports` are those it answers for; `constant` is the only TSval that may come, None if no TSopt may."""
        self._tap, self._ports, self._constant, self._rate = tap, frozenset(ports), constant, rate
        self._seed, self._chance = seed, random.Random(seed)
        self._flows: Dict[End, Flow] = {}
        self._live: Deque[Flow] = deque(maxlen=_LIVE)
        self._dead: Deque[Flow] = deque(maxlen=_DEAD)
        self._pending_commands, self._looked = 0.0, time.monotonic()
        self.counts: Counter[str] = Counter()
        self.violations: List[str] = []
        self._plans = [self._behave] * 8 + [self._turn_coat] * 6 + [self._answer_anything] * 4 + [self._open_too] * 2
        self._plans += [self._refuse, self._be_silent]

    # What comes

    def turn(self) -> None:
        """Judge and answer what has come, and send the noise that is due."""
        for _ in range(_BATCH):
            packet = self._tap.take()
            if packet is None:
                break
            self.counts["seen"] += 1
            segment = parsed(packet.data)
            if segment:
                self._take(segment)
        now = time.monotonic()
        self._pending_commands = min(self._pending_commands + (now - self._looked) * self._rate, self._rate)
        self._looked = now
        while self._pending_commands >= 1:
            self._pending_commands -= 1
            self._make_noise()

    def rest(self) -> None:
        """From now on, judge only: another exchange answers."""
        self._ports, self._rate = frozenset(), 0.0

    def _take(self, segment: Segment) -> None:
        flow = self._flow_of(segment)
        if flow:
            flow.recent.append(f"< {segment}")
        if self._leaks(segment):
            self.counts["violations"] += 1
            told = "\n  ".join(flow.recent if flow else [str(segment)])
            self.violations.append(f"seed {self._seed}: {segment}, and before it:\n  {told}")
        if flow and segment.target[1] in self._ports:
            flow.last = segment
            if segment.flags & RST:
                self._bury(flow)
            elif flow.patience or segment.span:
                flow.patience = max(0, flow.patience - 1)
                flow.plan(flow, segment)

    def _leaks(self, segment: Segment) -> bool:
        """The clock, or a tag that rules know a connection by."""
        return segment.dscp != 0 or any(tsval is None or tsval != self._constant for tsval, _ in segment.stamps)

    def _flow_of(self, segment: Segment) -> Optional[Flow]:
        flow = self._flows.get(segment.source)
        is_new = segment.flags & (SYN | ACK) == SYN and (not flow or flow.acknowledged != (segment.sequence + 1) % _WORD)
        if is_new and segment.target[1] in self._ports:
            flow = Flow(segment, self._chance.choice(self._plans), self._chance.getrandbits(32))
            self._flows.pop(segment.source, None)
            self._flows[segment.source] = flow
            if len(self._flows) > _KNOWN:
                del self._flows[next(iter(self._flows))]  # the oldest; what it still says is judged all the same
            self._live.append(flow)
            self.counts["connections"] += 1
        return flow

    def _bury(self, flow: Flow) -> None:
        self._dead.append(flow)

    # Plans

    def _behave(self, flow: Flow, segment: Segment) -> None:
        """As a good peer: take what is in order, answer some of it, close when the other side does."""
        if segment.flags & SYN:
            flow.sequence = (flow.sequence - bool(flow.sent)) % _WORD  # a SYN that is sent again gets the same answer
            self._send(flow, SYN | ACK, mss() + self._good(flow))
            return
        if not segment.span:
            return
        if segment.sequence == flow.acknowledged:
            flow.acknowledged = (flow.acknowledged + segment.span) % _WORD
        if segment.flags & FIN and not flow.fin_sent:
            self._close(flow)
        elif self._chance.random() < 0.7:
            self._send(flow, ACK | PSH, self._good(flow), self._chance.randbytes(self._chance.randint(1, 1400)))
        elif self._chance.random() < 0.1 and not flow.fin_sent:
            self._close(flow)
        else:
            self._send(flow, ACK, self._good(flow))

    def _close(self, flow: Flow) -> None:
        flow.fin_sent = True
        self._send(flow, FIN | ACK, self._good(flow))
        self._bury(flow)

    def _turn_coat(self, flow: Flow, segment: Segment) -> None:
        self._behave(flow, segment)
        if self._chance.random() < 0.2:
            self._provoke(flow)

    def _answer_anything(self, flow: Flow, segment: Segment) -> None:
        for _ in range(self._chance.randint(1, 3)):
            self._provoke(flow)

    def _open_too(self, flow: Flow, segment: Segment) -> None:
        """A simultaneous open, finished or not."""
        if segment.flags & (SYN | ACK) == SYN:
            self._send(flow, SYN, mss() + self._options())
        elif self._chance.random() < 0.5:
            flow.plan = self._chance.choice([self._turn_coat, self._behave, self._be_silent])
            self._send(flow, self._chance.choice([ACK, SYN | ACK, FIN | ACK]), self._options())

    def _refuse(self, flow: Flow, segment: Segment) -> None:
        self._send(flow, RST | ACK, self._options())
        self._bury(flow)

    def _be_silent(self, flow: Flow, segment: Segment) -> None:
        pass

    # What is sent

    def _good(self, flow: Flow) -> bytes:
        return b"" if flow.offered is None else timestamp(time.monotonic_ns() // 1_000_000, flow.last.tsval or flow.offered)

    def _send(self, flow: Flow, flags: int, options: bytes = b"", payload: bytes = b"", **other: int) -> None:
        """A segment at the next place, unless it is given another."""
        numbers = {"sequence": flow.sequence, "acknowledged": flow.acknowledged if flags & ACK else 0, **other}
        segment = Segment(flow.ours, flow.theirs, flags, options=options, payload=payload, size=len(payload), **numbers)
        if "sequence" not in other:
            flow.sequence = (flow.sequence + segment.span) % _WORD
        self._put(flow, segment)

    def _put(self, flow: Flow, segment: Segment) -> None:
        flow.sent.append(segment)
        flow.recent.append(f"> {segment}")
        self.counts["sent"] += 1
        self._tap.send(packed(segment))

    def _provoke(self, flow: Flow) -> None:
        """Anything, at any place."""
        chance = self._chance
        payload = chance.randbytes(chance.choice((0, 0, 1, 5, 536, 1400)))
        self._send(
            flow,
            chance.choice(_FLAGS) if chance.random() < 0.9 else chance.getrandbits(8),
            self._options(),
            payload,
            sequence=(flow.sequence + self._place()) % _WORD,
            acknowledged=(flow.acknowledged + self._place()) % _WORD,
            window=chance.choice(_WINDOWS),
            urgent=chance.choice((0, 0, 1, 65535)),
        )

    def _place(self) -> int:
        return self._chance.choice(_PLACES) if self._chance.random() < 0.9 else self._chance.getrandbits(32)

    def _make_noise(self) -> None:
        chance = self._chance
        flows = self._live if chance.random() < 0.6 or not self._dead else self._dead
        if not flows:
            return
        flow, kind = flows[chance.randrange(len(flows))], chance.random()
        if kind < 0.15:
            self._upset(flow)
        elif kind < 0.3 and flow.sent:
            self._put(flow, chance.choice(flow.sent))
        elif kind < 0.4:
            self._send(flow, SYN, self._options(), sequence=(flow.sequence + self._place()) % _WORD)
        elif kind < 0.43:
            stranger = (flow.theirs[0], chance.randrange(1, 65536))
            self._put(
                flow, Segment(flow.ours, stranger, chance.choice(_FLAGS), chance.getrandbits(32), 0, options=self._options())
            )
        else:
            self._provoke(flow)

    def _upset(self, flow: Flow) -> None:
        """An ICMP error about the last segment."""
        chance, six = self._chance, ":" in flow.ours[0]
        # Of ICMPv6 those below 128 are errors (RFC 4443, section 2.1); above it, neighbours are told where to find each other.
        kind = chance.choice((1, 2, 3, 4) if six else (3, 3, 4, 5, 11, 12)) if chance.random() < 0.9 else chance.randrange(128)
        code = chance.choice((0, 1, 2, 3, 4, 9, 10, 13)) if chance.random() < 0.8 else chance.randrange(256)
        rest = chance.choice((0, 68, 576, 1280, 1500, chance.getrandbits(32)))
        flow.recent.append(f"> ICMP type {kind} code {code}, {rest}")
        self.counts["sent"] += 1
        self.counts["icmp"] += 1
        self._tap.send(icmp_error(kind, code, packed(flow.last), rest))

    def _options(self) -> bytes:
        """None, a few, right or wrong."""
        made = b"".join(self._option() for _ in range(self._chance.choice((0, 1, 1, 1, 2, 3))))
        return made[:40]

    def _option(self) -> bytes:
        kind, junk = self._chance.random(), self._chance.randbytes(self._chance.randint(0, 18))
        if kind < 0.5:
            return self._stamp()
        if kind < 0.6:  # TSopt with another length than 10, or cut short
            return struct.pack("BB", 8, self._chance.choice((0, 1, 2, 6, 9, 11, 12, 40))) + junk[:8]
        return self._other_option(junk)

    def _stamp(self) -> bytes:
        now, any_word = time.monotonic_ns() // 1_000_000, self._chance.getrandbits(32)
        tsval = self._chance.choice((0, 1, now, now + 1000, any_word))
        return timestamp(tsval, self._chance.choice((0, 0, 1, self._chance.getrandbits(32))))

    def _other_option(self, junk: bytes) -> bytes:
        chance = self._chance
        return chance.choice(
            (
                mss(chance.choice((0, 1, 48, 536, 1460, 65535))),
                bytes((3, 3, chance.randrange(256))),
                b"\4\2",
                bytes((5, 10)) + chance.randbytes(8),  # SACK
                bytes((19, 18)) + chance.randbytes(16),  # MD5
                bytes((29, 16)) + chance.randbytes(14),  # TCP-AO
                bytes((34, 10)) + chance.randbytes(8),  # fast open cookie
                bytes((30, 12)) + chance.randbytes(10),  # MPTCP
                bytes((chance.randrange(256), 2 + len(junk))) + junk,
                b"\1" * chance.randint(1, 12),
                b"\0",
            )
        )
