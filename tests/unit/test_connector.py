"""No SYN leaves without the gate's word for its family: a connector with a gate that a test answers for, and real sockets."""

from __future__ import annotations

import contextlib
import socket
import time
from pathlib import Path
from typing import Dict, Iterator, List, Optional

import pytest
from _tsproxy.linux.addresses import pack
from _tsproxy.linux.sockets import TcpInfo
from _tsproxy.policy.gates import Preserve
from _tsproxy.proxy.connector import Connector
from _tsproxy.proxy.context import RouteContext
from _tsproxy.stats.counters import Counter
from _tsproxy.stats.endings import Ending
from harness import wait_until
from lone_context import lone_context

FAMILIES = (socket.AF_INET, socket.AF_INET6)
LOOPBACK = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
_SYN_SENT = "02"  # include/net/tcp_states.h


class Gate(Preserve):
    """Says what a test told it to, and remembers what it was asked."""

    proves_each_syn = True

    def __init__(self) -> None:
        super().__init__()
        self.answers: Dict[int, Optional[bool]] = {}
        self.asked: List[int] = []
        self.fails = self.absent = False

    def may_connect(self, family: int) -> Optional[bool]:  # type: ignore[override]
        self.asked.append(family)
        return self.answers[family]

    def is_absent(self, family: int) -> bool:
        return self.absent

    def ends(self, family: int, established: bool) -> bool:
        return self.fails


class Session:
    """What the connector reports to."""

    def __init__(self) -> None:
        self.connected: List[socket.SocketType] = []
        self.failed: List[Ending] = []

    def on_connected(self, upstream: socket.SocketType, info: TcpInfo) -> None:
        self.connected.append(upstream)

    def on_connect_failed(self, ending: Ending) -> None:
        self.failed.append(ending)

    def on_bug(self, bug: Exception) -> None:
        raise bug


class Stand(contextlib.ExitStack):
    """A connector to exchanges of both families, which accept nothing by themselves."""

    def __init__(self, *families: socket.AddressFamily) -> None:
        super().__init__()
        self.gate, self.session = Gate(), Session()
        self.context: RouteContext = self.enter_context(lone_context(4096, gate=self.gate))
        self.context.settings = self.context.settings._replace(connect_timeout_ns=60 * 10**9)
        self.listeners = {family: self.listener(family) for family in families}
        upstreams = b"".join(pack(family, listener.getsockname()) for family, listener in self.listeners.items())
        self.connector = Connector(self.session, self.context, upstreams, time.monotonic_ns())
        self.callback(self.end)

    def listener(self, family: socket.AddressFamily) -> socket.socket:
        made = socket.create_server((LOOPBACK[family], 0), family=family, backlog=0)
        made.setblocking(False)
        return self.enter_context(made)

    def has_got_a_syn(self, family: int) -> bool:
        """On loopback the handshake is over when connect(2) returns."""
        with contextlib.suppress(BlockingIOError):
            self.listeners[socket.AddressFamily(family)].accept()[0].close()
            return True
        return False

    def fill(self, family: socket.AddressFamily) -> None:
        """The backlog, so that a SYN gets no answer (tcp_conn_request(), net/ipv4/tcp_input.c)."""
        one = self.enter_context(socket.socket(family))
        one.connect(self.listeners[family].getsockname())

    def waiting(self) -> int:
        """How many SYNs wait for an answer of the exchanges."""
        ports = {f"{listener.getsockname()[1]:04X}" for listener in self.listeners.values()}
        lines = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()[1:]]
        return sum(line[3] == _SYN_SENT and line[2].rpartition(":")[2] in ports for line in lines)

    def sent(self) -> int:
        return int(self.context.counters[Counter.CONNECTS])

    def end(self) -> None:
        for upstream in self.session.connected:
            upstream.close()
        self.connector.close()
        self.context.loop.close_pending()


@pytest.fixture
def both() -> Iterator[Stand]:
    with Stand(*FAMILIES) as stand:
        yield stand


@pytest.fixture
def unanswered() -> Iterator[Stand]:
    """Its one SYN has no answer."""
    with Stand(socket.AF_INET) as stand:
        stand.fill(socket.AF_INET)
        stand.gate.answers = {socket.AF_INET: True}
        stand.connector.connect()
        assert (stand.waiting(), stand.gate.asked) == (1, [socket.AF_INET])
        yield stand


ANSWERS = (True, False, None)


@pytest.mark.parametrize("four", ANSWERS)
@pytest.mark.parametrize("six", ANSWERS)
def test_a_syn_leaves_over_a_family_that_the_gate_allows_and_over_no_other(
    both: Stand, four: Optional[bool], six: Optional[bool]
) -> None:
    both.gate.answers = dict(zip(FAMILIES, (four, six)))
    both.connector.connect()
    used = socket.AF_INET if four else socket.AF_INET6 if six else None
    assert [both.has_got_a_syn(family) for family in FAMILIES] == [family == used for family in FAMILIES]
    assert both.sent() == len(both.session.connected) == int(used is not None)
    assert both.session.failed == ([Ending.POLICY] if four is six is False else [])
    assert set(both.gate.asked) >= ({used} if used else set(FAMILIES))


def test_a_connector_that_waits_for_the_gate_sends_its_syn_when_it_is_allowed_and_not_before(both: Stand) -> None:
    both.gate.answers = dict.fromkeys(FAMILIES)
    both.connector.connect()
    both.connector.on_deadline(time.monotonic_ns())
    assert (both.sent(), both.session.connected) == (0, [])
    both.gate.answers[socket.AF_INET6] = True
    both.connector.on_deadline(time.monotonic_ns())
    assert [both.has_got_a_syn(family) for family in FAMILIES] == [False, True]


@pytest.mark.parametrize("answer", [False, None])
def test_a_syn_without_an_answer_is_not_sent_again_unless_the_gate_is_asked_again(
    unanswered: Stand, answer: Optional[bool]
) -> None:
    unanswered.gate.answers = {socket.AF_INET: answer}
    unanswered.connector.on_deadline(time.monotonic_ns())
    unanswered.context.loop.close_pending()
    wait_until(lambda: not unanswered.waiting(), "the first SYN is given up")
    assert (unanswered.sent(), len(unanswered.gate.asked)) == (1, 2)
    unanswered.gate.answers = {socket.AF_INET: True}
    if answer is None:
        unanswered.connector.on_deadline(time.monotonic_ns())
    assert (unanswered.sent(), unanswered.waiting()) == ((2, 1) if answer is None else (1, 0))


def test_a_policy_that_fails_takes_a_syn_back_and_sends_none(unanswered: Stand) -> None:
    unanswered.gate.answers, unanswered.gate.fails = {socket.AF_INET: False}, True
    unanswered.connector.on_policy_failed()
    unanswered.context.loop.close_pending()
    assert (unanswered.sent(), unanswered.waiting()) == (1, 0)
    assert unanswered.session.failed == [Ending.POLICY]


def test_a_family_that_this_host_lacks_is_no_failure_of_the_policy(both: Stand) -> None:
    both.gate.answers, both.gate.absent = dict.fromkeys(FAMILIES, False), True
    both.connector.connect()
    assert (both.sent(), both.session.failed) == (0, [Ending.CONNECT_FAILED])
