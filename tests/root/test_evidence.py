"""What a connect() rests on: looks at loopback that nobody else can fill or make late, for each family by itself."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Sequence, Tuple

import pytest
from _tsproxy.linux import bpf, sockets, wakeup
from _tsproxy.linux.sockets import TcpInfo
from _tsproxy.policy import gates, rehearsal
from _tsproxy.policy.evidence import Answer, Evidence
from _tsproxy.policy.inspector import Inspector
from _tsproxy.policy.levers import Lever, Policy
from harness import CHECKOUT, ROOT, Exchange, Line, Proxy, echo, receive_exactly, wait_until
from name_server import Names, asking_here
from namespaces import Namespace
from rules import REWRITE, TSVAL, generated, looked_at
from unprivileged import BECOME
from wire import UPSTREAM, Sniffer, Wire

pytestmark = pytest.mark.root

BOTH = (socket.AF_INET, socket.AF_INET6)
OUTPUT = "type filter hook output priority mangle; policy accept;"
INPUT = "type filter hook input priority mangle; policy accept;"


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    with contextlib.closing(Namespace()) as found:
        yield found


def table(out: Sequence[str], into: Sequence[str] = ()) -> str:
    chains = [f"  chain out {{\n    {OUTPUT}\n    " + "\n    ".join(out) + "\n  }"]
    if into:
        chains.append(f"  chain in {{\n    {INPUT}\n    " + "\n    ".join(into) + "\n  }")
    return "table inet tsproxy {\n" + "\n".join(chains) + "\n}\n"


# Rules, and a far end that misbehaves

SYNS_ALONE = "meta priority 0:4 tcp flags & (fin|syn|rst|ack) == syn reset tcp option timestamp"
MARKED = "meta priority 0:4 ct mark set 0x75"
CONSTANT = f"tcp option timestamp tsval set {TSVAL}"
NO_ECHO = "ct mark 0x75 tcp option timestamp tsecr set 0"
STRIP, CONST = Policy("strip", families=BOTH), Policy("rewrite", TSVAL, families=BOTH)
MARK_UNKNOWN = f"{rehearsal.TIME_WAIT} (they do not know the mark of its answer, DSCP 3)"
UNMARK = ["ip dscp set 0", "ip6 dscp set 0"]

# What is wrong with the rules, seen with CAP_NET_ADMIN, and without any right.
RULES = {
    "ours, strip": (STRIP, generated(), "", ""),
    "ours, rewrite": (CONST, generated(*REWRITE), "", ""),
    "each tagged segment": (STRIP, table(["meta priority 0:4 reset tcp option timestamp"]), "", rehearsal.UNVERIFIED),
    "SYNs and SYN-ACKs, both ways": (
        STRIP,
        table(
            ["meta priority 0:4 tcp flags & syn == syn ct mark set 0x75 reset tcp option timestamp"],
            ["ct mark 0x75 tcp flags & syn == syn reset tcp option timestamp"],
        ),
        "",
        "",
    ),
    "SYNs alone": (STRIP, table([SYNS_ALONE]), rehearsal.CROSSING, rehearsal.CROSSING),
    "SYNs and SYN-ACKs on their way out": (
        STRIP,
        table(["meta priority 0:4 tcp flags & syn == syn reset tcp option timestamp"]),
        rehearsal.UNASKED,
        rehearsal.UNVERIFIED,
    ),
    "all but resets": (
        STRIP,
        table(["meta priority 0:4 tcp flags & rst != rst reset tcp option timestamp"]),
        rehearsal.RESET,
        rehearsal.UNVERIFIED,
    ),
    "rewrite by a mark that conntrack loses": (
        CONST,
        table([MARKED, f"meta priority 0:4 {CONSTANT}", f"ct mark 0x75 {CONSTANT}"], [NO_ECHO]),
        MARK_UNKNOWN,
        MARK_UNKNOWN,
    ),
    "rewrite that only seems to know TIME_WAIT": (
        CONST,
        table([MARKED, f"meta priority 0:4 {CONSTANT}", f"ct mark 0x75 {CONSTANT}", *UNMARK], [NO_ECHO]),
        rehearsal.TIME_WAIT,
        "",
    ),
    "rewrite of all but data": (
        CONST,
        table([MARKED, f"meta priority 0:4 tcp flags & psh != psh {CONSTANT}", *UNMARK], [NO_ECHO]),
        rehearsal.UNASKED,
        rehearsal.DATA,
    ),
}
LOOK = """
import sys; sys.path.insert(0, sys.argv[1])
from _tsproxy.policy.inspector import Inspector
from _tsproxy.policy.levers import Policy
for _ in range(20):
    found = Inspector(Policy(sys.argv[2], int(sys.argv[3]), families=(2,))).check().families[2]
    if found.syn: break
