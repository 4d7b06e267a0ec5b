"""A far end that misbehaves: whatever it sends, no timestamp leaves under `strip`, and only the constant under `rewrite`.

Each case is a script for a raw far end. The verdict is the capture alone: every segment of the connections that the
proxy made, its SYN, what follows the close, and what a connection in TIME_WAIT answers.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest
from common.segments import ACK, FIN, PSH, RST, SYN, URG, Segment, icmp_error, mss, packed, timestamp
from far_end import Flow, Peer, fill_conntrack, forget_connections
from harness import ROOT, Proxy, leave_out, reset, wait_until
from namespaces import require_root
from program import command_file, on_time, slow_but
from rules import REWRITE, TSVAL, generated
from wire import Wire

pytestmark = pytest.mark.root

SYSCTL, RULES, CONSTANT, OF_USER = "sysctl", "nftables strip", "nftables rewrite", "nftables strip with --user"
LEVERS = (SYSCTL, RULES, CONSTANT)
FAMILIES = {4: "IPv4", 6: "IPv6"}
EACH = [(lever, family) for lever in LEVERS for family in FAMILIES]
_HALF = 1 << 31


def named(stands: List[Tuple[str, int]]) -> Dict[str, Any]:
    return {"argvalues": stands, "ids": [f"{lever}, {FAMILIES[family]}" for lever, family in stands]}


class Stage:
    """A wire with one lever, a raw far end, and proxies that connect to it."""

    hasty: Proxy  # it gives a connect up after two seconds

    def __init__(self, lever: str, family: int, *options: str) -> None:
        self.lever, self.family, self.options = lever, family, options
        with contextlib.ExitStack() as undo:
            self.wire = undo.enter_context(
                contextlib.closing(Wire(split=lever == SYSCTL, sysctl="0" if lever == SYSCTL else "1"))
            )
            # Else an attacker has to wait for half a second between two answers to what is out of the window.
            self.wire.clean.sysctl("tcp_invalid_ratelimit", "0")
            self.load_rules()
            self.peer = undo.enter_context(contextlib.closing(Peer(self.wire, family)))
            self._begun = 0
            self._clients: List[socket.socket] = []
            undo.callback(self.end)
            self.proxy = self.start()
            self._undo = undo.pop_all()

    def load_rules(self) -> None:
        if self.lever != SYSCTL:
            self.wire.rules(generated(*self.mode))

    @property
    def mode(self) -> Tuple[str, ...]:
        return {CONSTANT: REWRITE, OF_USER: ("--user=nobody",)}.get(self.lever, ())

    def start(self, *options: str) -> Proxy:
        proxy = self.wire.start(self.peer, self.family, *self.mode, *self.options, *options, wrap=on_time())
        proxy.line("start")
        return proxy

    def end(self) -> None:
        """No client is left, and what has come is judged."""
        for client in self._clients:
            if client.fileno() != -1:
                reset(client)
        self._clients.clear()
        self._begun = len(self.peer.seen)

    def connect(self, proxy: Any = None) -> Tuple[socket.socket, Flow]:
        """A client, and the connection that was made for it: its SYN has come."""
        before = len(self.peer.seen)
        client = self.client(proxy)
        return client, self.peer.accept(before)

    def client(self, proxy: Any = None) -> socket.socket:
        self._clients.append(self.wire.connect(proxy or self.proxy))
        return self._clients[-1]

    def served(self, proxy: Any = None) -> Tuple[socket.socket, Flow]:
        """The same, established by a good handshake, and with a byte relayed."""
        before = len(self.peer.seen)
        client = self.client(proxy)
        client.sendall(b"x")
        flow = self.peer.meet(before, lambda flow: flow.send(SYN | ACK, mss() + good(flow)), ACK, size=1)
        flow.send(ACK, good(flow))
        return client, flow

    def leaks(self) -> List[str]:
        """The segments of the proxy's connections that carry what must not leave; those that began before are not judged."""
        came = self.peer.since(self._begun)
        ours = {segment.source for segment in came if segment.flags & (SYN | ACK) == SYN}
        return [str(segment) for segment in came if segment.source in ours and self.is_leak(segment)]

    def is_leak(self, segment: Segment) -> bool:
        """The clock, or a tag that the rules know a connection by."""
        return segment.dscp != 0 or any(self.lever != CONSTANT or tsval != TSVAL for tsval, _ in segment.stamps)

    def close(self) -> None:
        self._undo.close()


