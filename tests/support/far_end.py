"""A raw far end, played by a script: it sees each segment that the proxy's host sends, and answers with any that it likes.

    flow = peer.accept()
    flow.send(SYN | ACK, timestamp(7))
    flow.expect(ACK)

The kernel of the exchange's namespace must not answer for its port: a rule in its input hook drops what comes for it,
behind the tap. Each wait has a deadline; all that was seen stays for the verdict.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import select
import socket
import struct
import threading
from typing import Callable, Dict, List, NamedTuple, Optional, Set

from common.segments import ACK, FIN, RST, SYN, End, Segment, packed, parsed
from common.tap import Tap, mac_of
from harness import wait_until
from wire import UPSTREAM, Wire

_WORD = 2**32


class Seen(NamedTuple):
    """A segment from the proxy's host, and when it crossed, on CLOCK_REALTIME in seconds."""

    segment: Segment
    at: float


class Peer:
    """A port of the exchange that no kernel answers for. `target` is for the proxy's -t."""

    def __init__(self, wire: Wire, family: int) -> None:
        self.wire, self.host = wire, wire.exchange_address(family)
        with wire.clean:
            mac = mac_of(UPSTREAM)
        with wire.exchange:
            kind = socket.AF_INET6 if family == 6 else socket.AF_INET
            self._reserved = socket.create_server((self.host, 0), family=kind)  # its backlog serves nobody: see _deafen()
            self._tap = Tap(UPSTREAM, mac)
        self.port = self._reserved.getsockname()[1]
        self.target = f"[{self.host}]:{self.port}" if family == 6 else f"{self.host}:{self.port}"
        self.seen: List[Seen] = []
        self.by_source: Dict[End, List[Segment]] = {}
        self._taken: Set[End] = set()
        self._table = f"inet deaf{self.port}"
        self._deafen()
        self._wake, self._stop = os.pipe()
        self._thread = threading.Thread(target=self._run, name="peer", daemon=True)
        self._thread.start()

    def _deafen(self) -> None:
        rule = f"type filter hook input priority 0; tcp dport {self.port} drop;"
        self.wire.exchange.run("nft", "-f", "-", input=f"table {self._table} {{ chain in {{ {rule} }} ; }}")

    def _run(self) -> None:
        while self._wake not in select.select([self._tap, self._wake], [], [])[0]:
            while packet := self._tap.take():
                segment = parsed(packet.data)
                if segment:
                    self.by_source.setdefault(segment.source, []).append(segment)
                    self.seen.append(Seen(segment, packet.at_ns / 1e9))

    def accept(self, since: int = 0) -> Flow:
        """The next connection whose SYN has come, not before that index of `seen`."""
        flow: Flow = wait_until(lambda: self.accepted(since), "a SYN of a new connection")
        return flow

    def accepted(self, since: int) -> Optional[Flow]:
        """The same, if it has come already."""
        for segment in self.since(since):
            if segment.flags & (SYN | ACK) == SYN and segment.source not in self._taken:
                self._taken.add(segment.source)
                return Flow(self, segment)
        return None

    def meet(self, since: int, answer: Callable[[Flow], object], flags: int, size: int = 0) -> Flow:
        """Answer each SYN that comes; the first connection of which a segment of that kind comes then.

        tsproxy waits 0.75 s for an answer, and sends the next SYN from another port: an answer that came later is void.
        """
        flows: List[Flow] = []

        def met() -> Optional[Flow]:
            while flow := self.accepted(since):
                flows.append(flow)
                answer(flow)
            return next((flow for flow in flows if flow.has_come([flags], lambda segment: segment.size == size)), None)

        found: Flow = wait_until(met, "an answer that was in time")
        return found

    def _is_mine(self, segment: Segment) -> bool:
        return segment.target == (self.host, self.port)

    def put(self, segment: Segment) -> None:
        """Send it as it is."""
        self._tap.send(packed(segment))

    def put_packet(self, packet: bytes) -> None:
        """Send any IP packet."""
        self._tap.send(packet)

    def since(self, index: int) -> List[Segment]:
        """What came from there on, of the port's own connections."""
        return [segment for segment, _ in self.seen[index:] if self._is_mine(segment)]

    def until_answered(self, host: str) -> None:
        """Wait until the proxy's host has answered all that was sent so far, and so far as it answers at once.

        A port where nobody listens answers with RST, and the packets of one wire are taken one after the other.
        """
        begun = len(self.seen)
        closed = Segment((self.host, random.randrange(1024, 65536)), (host, 1), ACK, 1, 1)

        def answered() -> bool:
            return any(s.source == closed.target and s.target == closed.source for s, _ in self.seen[begun:])

        self.put(closed)
        wait_until(answered, "RST from a closed port")

    def close(self) -> None:
        """See no more; the kernel of the namespace has its port again. AssertionError if a packet was missed."""
        if self._wake == -1:
            return
        os.write(self._stop, b"x")
        self._thread.join()
        drops = self._tap.drops()
        self._tap.close()
        self._reserved.close()
        for fd in (self._wake, self._stop):
            os.close(fd)
        self._wake = self._stop = -1
        with contextlib.suppress(AssertionError):  # the namespace may be gone already
            self.wire.exchange.run("nft", "delete", "table", *self._table.split())
        assert drops == 0, f"the tap missed {drops} packets"