print(found.problem)
"""


@pytest.fixture(scope="module")
def readable() -> Iterator[Path]:
    """lib/ where everybody may read it."""
    with tempfile.TemporaryDirectory() as directory:
        shutil.copytree(ROOT / "lib", Path(directory) / "lib", ignore=shutil.ignore_patterns("__pycache__"))
        Path(directory).chmod(0o755)
        yield Path(directory) / "lib"


@pytest.mark.parametrize("rights", ["with CAP_NET_ADMIN", "without"])
@pytest.mark.parametrize("kind", RULES)
def test_rules_have_to_hold_against_what_a_far_end_can_do_not_for_our_syn_alone(
    namespace: Namespace, readable: Path, kind: str, rights: str
) -> None:
    """On IPv4: TIME_WAIT keeps a socket's priority on IPv6."""
    policy, rules, *leaks = RULES[kind]
    leak = leaks[rights == "without"]
    namespace.run("nft", "-f", "-", input=rules)
    python = [sys.executable] if rights != "without" else [*BECOME, "/usr/bin/python3"]
    said = namespace.run(*python, "-I", "-S", "-c", LOOK, str(readable), policy.mode, str(policy.tsval))
    assert said == (f"{rehearsal.MISBEHAVES}: {leak}\n" if leak else "\n")


def test_every_packet_by_iptables_holds_as_well(namespace: Namespace) -> None:
    strip = ["-t", "mangle", "-A", "OUTPUT", "-p", "tcp", "-j", "TCPOPTSTRIP", "--strip-options", "timestamp"]
    for command in ("iptables", "ip6tables"):
        namespace.run(command, *strip)
    with namespace, contextlib.closing(Inspector(STRIP)) as inspector:
        assert looked_at(inspector).lever is Lever.NFTABLES


def test_rules_of_an_older_tsproxy_are_refused_with_what_to_load_instead(namespace: Namespace) -> None:
    namespace.run("nft", "-f", "-", input=table([SYNS_ALONE]))
    command = [*namespace.enter, *CHECKOUT, "-t", "127.0.0.1:9"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (78, "")
    assert rehearsal.MISBEHAVES in done.stderr
    assert "tsproxy.py generate nftables -t 127.0.0.1:9 | nft -f -" in done.stderr
    namespace.run("nft", "-f", "-", input=generated())
    with namespace, contextlib.closing(Inspector(STRIP)) as inspector:
        assert looked_at(inspector).lever is Lever.NFTABLES


@pytest.mark.parametrize("family", BOTH)
@pytest.mark.parametrize(("stamped", "allowed", "fits"), [(True, None, False), (False, None, True), (True, 1, False)])
def test_a_program_lets_in_what_fits_or_what_does_not(
    namespace: Namespace, family: int, stamped: bool, allowed: Any, fits: bool
) -> None:
    """By timestamps that this kernel really writes."""
    namespace.sysctl("tcp_timestamps", str(int(stamped)))
    came: Dict[bool, bool] = {}
    for fitting in (True, False):
        with namespace, socket.socket(family) as listener, socket.socket(family) as client:
            listener.bind(("127.0.0.1" if family == socket.AF_INET else "::1", 0))
            listener.listen()
            client.connect(listener.getsockname())
            server, _ = listener.accept()
            with server:
                bpf.attach(server, bpf.by_timestamp(allowed, fitting=fitting))
                client.sendall(b"x")
                server.setblocking(False)
                wait_until(lambda: has_come(server) or was_sent_again(client), "the byte came, or was not let in")  # noqa: B023
                came[fitting] = has_come(server)
            sockets.reset_on_close(client)
    assert came == {fits: True, not fits: False}


def has_come(server: socket.socket) -> bool:
    with contextlib.suppress(BlockingIOError):
        return server.recv(1, socket.MSG_PEEK) == b"x"
    return False


def was_sent_again(client: socket.socket) -> bool:
    """Whether a segment had no ACK for a retransmission timeout: tcpi_retransmits (linux/tcp.h) counts them in a row."""
    return client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)[2] > 0