@pytest.fixture(scope="module", params=EACH, ids=named(EACH)["ids"])
def shared(request: pytest.FixtureRequest) -> Iterator[Stage]:
    """One for each lever and family; the tests leave it as they found it."""
    with contextlib.closing(Stage(*request.param)) as stage:
        stage.hasty = stage.start("--connect-timeout=2")
        yield stage


@pytest.fixture
def stage(shared: Stage) -> Iterator[Stage]:
    yield shared
    shared.end()


@pytest.fixture
def make_stage() -> Iterator[Callable[..., Stage]]:
    """A stage of the test's own."""
    with contextlib.ExitStack() as stack:
        yield lambda *args: stack.enter_context(contextlib.closing(Stage(*args)))


# What the far end may say


def good(flow: Flow) -> bytes:
    """What a good peer puts into the segment: TSopt if it was offered."""
    return b"" if flow.syn.tsval is None else timestamp(time.monotonic_ns() // 1_000_000, flow.syn.tsval)


def unoffered(flow: Flow) -> bytes:
    """TSopt whether or not it was offered; it echoes what came, and else nothing."""
    return timestamp(time.monotonic_ns() // 1_000_000, flow.syn.tsval or 0)


_PLACES = {"next": 0, "before": -1, "behind": 1, "long ago": -(1 << 20), "far ahead": 1 << 20, "half the space": _HALF}
_KINDS = {
    "SYN": (SYN, b""),
    "SYN-ACK": (SYN | ACK, b""),
    "ACK": (ACK, b""),
    "data": (ACK | PSH, b"unexpected"),
    "urgent data": (ACK | PSH | URG, b"!"),
    "FIN": (FIN | ACK, b""),
    "FIN without ACK": (FIN, b""),
    "SYN and FIN": (SYN | FIN, b""),
    "no flag at all": (0, b"null"),
    "RST": (RST, b""),
    "RST with ACK": (RST | ACK, b""),
}


def probe(flow: Flow, before_each: Callable[[], None] = lambda: None) -> None:
    """Any segment at any place, with TSopt and without. What would end a connection comes last: RST, where it is right."""
    cases = [(kind, place, stamped) for kind in _KINDS for place in _PLACES for stamped in (False, True)]
    sequence, acknowledged = flow.sequence, flow.acknowledged
    for kind, place, stamped in sorted(cases, key=lambda case: case[0].startswith("RST") and case[1] == "next"):
        flags, payload = _KINDS[kind]
        before_each()
        for known in (0, _PLACES[place]) if flags & ACK else (0,):
            options = unoffered(flow) if stamped else b""
            numbers = {"sequence": sequence + _PLACES[place], "acknowledged": acknowledged + known if flags & ACK else 0}
            flow.send(flags, options, payload, **numbers)
    flow.sequence = sequence
    flow.until_answered()


def refused(client: socket.socket) -> None:
    """The proxy ends it."""
    with client, contextlib.suppress(ConnectionResetError):
        assert client.recv(1) == b""


def abandon(client: socket.socket, flow: Flow) -> None:
    """Nothing more is wanted of it."""
    reset(client)
    flow.send(RST | ACK)


# The cases: each begins with a client and leaves nothing that is needed later

Case = Callable[[Stage], None]
CASES: Dict[str, Case] = {}


def case(name: str) -> Callable[[Case], Case]:
    def keep(script: Case) -> Case:
        CASES[name] = script
        return script

    return keep


def after_the_handshake(client: socket.socket, flow: Flow) -> None:
    """Segments into whatever became of it: refused by the proxy, or established."""
    flow.until_answered()
    flow.send(ACK, unoffered(flow))
    flow.send(ACK | PSH, unoffered(flow), b"early")
    flow.until_answered()
    probe(flow)
    abandon(client, flow)
    flow.until_answered()


def answered(flags: int, *parts: Callable[[Flow], bytes], payload: bytes = b"") -> Case:
    """The SYN is answered by one segment; the proxy's host says ACK, RST, or nothing."""

    def script(stage: Stage) -> None:
        client, flow = stage.connect()
        flow.send(flags, b"".join(part(flow) for part in parts), payload)
        after_the_handshake(client, flow)

    return script


_SIZE: Callable[[Flow], bytes] = lambda _: mss()  # noqa: E731
_NO_ECHO: Callable[[Flow], bytes] = lambda _: timestamp(7, 0)  # noqa: E731
_ALL_ZERO: Callable[[Flow], bytes] = lambda _: timestamp(0, 0)  # noqa: E731

CASES.update(
    {
        "a SYN-ACK has a timestamp that was not offered": answered(SYN | ACK, _SIZE, unoffered),
        "a SYN-ACK has a timestamp without echo": answered(SYN | ACK, _SIZE, _NO_ECHO),
        "a SYN-ACK has a timestamp of zeros": answered(SYN | ACK, _ALL_ZERO),
        "a SYN-ACK has two timestamps": answered(SYN | ACK, unoffered, unoffered),
        "a SYN-ACK brings data and a timestamp": answered(SYN | ACK, unoffered, payload=b"fast"),
        "a SYN-ACK brings a FIN and a timestamp": answered(SYN | ACK | FIN, unoffered),
        "a SYN-ACK is urgent and has a timestamp": answered(SYN | ACK | URG | PSH, unoffered),
        "an ACK answers the SYN": answered(ACK, unoffered),
        "a FIN answers the SYN": answered(FIN | ACK, unoffered, payload=b"bye"),
        "a RST answers the SYN": answered(RST | ACK, unoffered),
        "a SYN with a timestamp answers the SYN": answered(SYN, _SIZE, _NO_ECHO),
        "a SYN without a timestamp answers the SYN": answered(SYN, _SIZE),
    }
)


@case("a SYN-ACK acknowledges what was never sent, and a good one follows")
def _(stage: Stage) -> None:
    client, flow = stage.connect()
    for wrong in (-1, 1, _HALF):
        flow.send(SYN | ACK, unoffered(flow), acknowledged=flow.acknowledged + wrong)
    flow.sequence = flow.initial
    flow.send(SYN | ACK, unoffered(flow))
    after_the_handshake(client, flow)


@case("a good handshake is followed by timestamps that were not negotiated")
def _(stage: Stage) -> None:
    client, flow = stage.served()
    for _ in range(3):
        flow.send(ACK | PSH, unoffered(flow), b"filled")
    flow.until_answered()
    client.sendall(b"order")
    flow.expect(ACK, lambda segment: segment.size == 5)
    abandon(client, flow)
    flow.until_answered()


@case("the SYN-ACK comes again and again, with a timestamp")
def _(stage: Stage) -> None:
    client, flow = stage.served()
    for options in (unoffered(flow), b"", timestamp(0, 0)):
        flow.send(SYN | ACK, options, sequence=flow.initial)
        flow.send(SYN, options, sequence=flow.initial)
    flow.until_answered()
    abandon(client, flow)
    flow.until_answered()


@case("an established connection is probed")
def _(stage: Stage) -> None:
    client, flow = stage.served()
    probe(flow)
    abandon(client, flow)
    flow.until_answered()


@case("the far end resets and then probes the closed port")
def _(stage: Stage) -> None:
    client, flow = stage.served()
    flow.send(RST | ACK)
    refused(client)
    probe(flow)


def opened_from_both_sides(stage: Stage, proxy: Any = None) -> Tuple[socket.socket, Flow]:
    """A simultaneous open (RFC 9293, section 3.5), of which the last ACK is still to come."""
    before = len(stage.peer.seen)
    client = stage.client(proxy)
    return client, stage.peer.meet(before, lambda flow: flow.send(SYN, mss() + _NO_ECHO(flow)), SYN | ACK)


@case("a simultaneous open is finished")
def _(stage: Stage) -> None:
    client, flow = opened_from_both_sides(stage)
    flow.send(ACK, unoffered(flow))
    flow.until_answered()
    after_the_handshake(client, flow)


@case("a simultaneous open is finished by a SYN-ACK")
def _(stage: Stage) -> None:
    client, flow = opened_from_both_sides(stage)
    flow.send(SYN | ACK, unoffered(flow), sequence=flow.initial)
    after_the_handshake(client, flow)


@case("a simultaneous open is not finished, the client leaves, and the FIN is answered")
def _(stage: Stage) -> None:
    client, flow = opened_from_both_sides(stage)
    reset(client)
    flow.expect_any([RST, RST | ACK, FIN | ACK])
    flow.until_answered()
    probe(flow)


@case("a simultaneous open is not finished in time, and the FIN is answered")
def _(stage: Stage) -> None:
    client, flow = opened_from_both_sides(stage, stage.hasty)
    refused(client)
    closed_while_it_opened(flow)
    probe(flow)


@case("a simultaneous open is probed in SYN_RECV")
def _(stage: Stage) -> None:
    client, flow = opened_from_both_sides(stage)
    for place in _PLACES.values():
        for kind in ("SYN", "ACK", "data", "RST"):
            flags, payload = _KINDS[kind]
            flow.send(
                flags, unoffered(flow), payload, sequence=flow.sequence + place + 1, acknowledged=flow.acknowledged + place + 1
            )
    flow.until_answered()
    abandon(client, flow)
    flow.until_answered()


def closed_while_it_opened(flow: Flow) -> None:
    """The proxy gave a connection up that is in SYN_RECV: close(2) sends FIN there, if it may (its SYN-ACK may be unheard)."""
    flow.send(ACK, unoffered(flow))
    last = flow.expect_any([FIN | ACK, RST, RST | ACK])
    if last.flags & FIN:
        flow.send(ACK, unoffered(flow))
        flow.send(FIN | ACK, unoffered(flow))
    flow.until_answered()


# The close, from each side, and what answers afterwards


def closed_first(stage: Stage, client: socket.socket, flow: Flow) -> None:
    """The client closes, so the proxy's socket is the one that ends in TIME_WAIT."""
    client.close()
    flow.expect(FIN | ACK)
    flow.send(ACK, good(flow))
    flow.send(FIN | ACK, good(flow))
    flow.expect(ACK, lambda segment: (segment.acknowledged - flow.sequence) % _HALF == 0)


def closed_last(stage: Stage, client: socket.socket, flow: Flow) -> None:
    """The far end closes first: LAST_ACK, and then nothing is left."""
    flow.send(FIN | ACK, good(flow))
    assert client.recv(1) == b""
    client.close()
    flow.expect(FIN | ACK)


def closed_at_once(stage: Stage, client: socket.socket, flow: Flow) -> None:
    """Both FINs cross: CLOSING, then TIME_WAIT."""
    client.close()
    fin = flow.expect(FIN | ACK)
    flow.send(FIN | ACK, good(flow), acknowledged=fin.sequence)
    flow.send(ACK, good(flow))
    flow.until_answered()


def closed_by_one(stage: Stage, client: socket.socket, flow: Flow) -> None:
    """The far end acknowledges the FIN and closes nothing: FIN_WAIT2."""
    client.close()
    flow.expect(FIN | ACK)
    flow.send(ACK, good(flow))


def unanswered(stage: Stage, client: socket.socket, flow: Flow) -> None:
    """The far end does not acknowledge the FIN, which is sent again: FIN_WAIT1."""
    client.close()
    flow.expect(FIN | ACK)
    flow.expect(FIN | ACK)


CLOSES = (closed_first, closed_last, closed_at_once, closed_by_one, unanswered)


def close_and_probe(close: Callable[..., None]) -> Case:
    def script(stage: Stage) -> None:
        client, flow = stage.served()
        close(stage, client, flow)
        probe(flow)
        flow.send(RST | ACK)
        flow.until_answered()

    return script


CASES.update({f"{close.__name__.replace('_', ' ')}, and the port is probed": close_and_probe(close) for close in CLOSES})


@case("a bare SYN comes to a port in TIME_WAIT")
def _(stage: Stage) -> None:
    client, flow = stage.served()
    closed_first(stage, client, flow)
    flow.send(SYN, mss(), sequence=flow.sequence + (1 << 24))
    flow.until_answered()
    probe(flow)


@case("a connection in TIME_WAIT is reset and probed")
def _(stage: Stage) -> None:
    client, flow = stage.served()
    closed_first(stage, client, flow)
    flow.send(RST, sequence=flow.sequence + (1 << 20))  # out of the window: for conntrack it may be the end
    flow.send(RST)
    flow.until_answered()
    probe(flow)


@case("the window is closed and probed, and the connection given up")
def _(stage: Stage) -> None:
    client, flow = stage.served()
    flow.send(ACK, good(flow), window=0)
    flow.until_answered()
    client.sendall(b"more")
    flow.expect(ACK, lambda segment: segment.sequence == flow.acknowledged - 1 or segment.size > 0)
    probe(flow)
    abandon(client, flow)
    flow.until_answered()


@case("ICMP errors come for a SYN, for data and for a closed connection")
def _(stage: Stage) -> None:
    client, flow = stage.connect()
    upset(stage, flow)
    reset(client)
    client, flow = stage.served()
    upset(stage, flow)
    client.close()
    flow.until_answered()
    upset(stage, flow)


def upset(stage: Stage, flow: Flow) -> None:
    about = packed(flow.came()[-1])
    kinds = (3, 4, 5, 11, 12) if stage.family == 4 else (1, 2, 3, 4)
    for kind in kinds:
        for code in range(16):
            stage.peer.put_packet(icmp_error(kind, code, about, 600 if code == 4 else 1280))
    flow.until_answered()


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_far_end_gets_no_timestamp_when(stage: Stage, name: str) -> None:
    CASES[name](stage)
    assert stage.leaks() == []
    assert stage.proxy.process.poll() is None


# What can make the rules lose their memory of a connection


def flushed(stage: Stage, flow: Flow) -> Callable[[], None]:
    """The conntrack table is emptied before each segment."""

    def forget() -> None:
        with stage.wire.clean:
            forget_connections()

    return forget


def untracked(stage: Stage, flow: Flow) -> Callable[[], None]:
    """Nothing is tracked from now on."""
    chains = [f"chain {hook} {{\n type filter hook {hook} priority raw; notrack\n }}" for hook in ("prerouting", "output")]
    stage.wire.rules("table inet off {{\n{}\n}}\n".format("\n".join(chains)))
    return flushed(stage, flow)


def reloaded(stage: Stage, flow: Flow) -> Callable[[], None]:
    """The rules are loaded again while connections live."""
    stage.load_rules()
    return lambda: None


def timed_out(stage: Stage, flow: Flow) -> Callable[[], None]:
    """Conntrack has kept the connection for a second: there is no entry any more."""
    entry = f"sport={flow.theirs[1]} "
    wait_until(lambda: entry not in stage.wire.clean.run("cat", "/proc/net/nf_conntrack"), "conntrack forgets")
    return lambda: None


def full(stage: Stage, flow: Flow) -> Callable[[], None]:
    """Others have filled the table: these connections have no entry and get none. What asks whether all came is not tracked."""
    most = int(stage.wire.clean.run("cat", "/proc/sys/net/netfilter/nf_conntrack_max"))
    if not 0 < most <= 1 << 20:
        leave_out(f"nf_conntrack_max is {most}: a full conntrack is NOT tested here")
    chains = [
        f"chain {hook} {{\n type filter hook {hook} priority raw; tcp {end} 1 notrack\n }}"
        for hook, end in (("prerouting", "dport"), ("output", "sport"))
    ]
    stage.wire.rules("table inet asking {{\n{}\n}}\n".format("\n".join(chains)))
    with stage.wire.clean:
        forget_connections()
        fill_conntrack()
    begun = len(stage.peer.seen)
    flow.send(ACK, unoffered(flow), sequence=flow.sequence - (1 << 20))
    flow.until_answered()
    assert flow.theirs not in {segment.source for segment in stage.peer.since(begun)}, "Linux drops what has no entry"
    return lambda: None


FORGETTING = {
    "conntrack is full": full,
    "conntrack is flushed": flushed,
    "conntrack does not track": untracked,
    "the rules are loaded again": reloaded,
    "conntrack times out": timed_out,
}
_SHORT = "for f in /proc/sys/net/netfilter/nf_conntrack_tcp_timeout_*; do echo 1 >$f; done"


@pytest.mark.parametrize("name", FORGETTING)
@pytest.mark.parametrize(("lever", "family"), **named([stand for stand in EACH if stand[0] != SYSCTL]))
def test_closed_connections_show_no_clock_when(make_stage: Callable[..., Stage], lever: str, family: int, name: str) -> None:
    stage = make_stage(lever, family)
    if FORGETTING[name] is timed_out:
        stage.wire.clean.run("sh", "-c", _SHORT)
    flows = []
    for close in CLOSES:
        client, flow = stage.served()
        close(stage, client, flow)
        flows.append(flow)
    client, live = stage.served()
    forget = FORGETTING[name](stage, flows[0])
    for flow in [*flows, live]:
        probe(flow, forget)
    abandon(client, live)
    live.until_answered()
    assert stage.leaks() == []


# The process is killed


@pytest.mark.parametrize(("lever", "family"), **named([*EACH, (OF_USER, 4), (OF_USER, 6)]))
def test_a_killed_proxy_leaves_orphans_that_show_no_clock(make_stage: Callable[..., Stage], lever: str, family: int) -> None:
    stage = make_stage(lever, family)
    served = [stage.served() for _ in range(2)]
    client, half = served[0]
    half.send(FIN | ACK, good(half))
    assert client.recv(1) == b""
    opening, silent = opened_from_both_sides(stage), stage.connect()  # last: nobody answers them, so others follow in 0.75 s
    for pid in stage.proxy.family():
        with contextlib.suppress(ProcessLookupError):  # it may have gone with its parent
            os.kill(pid, signal.SIGKILL)
    stage.proxy.process.wait()
    for _, flow in (opening, *served):
        closed_while_it_opened(flow)
    if lever != SYSCTL:
        flushed(stage, flow)()
    for _, flow in (silent, opening, *served):
        probe(flow)
    assert stage.leaks() == []


# The lever is moved while a SYN waits for its answer


@pytest.mark.parametrize("value", ["1", "2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_syn_is_sent_again_under_a_sysctl_that_was_flipped(
    make_stage: Callable[..., Stage], family: int, value: str
) -> None:
    stage = make_stage(SYSCTL, family, "--connect-timeout=3")
    client, _ = stage.connect()
    stage.wire.clean.sysctl("tcp_timestamps", value)
    refused(client)
    line = stage.proxy.line("connection")
    assert stage.leaks() == []
    assert line["reason"] == "policy"


@pytest.mark.parametrize("value", ["1", "2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_relayed_and_nothing_leaks_when_the_sysctl_was_on_for_a_while(
    make_stage: Callable[..., Stage], family: int, value: str
) -> None:
    """On from before the retransmission is due until after it, and off again before the far end answers."""
    stage = make_stage(SYSCTL, family, "--connect-timeout=10")
    client, flow = stage.connect()
    stage.wire.clean.sysctl("tcp_timestamps", value)
    client.sendall(b"order")
    early = len(stage.peer.seen)

    def moved_on() -> bool:
        return bool(stage.peer.since(early)) or bool(select.select([client], [], [], 0)[0])

    wait_until(moved_on, "another SYN, or the refusal")
    stage.wire.clean.sysctl("tcp_timestamps", "0")
    flow.send(SYN | ACK, mss())
    flow.until_answered()
    reset(client)
    assert stage.leaks() == []
    assert not any(segment.size for segment in stage.peer.since(0))


EVIDENCE_S, MARGIN_S = 0.1, 0.4


@pytest.mark.parametrize(("lever", "family"), **named([stand for stand in EACH if stand[0] != SYSCTL]))
def test_no_syn_with_a_timestamp_leaves_once_the_rules_are_gone_and_the_evidence_is_old(
    make_stage: Callable[..., Stage], lever: str, family: int
) -> None:
    stage = make_stage(lever, family, "--connect-timeout=3")
    waiting = [stage.connect()[0] for _ in range(3)]
    stage.wire.clean.run("nft", "delete", "table", "inet", "tsproxy")
    gone = time.time()
    while time.time() < gone + EVIDENCE_S + MARGIN_S:  # new ones, as long as the evidence may hold
        with contextlib.suppress(ConnectionResetError):  # refused at once
            waiting.append(stage.client())
        time.sleep(0.01)
    for client in waiting:
        refused(client)
    late = [
        (round(at - gone, 3), str(s)) for s, at in stage.peer.seen if at > gone + EVIDENCE_S + MARGIN_S and stage.is_leak(s)
    ]
    assert late == []


# By chance


@pytest.fixture
def python(tmp_path: Path) -> str:
    """A Python whose scripts are on time."""
    return command_file(tmp_path / "python", *on_time(), sys.executable)


def hostile(*words: str) -> subprocess.CompletedProcess[str]:
    require_root()
    command = [sys.executable, str(ROOT / "bench/hostile.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)


@pytest.mark.parametrize("lever", slow_but(["rewrite"], ["sysctl", "strip", "rewrite"]))
def test_a_fuzzed_exchange_gets_no_timestamp(lever: str, python: str) -> None:
    done = hostile(f"--lever={lever}", "--seconds=3", f"--python={python}")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["violations"], result["capture_drops"]) == (0, 0)
    assert result["segments_sent"] > 500
    assert result["relayed"] > 0


def test_a_local_flood_of_all_that_listens_is_no_drift(python: str) -> None:
    done = hostile("--lever=strip", "--family=4", "--seconds=3", "--flood", f"--python={python}")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["floods"] > 0


_WITHOUT_RULES = f"""
import runpy, sys
if "generate" not in sys.argv:
    sys.argv.append("--timestamps=preserve")
    runpy.run_path({str(ROOT / "tsproxy.py")!r}, run_name="__main__")
"""


def test_the_fuzzer_sees_timestamps_where_there_are_some_and_tells_what_led_to_them(tmp_path: Path) -> None:
    program = tmp_path / "tsproxy.py"
    program.write_text(_WITHOUT_RULES)
    done = hostile("--lever=strip", "--family=4", "--seconds=1", "--seed=7", f"--tsproxy={program}")
    assert done.returncode == 1
    assert json.loads(done.stdout)["violations"] > 0
    assert "hostile: violation: seed 7: 10." in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("word", ["--lever=none", "--seconds=0", "--family=5", "more"])
def test_a_wrong_word_to_the_fuzzer_costs_one_line_and_exit_2(word: str) -> None:
    done = hostile(word)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("hostile.py: error: ")