class Flow:
    """One connection of the proxy's, as the far end sees it. send() fills in what a good peer would."""

    def __init__(self, peer: Peer, syn: Segment) -> None:
        self.peer, self.syn = peer, syn
        self.theirs, self.ours = syn.source, (peer.host, peer.port)
        self.initial = random.getrandbits(32)
        self.sequence = self.initial  # of what we send next
        self.echo: Optional[int] = syn.tsval  # the TSval that came last
        self._came = peer.by_source[syn.source]
        self._read = self._first = next(index for index, segment in enumerate(self._came) if segment is syn) + 1

    @property
    def acknowledged(self) -> int:
        """What we would acknowledge: the highest sequence number that has come, and one more."""
        first = self.syn.sequence
        ends = ((s.sequence + s.span - first) % _WORD for s in self.came() if not s.flags & RST)
        return (first + max(end for end in ends if end < _WORD // 2)) % _WORD

    def came(self) -> List[Segment]:
        """All that has come from that end to ours."""
        return [segment for segment in self._came[self._first - 1 :] if segment.target == self.ours]

    def send(self, flags: int, options: bytes = b"", payload: bytes = b"", **other: int) -> Segment:
        """One segment. `sequence`, `acknowledged`, `window` and `urgent` may be anything else than what a good peer says."""
        good: Dict[str, int] = {"sequence": self.sequence, "acknowledged": self.acknowledged if flags & ACK else 0}
        values = {name: value % _WORD for name, value in {**good, **other}.items()}
        segment = Segment(self.ours, self.theirs, flags, options=options, payload=payload, size=len(payload), **values)
        self.peer.put(segment)
        if values["sequence"] == self.sequence:
            self.sequence = (self.sequence + segment.span) % _WORD
        return segment

    def expect(self, flags: int, which: Callable[[Segment], bool] = lambda _: True) -> Segment:
        """The next segment of this connection with these flags (SYN, ACK, FIN and RST are looked at) that fits."""
        return self.expect_any([flags], which)

    def expect_any(self, flags: List[int], which: Callable[[Segment], bool] = lambda _: True) -> Segment:
        """The next one with any of these flags."""
        wanted = f"a segment with flags {flags} from {self.theirs}; it sent: {[str(segment) for segment in self._came[-5:]]}"
        found: Segment = wait_until(lambda: self.has_come(flags, which), wanted)
        return found

    def has_come(self, flags: List[int], which: Callable[[Segment], bool] = lambda _: True) -> Optional[Segment]:
        """The same, if it has come already."""
        for index, segment in enumerate(self._came[self._read :], self._read + 1):
            if segment.target == self.ours and segment.flags & (SYN | ACK | FIN | RST) in flags and which(segment):
                self._read = index
                return segment
        return None

    def until_answered(self) -> None:
        """Wait until all was answered that is answered at once."""
        self.peer.until_answered(self.theirs[0])


def forget_connections() -> None:
    """Empty the conntrack table of this thread's namespace, as `conntrack -F` does (IPCTNL_MSG_CT_DELETE without a tuple)."""
    kind = 1 << 8 | 2  # NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_DELETE: include/uapi/linux/netfilter/nfnetlink*.h
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12) as netlink:  # NETLINK_NETFILTER
        netlink.send(struct.pack("=IHHIIBBH", 20, kind, 5, 1, 0, 0, 0, 0))  # NLM_F_REQUEST | NLM_F_ACK
        code = struct.unpack_from("=i", netlink.recv(64), 16)[0]
    assert code == 0, os.strerror(-code)


def fill_conntrack() -> None:
    """Fill the conntrack table of this thread's namespace, with UDP entries that nothing displaces (IPS_ASSURED).

    Only the initial namespace may write nf_conntrack_max, but each namespace is counted by itself.
    """
    stands_for = b"\x7f\xfe\xfd\xfc"  # the source address
    batch = b"".join(_entry(stands_for, port) for port in range(512))
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12) as netlink:
        netlink.setsockopt(270, 5, 1)  # SOL_NETLINK, NETLINK_NO_ENOBUFS: the first error is enough
        for number in range(1 << 16):
            netlink.send(batch.replace(stands_for, struct.pack("!I", 0x0A000000 + number)))
            with contextlib.suppress(BlockingIOError):  # only an error is answered
                code = struct.unpack_from("=i", netlink.recv(256, socket.MSG_DONTWAIT), 16)[0]
                assert code == -errno.ENOMEM, os.strerror(-code)
                return
    raise AssertionError("conntrack does not fill up")


def _entry(source: bytes, port: int) -> bytes:
    """IPCTNL_MSG_CT_NEW of a UDP flow from there to 127.0.0.1: include/uapi/linux/netfilter/nfnetlink_conntrack.h."""
    nested, here = 1 << 15, socket.inet_aton("127.0.0.1")

    def tuple_of(one: bytes, other: bytes, from_port: int, to_port: int) -> bytes:
        addresses = _attribute(1, one) + _attribute(2, other)
        ports = _attribute(1, b"\x11") + _attribute(2, struct.pack("!H", from_port)) + _attribute(3, struct.pack("!H", to_port))
        return _attribute(1 | nested, addresses) + _attribute(2 | nested, ports)

    both = _attribute(1 | nested, tuple_of(source, here, port, 9)) + _attribute(2 | nested, tuple_of(here, source, 9, port))
    confirmed_and_assured, an_hour = struct.pack("!I", 4 | 8), struct.pack("!I", 3600)
    body = struct.pack("=BBH", socket.AF_INET, 0, 0) + both + _attribute(3, confirmed_and_assured) + _attribute(7, an_hour)
    # NLM_F_REQUEST | NLM_F_EXCL | NLM_F_CREATE
    return struct.pack("=IHHII", 16 + len(body), 1 << 8, 1 | 0x200 | 0x400, 1, 0) + body


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)