# Each family by itself


def test_every_connect_is_covered_by_evidence_of_its_own_family() -> None:
    """Every gate of a lever, every answer, both families: no SYN but by what was seen of that family."""
    evidence, asked = Evidence.create(), {family: wakeup.create() for family in BOTH}
    clean = Namespace(tcp_timestamps="0")
    with contextlib.closing(clean), clean:
        for lever in (Lever.SYSCTL, Lever.NFTABLES):
            gate = gates.gate_for(lever, STRIP, evidence, asked)
            for four, six in itertools.product(Answer, Answer):
                now = time.monotonic_ns()
                for family, answer in zip(BOTH, (four, six)):
                    evidence.publish(family, answer, now)
                allowed = {family: gate.may_connect(family) for family in BOTH}
                assert allowed == {family: ALLOWED[answer] for family, answer in zip(BOTH, (four, six))}
            for family in BOTH:
                evidence.publish(family, Answer.HOLDS, time.monotonic_ns() - 2 * gates.MAX_AGE_NS)
            assert [gate.may_connect(family) for family in BOTH] == [True if lever is Lever.SYSCTL else None] * 2
            if isinstance(gate, gates.StripBySysctl):
                gate._sysctl.close()
    os.close(evidence.fd)
    for wake in asked.values():
        wake.close()


ALLOWED = {Answer.HOLDS: True, Answer.FAILS: False, Answer.ABSENT: False, Answer.UNSEEN: None, Answer.NEVER: None}


def test_a_connection_whose_syn_left_twice_is_not_proved() -> None:
    evidence, asked = Evidence.create(), {family: wakeup.create() for family in BOTH}
    clean = Namespace(tcp_timestamps="0")
    with contextlib.closing(clean), clean, contextlib.closing(Exchange(echo)) as far, socket.socket() as client:
        client.connect((far.host, far.port))
        for lever in (Lever.SYSCTL, Lever.NFTABLES):
            gate = gates.gate_for(lever, STRIP, evidence, asked)
            assert gate.may_relay(client, TcpInfo(False, 0, 0, 1, False, False))
            assert not gate.may_relay(client, TcpInfo(False, 0, 1, 1, False, False))
            assert not gate.may_relay(client, TcpInfo(True, 0, 0, 1, False, False))
            if isinstance(gate, gates.StripBySysctl):
                gate._sysctl.close()
    os.close(evidence.fd)
    for wake in asked.values():
        wake.close()


class Moving(contextlib.ExitStack):
    """An exchange at one address, known by a name whose records a test changes; and later at another, same port."""

    def __init__(self, host: Namespace, tmp_path: Path, home: str) -> None:
        super().__init__()
        self.host = host
        with host:
            self.names = self.enter_context(contextlib.closing(Names(home)))
            self.exchange = self.enter_context(contextlib.closing(Exchange(echo, host=home)))
        self._wrap = asking_here(tmp_path)

    def start(self, *options: str) -> Proxy:
        words = ["-t", f"exchange.test:{self.exchange.port}", "-p0", "--metrics-interval=0", *options]
        proxy = Proxy([*self.host.enter, *self._wrap, *CHECKOUT], *words)
        self.callback(proxy.close)
        return proxy

    def move(self, address: str) -> Exchange:
        """It is there now, and only there."""
        self.names.address = address
        self.exchange.close()
        with self.host:
            self.exchange = Exchange(echo, host=address, port=self.exchange.port)
        return self.enter_context(contextlib.closing(self.exchange))

    def ask(self, proxy: Proxy) -> bool:
        """Whether a new client is served."""
        with self.host, contextlib.suppress(ConnectionResetError, BrokenPipeError), proxy.connect() as client:
            client.sendall(b"order")
            return receive_exactly(client, 5) == b"order"
        return False


MOVES = {"IPv6": ("127.0.0.2", "::1", "ip", "ip6 "), "IPv4": ("::1", "127.0.0.2", "ip6", "ip ")}


@pytest.mark.parametrize("options", [(), REWRITE], ids=["strip", "rewrite"])
@pytest.mark.parametrize("family", MOVES)
def test_a_name_that_moves_to_a_family_without_rules_gets_no_syn_there(
    namespace: Namespace, tmp_path: Path, family: str, options: Tuple[str, ...]
) -> None:
    home, away, kind, foreign = MOVES[family]
    rules = "".join(line + "\n" for line in generated(*options).splitlines() if f" {foreign}" not in line)
    namespace.run("nft", "-f", "-", input=rules.replace("table inet", f"table {kind}"))
    with Moving(namespace, tmp_path, home) as moving:
        proxy = moving.start(*options)
        assert moving.ask(proxy)
        there = moving.move(away)
        refused = f"refused over {family}"
        wait_until(lambda: not moving.ask(proxy) and proxy.metrics()["upstream_cx_policy_refused_total"], refused)
        drift = proxy.line("timestamps_drift")
        assert f"{family} SYN with mss" in drift["message"]
        assert there._open == [], "a SYN has left"
        moving.move(home)
        wait_until(lambda: moving.ask(proxy), "served again", 60)
        served = [line for line in proxy.lines if line["event"] == "connection" and line["reason"] == "closed"]
        assert {(line["upstream_address"], line["upstream_timestamps"]) for line in served} == {(home, bool(options))}


def ipv6(namespace: Namespace, on: bool) -> None:
    namespace.run("sysctl", "-wq", f"net.ipv6.conf.all.disable_ipv6={int(not on)}")


@pytest.mark.parametrize("lever", ["sysctl", "nftables"])
def test_a_family_that_is_switched_off_is_left_out_and_taken_up_when_it_comes(namespace: Namespace, lever: str) -> None:
    if lever == "sysctl":
        namespace.sysctl("tcp_timestamps", "0")
    else:
        namespace.run("nft", "-f", "-", input=generated())
    ipv6(namespace, on=False)
    with namespace:
        four = Exchange(echo)
    proxy = Proxy([*namespace.enter, *CHECKOUT], "-t", f"[::1]:{four.port}", "-t", four.target, "-p0", "--metrics-interval=0")
    with contextlib.closing(proxy), contextlib.closing(four):
        assert "IPv6 is left out" in proxy.line("warning")["message"]
        assert served_at(namespace, proxy) == "127.0.0.1"
        ipv6(namespace, on=True)
        with namespace:
            six = Exchange(echo, host="::1", port=four.port)
        with contextlib.closing(six):
            assert proxy.line("warning", lambda line: line["level"] == "info")["message"] == "IPv6 is in use again"
            wait_until(lambda: served_at(namespace, proxy) == "::1", "over IPv6 now")
            ipv6(namespace, on=False)
            proxy.line("warning", lambda line: "IPv6 is left out" in line["message"], after=len(proxy.lines))
            assert served_at(namespace, proxy) == "127.0.0.1", "as the lines say: no client is refused"
        assert proxy.count("timestamps_drift") == 0
        assert {line["reason"] for line in proxy.lines if line["event"] == "connection"} == {"closed"}


def served_at(namespace: Namespace, proxy: Proxy) -> str:
    """The upstream address of a new connection."""
    seen = proxy.count("connection")
    with namespace:
        client = proxy.connect()
    with client:
        client.sendall(b"x")
        assert receive_exactly(client, 1) == b"x"
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
    lines = [proxy.line("connection", lambda line: line["connection_id"] > seen)]
    return str(lines[-1]["upstream_address"])


def test_where_no_target_has_an_address_of_a_family_that_is_there_it_may_be_tried_again_later(namespace: Namespace) -> None:
    namespace.sysctl("tcp_timestamps", "0")
    ipv6(namespace, on=False)
    done = subprocess.run([*namespace.enter, *CHECKOUT, "-t", "[::1]:9"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (75, 1)
    assert "no interface has an IPv6 address" in done.stderr


# Other users of the host

FLOOD = """
import itertools, random, select, socket, sys
held = []
def ports():
    for path in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in open(path).readlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            if state == "0A":
                yield (socket.AF_INET6 if path.endswith("6") else socket.AF_INET), int(local.split(":")[1], 16)
print("flooding", flush=True)
for n in itertools.count():
    for family, port in [*ports(), *((socket.AF_INET, random.randrange(1, 65536)) for _ in range(50))]:
        if port in map(int, sys.argv[1:]):
            continue
        sock = socket.socket(family)
        sock.setblocking(False)
        sock.connect_ex(("127.0.0.1" if family == socket.AF_INET else "::1", port))
        held.append(sock)
    while len(held) > 300:
        held.pop(0).close()
"""


@contextlib.contextmanager
def flooding(namespace: Namespace, *but: int) -> Iterator[None]:
    """A user without rights connects to all that listens on loopback, but for these ports, and to whatever may."""
    command = [*namespace.enter, *BECOME, "/usr/bin/python3", "-I", "-S", "-c", FLOOD, *map(str, but)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout
    assert process.stdout.readline() == b"flooding\n"
    try:
        yield
        assert process.poll() is None, "the flooder has ended"
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("options", [(), REWRITE], ids=["strip", "rewrite"])
def test_a_local_user_who_floods_loopback_reaches_no_look_and_ends_nothing(
    make_wire: Callable[..., Wire], options: Tuple[str, ...]
) -> None:
    wire = make_wire(split=False)
    wire.rules(generated(*options))
    far = wire.far_end(4, echo)
    proxy = wire.start(far, 4, *options)
    kept = wire.connect(proxy)
    with kept, flooding(wire.clean, proxy.address[1]):
        began = time.monotonic()
        while time.monotonic() - began < 6:  # three rounds of the two-second look
            with wire.connect(proxy) as client:
                client.sendall(b"order")
                assert receive_exactly(client, 5) == b"order"
        kept.sendall(b"still")
        assert receive_exactly(kept, 5) == b"still"
    assert proxy.count("timestamps_drift") == 0
    proxy.metrics()
    assert {line["reason"] for line in proxy.lines if line["event"] == "connection"} <= {"closed"}
    assert proxy.stop() == 0


def test_a_family_that_can_not_be_looked_at_keeps_the_other_from_nothing(make_wire: Callable[..., Wire]) -> None:
    wire = make_wire(split=False)
    wire.rules(generated())
    four, six = wire.far_end(4, echo), wire.far_end(6, echo)
    wire.rules("table ip6 lossy {\n chain in {\n type filter hook input priority -500\n iifname lo drop\n }\n}\n")
    proxy = wire.start(four, 4, "-t", six.target, "--connect-timeout=3")
    for _ in range(8):
        with wire.connect(proxy) as client:
            client.sendall(b"order")
            assert receive_exactly(client, 5) == b"order"
    assert proxy.stop() == 0
    assert {line["upstream_address"] for line in proxy.lines if line["event"] == "connection"} == {four.host}


def test_no_syn_of_the_witness_leaves_by_the_uplink_where_lo_lacks_its_address(make_wire: Callable[..., Wire]) -> None:
    """With ip_nonlocal_bind, as hosts with VRRP have it, any address can be bound to; the routes would lead elsewhere."""
    wire = make_wire(split=False)
    for family, address in (("ipv4", "127.0.0.1/8"), ("ipv6", "::1/128")):
        wire.clean.run("sysctl", "-wq", f"net.{family}.ip_nonlocal_bind=1")
        wire.clean.run("ip", "address", "del", address, "dev", "lo")
    wire.clean.run("ip", "route", "add", "default", "via", "10.2.0.2")
    wire.clean.run("ip", "-6", "route", "add", "default", "via", "fd02::2")
    sniffer = Sniffer(wire.exchange, UPSTREAM)
    try:
        with wire.clean, contextlib.closing(Inspector(STRIP)) as inspector:
            policy_check = inspector.check()
        assert {found.answer for found in policy_check.families.values()} == {Answer.UNSEEN}
        assert sniffer.stop() == []
    finally:
        sniffer.close_if_running()


LOSSY = "table inet lossy {\n chain in {\n type filter hook input priority -500\n iifname lo tcp dport != 0 drop\n }\n}\n"


def is_unseen(line: Line) -> bool:
    return "can't be looked at now" in line["message"]


def test_under_the_sysctl_a_look_that_fails_itself_keeps_nobody_waiting(make_wire: Callable[..., Wire]) -> None:
    wire = make_wire(split=True, sysctl="0")
    proxy = wire.start(wire.far_end(4, echo), 4)
    with wire.connect(proxy):
        wire.rules(LOSSY)
        assert "the sysctl's value decides" in proxy.line("warning", is_unseen)["message"]
        with wire.connect(proxy) as client:
            client.sendall(b"order")
            assert receive_exactly(client, 5) == b"order"


@pytest.mark.parametrize("options", [(), REWRITE], ids=["strip", "rewrite"])
def test_a_look_that_fails_itself_ends_nothing_and_new_clients_wait_for_the_next(
    make_wire: Callable[..., Wire], options: Tuple[str, ...]
) -> None:
    wire = make_wire(split=False)
    wire.rules(generated(*options))
    far = wire.far_end(4, echo)
    proxy = wire.start(far, 4, "--connect-timeout=30", *options)
    with wire.connect(proxy) as kept:
        wire.rules(LOSSY)
        warning = proxy.line("warning", is_unseen)
        assert "new connections wait for it" in warning["message"]
        late = wire.connect(proxy)
        kept.sendall(b"still")
        assert receive_exactly(kept, 5) == b"still"
        late.sendall(b"order")
        late.settimeout(0.5)
        with pytest.raises(socket.timeout):
            late.recv(1)
        wire.clean.run("nft", "delete", "table", "inet", "lossy")
        late.settimeout(20)
        with late:
            assert receive_exactly(late, 5) == b"order"
        assert "can be looked at again" in proxy.line("warning", lambda line: line["level"] == "info")["message"]
    assert proxy.count("timestamps_drift") == 0
    assert proxy.stop() == 0


def test_a_client_that_waits_for_evidence_in_vain_is_refused_after_the_connect_timeout(make_wire: Callable[..., Wire]) -> None:
    wire = make_wire(split=False)
    wire.rules(generated())
    far = wire.far_end(4, echo)
    proxy = wire.start(far, 4, "--connect-timeout=1")
    proxy.line("start")
    wire.rules(LOSSY)
    proxy.line("warning", is_unseen)
    with wire.connect(proxy) as client, pytest.raises(ConnectionResetError):
        client.recv(1)
    line = proxy.line("connection")
    assert (line["reason"], line["upstream_timestamps"], line["connect_us"]) == ("policy", None, None)
    assert far._open == []


def test_a_drain_is_not_delayed_by_a_look_that_does_not_end(make_wire: Callable[..., Wire]) -> None:
    wire = make_wire(split=False)
    wire.rules(generated())
    proxy = wire.start(wire.far_end(4, echo), 4)
    proxy.line("start")
    wire.rules(LOSSY)
    proxy.line("warning", is_unseen)
    assert proxy.stop() == 0


def test_the_witness_has_another_address_and_port_each_time() -> None:
    code = (
        "import sys, socket, time; sys.path.insert(0, sys.argv[1])\n"
        "from _tsproxy.policy import witness\n"
        "with witness.listening(socket.AF_INET) as one: print(one.getsockname()[0])\n"
    )
    command = [sys.executable, "-c", code, str(ROOT / "lib")]
    names = {subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(4)}
    assert len(names) > 1
    assert all(name.startswith("127.") for name in names)
