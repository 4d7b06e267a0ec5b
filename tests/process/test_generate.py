"""`generate`: what it prints is loaded, run, undone or checked by the tools it is meant for."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import kubernetes_validate
import pytest
import yaml
from _tsproxy.cli import config, exits, parser
from _tsproxy.cli.config import Config
from _tsproxy.cli.exits import Exit
from _tsproxy.cli.words import words
from _tsproxy.linux import sockets
from _tsproxy.linux.limits import descriptors_for
from _tsproxy.policy.inspector import Inspector
from _tsproxy.policy.levers import Lever, Policy
from _tsproxy.tools import generate
from _tsproxy.tools.generate import templates
from command_line import route_of
from docopt import docopt
from harness import CHECKOUT, ROOT, Exchange, Proxy, echo, examples, leave_out, receive_exactly, wait_until
from hypothesis import example, given, settings
from hypothesis import strategies as st
from namespaces import Namespace, require_root
from rules import looked_at
from wire import UPSTREAM, Sniffer, Wire, join

MANUAL = ast.get_docstring(ast.parse((ROOT / "tsproxy.py").read_text()), clean=False) or ""
T = "--target=exchange.example:443"
TSVAL = 0xC0FFEE01
REWRITE = ("--timestamps=rewrite", f"--static-timestamp={TSVAL}")
OTHERS = [kind for kind in generate.KINDS if kind != "nftables"]
LOOPBACK = {4: "127.0.0.1", 6: "::1"}


def parsed(*options: str) -> Config:
    """The Config that these options make."""
    return config.parse(docopt(MANUAL, parser.normalize(MANUAL, options), default_help=False))


def made(kind: str, *options: str) -> str:
    """What `generate` prints for these options."""
    return generate.KINDS[kind](parsed(*options))


def with_route(meant: Config, **changes: object) -> Config:
    """The same with another route."""
    return meant._replace(routes=(route_of(meant)._replace(**changes),))


def text(kind: str, *options: str) -> str:
    return made(kind, T, *options)


def command_line(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CHECKOUT, "generate", *options], capture_output=True, text=True, check=False)


def require(tool: str, why: str) -> None:
    """Skip, loudly, where a tool is not there; in CI that is a failure."""
    if not shutil.which(tool):
        leave_out(f"no {tool}: {why} is NOT tested here")


# What is refused


def test_an_unknown_kind_is_refused_with_what_was_given_and_what_is_allowed() -> None:
    done = command_line("iptables", T)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "tsproxy.py: KIND: given 'iptables'; allowed: nftables or netns or systemd or docker or kubernetes; "
        f"{' or '.join(generate.ALONE)} alone\n"
    )


@pytest.mark.parametrize("kind", OTHERS)
def test_an_interface_of_the_host_is_refused_where_tsproxy_gets_a_namespace_of_its_own(kind: str) -> None:
    with pytest.raises(Exit, match=rf"^--interface: given 'eth1'; allowed with generate {kind}: none ") as end:
        generate.run(kind, parsed(T, "--interface=eth1"))
    assert end.value.code == exits.USAGE


def test_rules_do_not_set_the_dscp_by_which_they_know_a_packet() -> None:
    done = command_line("nftables", T, "--dscp=3")
    said = "tsproxy.py: --dscp: given '3'; allowed with generate nftables: any other (it is tsproxy's tag)\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


@pytest.mark.parametrize("kind", OTHERS)
def test_a_kind_that_can_not_rewrite_says_which_one_can(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Exit, match=rf"rewrite'; allowed with generate {kind}: strip \(generate nftables can rewrite\)$") as end:
        generate.run(kind, parsed(T, *REWRITE))
    assert (end.value.code, capsys.readouterr().out) == (exits.USAGE, "")


@pytest.mark.parametrize("kind", generate.KINDS)
def test_preserve_needs_no_set_up_and_says_so(kind: str) -> None:
    with pytest.raises(Exit, match=r"given 'preserve'; allowed with generate: strip or rewrite \(it needs no set-up\)$") as end:
        generate.run(kind, parsed(T, "--timestamps=preserve"))
    assert end.value.code == exits.USAGE


@pytest.mark.parametrize("kind", OTHERS)
def test_a_port_that_the_kernel_would_pick_can_not_be_written_down(kind: str) -> None:
    with pytest.raises(Exit, match=f"--port: given '0'; allowed with generate {kind}: a port from 1 to 65535") as end:
        generate.run(kind, parsed(T, "-p0"))
    assert end.value.code == exits.USAGE


def test_nftables_does_not_care_which_port_it_listens_on() -> None:
    assert "table inet tsproxy" in text("nftables", "-p0")


# What all kinds share


@pytest.mark.parametrize("kind", generate.KINDS)
def test_each_kind_is_filled_in_and_names_what_it_is_for_how_to_make_it_and_its_undo(kind: str) -> None:
    done = command_line(kind, T, "--user=nobody", "--cpus=0", "--reuse-port")
    assert (done.returncode, done.stderr) == (0, "")
    assert "Asked for: exchange.example:443." in done.stdout
    assert re.search(r"^# (Load|Make): ", done.stdout, re.M)
    assert re.search(r"^# Undo: ", done.stdout, re.M)
    assert not templates.PLACEHOLDER.findall(done.stdout)
    assert not re.search(r"[ \t]$", done.stdout, re.M)


@pytest.mark.parametrize("kind", generate.KINDS)
def test_the_comments_fit_a_terminal(kind: str) -> None:
    lines = [line for line in text(kind).splitlines() if "tsproxy.py generate" not in line]
    assert max(map(len, lines)) <= 128


@pytest.mark.parametrize("kind", generate.KINDS)
def test_the_command_in_the_text_prints_the_text_again(kind: str) -> None:
    given = [T, "--user=nobody", "--max-connections=5", "-b", "::1", "--idle-timeout=1.5s"]
    printed = command_line(kind, *given).stdout
    found = re.search(rf"tsproxy\.py (generate {kind} [^|>\n]*)", printed)
    assert found
    again = shlex.split(found[1])
    assert "--max-connections=5" in again
    assert command_line(*again[1:]).stdout == printed


def test_a_value_that_looks_like_a_placeholder_stays_as_it_was_given() -> None:
    assert 'meta skuid { 0, "__TARGETS__" }' in text("nftables", "--user=__TARGETS__")
    assert "User=__VERSION__\n" in text("systemd", "--user=__VERSION__")


def test_each_template_is_the_text_of_some_kind() -> None:
    sources = "".join(path.read_text() for path in Path(generate.__path__[0]).glob("*.py"))
    names = [path.name for path in Path(templates.__path__[0]).glob("*.*") if path.suffix != ".py"]
    assert [name for name in names if not re.search(f'"{re.escape(name)}"', sources)] == []


def test_targets_are_printed_once_each_in_their_order() -> None:
    printed = command_line("nftables", "-t", "b:1", "-t", "a:2", "-t", "[::1]:3").stdout
    assert "# Asked for: b:1, a:2, [::1]:3. " in printed


FIELDS: Dict[str, st.SearchStrategy[Any]] = {
    "--port": st.integers(1, 65535),
    "--bind": st.sampled_from(["0.0.0.0", "::", "192.0.2.1"]),
    "--interface": st.sampled_from(["eth1", "bond0.100"]),
    "--dscp": st.integers(0, 63),
    "--max-connections": st.integers(1, 1_000_000),
    "--max-connections-per-client": st.integers(0, 1_000_000),
    "--on-full": st.sampled_from(config.FULL_ACTIONS),
    "--buffer-size": st.integers(1024, 1 << 24),
    "--workers": st.integers(1, 256),
    "--runtime": st.sampled_from(config.RUNTIMES),
    "--busy-poll": st.integers(0, 10**9),
    "--connect-timeout": st.sampled_from(["0.001", "5", "1.25", "250ms", "3600"]),
    "--idle-timeout": st.sampled_from(["0", "1ms", "100000.123456789"]),
    "--half-close-timeout": st.sampled_from(["0", "1h", "0.25"]),
    "--drain-timeout": st.sampled_from(["0", "0.5", "1us", "86400"]),
    "--user-timeout": st.integers(0, 2**31 - 1),
    "--keepalive": st.integers(0, 32767),
    "--user": st.sampled_from(["nobody", "a.b-c$"]),
    "--metrics-interval": st.sampled_from(["0", "0.01", "60"]),
    "--connection-log": st.sampled_from(config.SWITCH),
    "--log-level": st.sampled_from(config.LEVELS),
    "--allow": st.sampled_from(["10.0.0.0/8", "2001:db8::/32"]),
}
OPTIONS = st.fixed_dictionaries({}, optional=FIELDS).map(lambda given: [f"{name}={value}" for name, value in given.items()])
SOURCES = ("--source=192.0.2.7", "--source=::1", "--allow=192.0.2.0/24")
SWITCHES = st.lists(st.sampled_from(["--reuse-port", "--trust-host"]), unique=True)


@settings(deadline=None)
@given(OPTIONS, SWITCHES, st.sampled_from([(), ("--cpus=0",), SOURCES, REWRITE]))
def test_the_words_of_a_config_make_that_config_again(
    given_options: List[str], switches: List[str], more: Tuple[str, ...]
) -> None:
    if "--cpus=0" in more:
        given_options = [option for option in given_options if not option.startswith("--workers")]
    meant = parsed(T, "--target=[fe80::1%eth0]:9", *given_options, *switches, *more)
    again = parsed(*words(meant))
    assert with_route(again, listen_options=route_of(meant).listen_options) == meant


def test_only_options_that_differ_from_their_defaults_become_words() -> None:
    assert words(parsed(T, "--keepalive=30", "--connection-log=on", "-p8080")) == [T]
    assert words(parsed(T, "--keepalive=31")) == [T, "--keepalive=31"]
    assert words(parsed(T, "--keepalive=31", "-p1"), without=("--port",)) == [T, "--keepalive=31"]


# nftables


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    with contextlib.closing(Namespace(tcp_timestamps="1")) as made:
        yield made


def load(namespace: Namespace, *options: str) -> None:
    namespace.run("nft", "-f", "-", input=text("nftables", *options))


def syn_of(namespace: Namespace, tag: int = sockets.TAG, family: int = 4, user: str = "root") -> str:
    """The options of a SYN from a socket with this SO_PRIORITY, made by this user."""
    code = """if True:
        import encodings.idna, os, pwd, socket, sys
        sys.path.insert(0, sys.argv[1])
        from _tsproxy.linux import sockets
        from _tsproxy.linux.addresses import Address
        from _tsproxy.policy import syn
        os.setuid(pwd.getpwnam(sys.argv[4]).pw_uid)
        family = socket.AF_INET6 if ":" in sys.argv[3] else socket.AF_INET
        far = sockets.listener(Address(family, sys.argv[3], 0), 1, sockets.Tuning())
        sockets.save_syns(far)
        near = sockets.dial(family, None)
        near.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, int(sys.argv[2]))
        near.setblocking(True)
        near.connect(far.getsockname())
        print(syn.parse(sockets.saved_syn(far.accept()[0])))
    """
    return namespace.run(sys.executable, "-c", code, str(ROOT / "lib"), str(tag), LOOPBACK[family], user)


@pytest.mark.root
@pytest.mark.parametrize("options", [(), ("--user=nobody",), REWRITE], ids=["strip", "strip-user", "rewrite"])
def test_rules_load_again_and_again_and_their_undo_leaves_nothing(namespace: Namespace, options: Tuple[str, ...]) -> None:
    rules = text("nftables", *options)
    namespace.run("nft", "-c", "-f", "-", input=rules)
    assert namespace.run("nft", "list", "ruleset") == ""
    namespace.run("nft", "-f", "-", input=rules)
    once = namespace.run("nft", "list", "ruleset")
    namespace.run("nft", "-f", "-", input=rules)
    assert namespace.run("nft", "list", "ruleset") == once
    undo = re.search(r"^# Undo: .*?(nft delete table inet tsproxy)", rules, re.M)
    assert undo
    namespace.run(*undo[1].split())
    assert namespace.run("nft", "list", "ruleset") == ""


@pytest.mark.root
def test_strip_and_rewrite_take_each_others_place(namespace: Namespace) -> None:
    load(namespace)
    load(namespace, *REWRITE)
    rules = namespace.run("nft", "list", "ruleset")
    assert "reset tcp option timestamp" not in rules
    assert f"tsval set {TSVAL}" in rules


@pytest.mark.root
@pytest.mark.parametrize("family", [4, 6])
def test_only_tagged_sockets_are_stripped(namespace: Namespace, family: int) -> None:
    assert "TS val" in syn_of(namespace, family=family)
    load(namespace)
    assert "nop*11" in syn_of(namespace, family=family)
    assert "TS val" not in syn_of(namespace, family=family)
    assert "TS val" in syn_of(namespace, tag=0, family=family)


@pytest.mark.root
@pytest.mark.parametrize("family", [4, 6])
def test_only_tagged_sockets_are_rewritten(namespace: Namespace, family: int) -> None:
    load(namespace, *REWRITE)
    assert f"TS val {TSVAL} ecr 0" in syn_of(namespace, family=family)
    assert f"TS val {TSVAL} " not in syn_of(namespace, tag=0, family=family)


@pytest.mark.root
def test_with_a_user_only_that_one_and_root_are_stripped(namespace: Namespace) -> None:
    load(namespace, "--user=nobody")
    assert "TS val" not in syn_of(namespace)
    assert "TS val" not in syn_of(namespace, user="nobody")
    assert "TS val" in syn_of(namespace, user="daemon")


def test_rewriting_never_asks_for_a_user() -> None:
    assert "skuid" not in text("nftables", "--user=nobody", *REWRITE)


@pytest.mark.root
def test_no_state_is_needed_to_strip(namespace: Namespace) -> None:
    load(namespace)
    namespace.run(
        "nft", "-f", "-", input="table inet off {\n chain out {\n type filter hook output priority raw; notrack\n }\n}\n"
    )
    assert "nop*11" in syn_of(namespace)


@pytest.mark.root
@pytest.mark.parametrize("policy", [Policy("strip"), Policy("rewrite", TSVAL)], ids=["strip", "rewrite"])
def test_the_witness_finds_the_rules_for_both_families(namespace: Namespace, policy: Policy) -> None:
    policy = policy._replace(families=(socket.AF_INET, socket.AF_INET6))
    load(namespace, *(REWRITE if policy.mode == "rewrite" else ()))
    with namespace, contextlib.closing(Inspector(policy)) as inspector:
        policy_check = looked_at(inspector)
        assert policy_check.lever is Lever.NFTABLES, policy_check
        assert [syn.tsval for syn in policy_check.syns.values()] == [policy.tsval or None] * 2
        namespace.run("nft", "delete", "table", "inet", "tsproxy")
        assert looked_at(inspector).lever is None


@contextlib.contextmanager
def echoing_in(namespace: Namespace, host: str) -> Iterator[Exchange]:
    with namespace:
        far = Exchange(echo, host=host)
    with contextlib.closing(far):
        yield far


def there_and_back(client: socket.socket, count: int) -> None:
    """Send `count` bytes, get them back, close: AssertionError unless they are the same."""
    block = os.urandom(1 << 20)
    sent, received = hashlib.sha256(), hashlib.sha256()

    def send() -> None:
        for _ in range(count // len(block)):
            client.sendall(block)
            sent.update(block)
        client.shutdown(socket.SHUT_WR)

    sender = threading.Thread(target=send)
    sender.start()
    for _ in range(count // len(block)):
        received.update(receive_exactly(client, len(block)))
    sender.join()
    assert client.recv(1) == b""
    assert received.digest() == sent.digest()


@pytest.mark.root
@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("options", [(), ("--user=nobody",), REWRITE], ids=["strip", "strip-user", "rewrite"])
def test_tsproxy_relays_by_the_word_of_the_rules_and_both_sides_of_a_loopback_connection_live(
    namespace: Namespace, options: Tuple[str, ...], family: int
) -> None:
    load(namespace, *options)
    with echoing_in(namespace, LOOPBACK[family]) as far:
        command = [*namespace.enter, *CHECKOUT, "-t", far.target, "-p0", "--metrics-interval=0", *options]
        with contextlib.closing(Proxy(command)) as proxy, namespace:
            assert proxy.line("start")["witness"] == "nftables"
            with proxy.connect() as client:
                there_and_back(client, 64 << 20)
            line = proxy.line("connection")
            assert (line["witness"], line["termination_state"]) == ("nftables", "--")
            assert line["upstream_timestamps"] is (options == REWRITE)
            assert line["rx_bytes"] == line["tx_bytes"] == 64 << 20


@pytest.mark.root
def test_rewriting_goes_on_where_conntrack_has_forgotten_a_half_closed_connection() -> None:
    with contextlib.closing(Wire(split=False)) as wire:
        wire.rules(text("nftables", *REWRITE))
        wire.clean.run("sh", "-c", "echo 1 >/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_close_wait")
        far = wire.far_end(4)
        proxy = wire.start(far, 4, "--keepalive=0", *REWRITE)
        tracked = lambda: wire.clean.run("cat", "/proc/net/nf_conntrack")  # noqa: E731
        sniffer = Sniffer(wire.exchange, UPSTREAM)
        try:
            with wire.connect(proxy) as client, far.accept() as server:
                assert f"dport={far.port} " in tracked()
                server.shutdown(socket.SHUT_WR)
                assert client.recv(1) == b""
                wait_until(lambda: f"dport={far.port} " not in tracked(), "conntrack forgets")
                client.sendall(b"late")
                assert receive_exactly(server, 4) == b"late"
            proxy.line("connection")
            packets = [packet for packet in sniffer.stop() if packet.target == (far.host, far.port)]
        finally:
            sniffer.close_if_running()
    assert {packet.tsval for packet in packets} == {TSVAL}
    assert any(packet.payload == 4 for packet in packets)


@pytest.mark.root
def test_what_conntrack_does_not_take_shows_the_real_clock_no_more_than_the_rest() -> None:
    with contextlib.closing(Wire(split=False)) as wire:
        wire.rules(text("nftables", *REWRITE))
        wire.rules("table inet off {\n chain out {\n type filter hook output priority raw; notrack\n }\n}\n")
        target = (wire.exchange_address(4), wire.far_end(4).port)
        sniffer = Sniffer(wire.exchange, UPSTREAM)
        try:
            with wire.clean, contextlib.closing(sockets.dial(socket.AF_INET, None)) as client:
                client.connect_ex(target)
                wait_until(lambda: any(packet.target == target for packet in list(sniffer.packets)), "the SYN")
            assert {packet.tsval for packet in sniffer.stop() if packet.target == target and packet.is_syn} == {TSVAL}
        finally:
            sniffer.close_if_running()


# netns


class Host:
    """A host to try the script on: its own /run and /etc, an uplink to an exchange, the default route over it."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self.net, self.exchange = (self._stack.enter_context(contextlib.closing(Namespace())) for _ in range(2))
        with contextlib.ExitStack() as undo:
            undo.callback(self._stack.close)
            join(self.net, self.exchange, UPSTREAM, 0)
            self.net.run("ip", "route", "add", "default", "via", "10.1.0.2")
            self.net.run("ip", "-6", "route", "add", "default", "via", "fd01::2")
            self._own_mounts()
            self.settle()
            undo.pop_all()

    def _own_mounts(self) -> None:
        mounts = """
            mount -t tmpfs tmpfs /run && cp -a /etc /run/etc && rm -rf /run/etc/netns && mount --bind /run/etc /etc &&
            echo ready && exec cat
        """
        command = [*self.net.enter, "unshare", "--mount", "sh", "-c", mounts]
        holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._stack.callback(holder.communicate)
        assert holder.stdout
        assert holder.stdout.readline() == b"ready\n"
        self.enter = ["nsenter", f"--mount=/proc/{holder.pid}/ns/mnt", f"--net={self.net.path}"]

    def script(self, *arguments: str, options: Tuple[str, ...] = (), **settings: str) -> subprocess.CompletedProcess[str]:
        """Run the script, as `... | sh -s ARGUMENTS`."""
        command = [*self.enter, "env", *(f"{name}={value}" for name, value in settings.items()), "sh", "-s", *arguments]
        return subprocess.run(command, input=text("netns", *options), capture_output=True, text=True, check=False)

    def run(self, *command: str) -> str:
        return subprocess.run([*self.enter, *command], capture_output=True, text=True, check=True).stdout

    def inside(self, *command: str) -> str:
        return self.run("ip", "netns", "exec", "tsproxy", *command)

    def settle(self, *where: str) -> None:
        """Duplicate address detection takes a second; until then ip(8) says `tentative`.

        An interface whose carrier the kernel has not noticed yet, which may take a second, too, has its addresses to come.
        """

        def settled() -> bool:
            links = self.run(*where, "ip", "-o", "link", "show", "up").splitlines()
            up = all(" state UP " in link for link in links if "LOOPBACK" not in link)
            return up and not self.run(*where, "ip", "-6", "address", "show", "tentative")

        wait_until(settled, "addresses are settled")

    def state(self) -> List[str]:
        """All that the script may change, without what counts or ages."""
        self.settle()
        looks = [
            "ip -o link",
            "ip -o address",
            "ip route",
            "ip -6 route",
            "nft list ruleset",
            "ls /run /run/netns /etc/netns",
            "grep -r . /proc/sys/net/ipv4/conf /proc/sys/net/ipv6/conf",
        ]
        return [re.sub(r"valid_lft \S+ preferred_lft \S+", "", self.run("sh", "-c", f"{look} 2>&1 || :")) for look in looks]

    def close(self) -> None:
        self._stack.close()


@pytest.fixture
def host() -> Iterator[Host]:
    with contextlib.closing(Host()) as made:
        yield made


BOTH = ("--target=[2001:db8::1]:443",)


def set_up(host: Host, *options: str, **settings: str) -> None:
    """Run the script twice: the second time must change nothing."""
    first = host.script(options=options, **settings)
    assert (first.returncode, first.stderr) == (0, ""), first.stderr
    host.settle("ip", "netns", "exec", "tsproxy")
    before = host.state(), host.inside("sh", "-c", "ip -o address; ip route; ip -6 route")
    second = host.script("up", options=options, **settings)
    assert (second.returncode, second.stdout, second.stderr) == (0, first.stdout, "")
    assert (host.state(), host.inside("sh", "-c", "ip -o address; ip route; ip -6 route")) == before


def assert_clean_way_out(host: Host, bind: str, far_host: str, client_in: Namespace) -> str:
    """tsproxy inside relays to the exchange by the sysctl, and no packet there has TSopt; whom the exchange saw come."""
    came: List[str] = []

    def serve(client: socket.socket) -> None:
        came.append(client.getpeername()[0])
        echo(client)

    with host.exchange:
        far = Exchange(serve, host=far_host)
    sniffer = Sniffer(host.exchange, UPSTREAM)
    command = [*host.enter, "ip", "netns", "exec", "tsproxy", *CHECKOUT, "-t", far.target, "-p0", f"--bind={bind}"]
    try:
        with contextlib.closing(far), contextlib.closing(Proxy(command)) as proxy:
            assert proxy.line("start")["witness"] == "sysctl"
            with client_in, proxy.connect() as client:
                there_and_back(client, 1 << 20)
            assert proxy.line("connection")["upstream_timestamps"] is False
        packets = [packet for packet in sniffer.stop() if packet.target == (far.host, far.port)]
    finally:
        sniffer.close_if_running()
    assert packets
    assert {packet.tsval for packet in packets} == {None}
    return came[0]


def assert_clean(host: Host) -> None:
    assert host.inside("cat", "/proc/sys/net/ipv4/tcp_timestamps") == "0\n"
    assert ",UP," in host.inside("ip", "link", "show", "dev", "lo")
    assert host.inside("cat", "/etc/resolv.conf") == Path("/etc/resolv.conf").read_text()


@pytest.mark.root
@pytest.mark.parametrize(
    ("bind", "far", "seen"), [("10.203.116.2", "10.1.0.2", "10.1.0.1"), ("fd74:7370::2", "fd01::2", "fd01::1")], ids=["4", "6"]
)
def test_a_namespace_behind_a_veth_is_clean_and_leaves_under_this_hosts_address(
    host: Host, bind: str, far: str, seen: str
) -> None:
    set_up(host, *BOTH)
    assert_clean(host)
    assert assert_clean_way_out(host, bind, far, host.net) == seen


@pytest.mark.root
def test_a_source_behind_a_veth_is_routed_and_not_masqueraded(host: Host) -> None:
    host.exchange.run("ip", "route", "add", "192.0.2.77", "via", "10.1.0.1")
    set_up(host, "--source=192.0.2.77")
    code = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 20, (sys.argv[3], 0))"
    with host.exchange:
        far = Exchange(host="10.1.0.2")
    with contextlib.closing(far):
        host.inside(sys.executable, "-c", code, far.host, str(far.port), "192.0.2.77")
        assert far.accept().getpeername()[0] == "192.0.2.77"


@pytest.mark.root
def test_a_macvlan_is_clean_and_has_its_own_address_beside_the_uplinks(host: Host) -> None:
    settings = {"ADDRESS": "10.1.0.9/24 fd01::9/64"}
    if not has_macvlan(host):
        done = host.script(**settings)
        assert done.returncode == 1
        assert "no macvlan on upstream: the kernel lacks it" in done.stderr
        return
    set_up(host, "--source=10.1.0.10", **settings)
    assert_clean(host)
    assert "default via 10.1.0.2" in host.inside("ip", "route")
    assert "default via fd01::2" in host.inside("ip", "-6", "route")
    assert "10.1.0.10/32" in host.inside("ip", "-o", "address")
    assert assert_clean_way_out(host, "10.1.0.9", "10.1.0.2", host.exchange) == "10.1.0.9"
    assert assert_clean_way_out(host, "fd01::9", "fd01::2", host.exchange) == "fd01::9"


def has_macvlan(host: Host) -> bool:
    add = ["ip", "link", "add", "link", UPSTREAM, "name", "try0", "type", "macvlan", "mode", "bridge"]
    if subprocess.run([*host.enter, *add], capture_output=True, check=False).returncode:
        return False
    host.run("ip", "link", "delete", "try0")
    return True


@pytest.mark.root
@pytest.mark.parametrize("settings", [{}, {"ADDRESS": "10.1.0.9/24"}], ids=["veth", "macvlan"])
def test_down_leaves_the_host_as_it_was_and_may_be_said_twice(host: Host, settings: Dict[str, str]) -> None:
    if settings and not has_macvlan(host):
        pytest.skip("this kernel has no macvlan")
    host.run("sh", "-c", "echo 1 >/proc/sys/net/ipv6/conf/upstream/accept_ra; mkdir -p /run/netns")
    host.run("sh", "-c", "mount --bind /run/netns /run/netns; nft add table inet other")
    before = host.state()
    set_up(host, *BOTH, **settings)
    assert host.state() != before
    if not settings:
        assert host.run("cat", "/proc/sys/net/ipv6/conf/upstream/accept_ra") == "2\n"
    for _ in range(2):
        done = host.script("down")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert host.state() == before


@pytest.mark.root
def test_down_takes_the_way_out_from_who_still_runs_in_there(host: Host) -> None:
    set_up(host)
    command = [*host.enter, "ip", "netns", "exec", "tsproxy", "sh", "-c", "echo ready; read line; ip -o link"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as left:
        assert left.stdout
        assert left.stdout.readline() == "ready\n"
        assert host.script("down").returncode == 0
        rest, _ = left.communicate("\n")
    assert [line.split()[1] for line in rest.splitlines() if "up0" in line] == []
    assert "lo:" in rest


@pytest.mark.root
@pytest.mark.parametrize(
    ("arguments", "settings", "said"),
    [
        (["sideways"], {}, "given 'sideways'; allowed: up or down"),
        ([], {"MODE": "tun"}, "MODE: given 'tun'; allowed: macvlan or veth"),
        ([], {"UPLINK": "nowhere"}, "UPLINK: given 'nowhere'; allowed: an interface of this host"),
        ([], {"MODE": "macvlan"}, "MODE=macvlan: set ADDRESS to a free address of upstream's network"),
        ([], {"ADDRESS": "10.1.0.9"}, "ADDRESS: given '10.1.0.9'; allowed: with its prefix"),
        ([], {"MODE": "veth", "ADDRESS": "10.1.0.1"}, "10.1.0.1 is this host's own address: MODE=veth needs another"),
    ],
)
def test_what_the_script_can_not_do_costs_one_line(
    host: Host, arguments: List[str], settings: Dict[str, str], said: str
) -> None:
    done = host.script(*arguments, **settings)
    assert done.returncode == 1
    assert f"tsproxy-netns: {said}" in done.stderr


@pytest.mark.root
def test_the_script_wants_an_uplink_where_there_is_no_default_route(host: Host) -> None:
    host.net.run("sh", "-c", "ip route del default; ip -6 route del default")
    done = host.script()
    assert (done.returncode, "no default route here: set UPLINK" in done.stderr) == (1, True)


@pytest.mark.root
def test_a_namespace_of_one_mode_is_not_turned_into_another(host: Host) -> None:
    set_up(host)
    done = host.script(MODE="macvlan", ADDRESS="10.1.0.9/24")
    assert (done.returncode, done.stderr) == (1, "tsproxy-netns: there is another kind of link already: run 'down' first\n")


@pytest.mark.root
def test_the_script_says_that_it_needs_root() -> None:
    require_root()
    command = ["setpriv", "--clear-groups", "--reuid=nobody", "sh"]
    done = subprocess.run(command, input=text("netns"), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "tsproxy-netns: needs root\n")


@pytest.mark.root
def test_what_the_script_says_to_run_next_does_run(host: Host) -> None:
    require("systemd-socket-activate", "the listener handed over from outside the namespace")
    with echoing_in(host.exchange, "10.1.0.2") as far, host.net:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        done = host.script(options=("-t", far.target, "-p", str(port), "--metrics-interval=0"))
        found = re.search(r"^ +(systemd-socket-activate .*)$", done.stdout.replace(f"{T} ", ""), re.M)
        assert found
        words_ = shlex.split(found[1].replace("tsproxy.py", shlex.join(CHECKOUT)))
        with contextlib.closing(Proxy([*host.enter, *words_])) as proxy:
            wait_until(lambda: f":{port:04X} " in host.run("cat", "/proc/net/tcp"), "it listens")
            with socket.create_connection(("127.0.0.1", port), 20) as client:
                there_and_back(client, 1 << 20)
            line = proxy.line("connection")
        assert (line["witness"], line["client_timestamps"], line["upstream_timestamps"]) == ("sysctl", True, False)


# systemd


UNITS = ("tsproxy-netns.service", "tsproxy.socket", "tsproxy.service")


def files(*options: str) -> Dict[str, str]:
    """Path -> text, by the headings."""
    parts = re.split(r"^# (/\S+)\n", text("systemd", *options), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2]))


def unit(name: str, *options: str) -> List[str]:
    return files(*options)[f"/etc/systemd/system/{name}"].splitlines()


def setting(lines: List[str], name: str) -> List[str]:
    return [line.partition("=")[2] for line in lines if line.startswith(f"{name}=")]


@pytest.fixture
def unit_directory(tmp_path: Path) -> Path:
    require("systemd-analyze", "whether systemd takes the units")
    for path, content in files("--user=daemon", "--cpus=0", "--reuse-port", "-t", "[fe80::1%eth0]:9").items():
        (tmp_path / os.path.basename(path)).write_text(content)
    return tmp_path


def analyze(directory: Path, *words_: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "SYSTEMD_UNIT_PATH": f"{directory}:"}
    return subprocess.run(["systemd-analyze", *words_], env=environment, capture_output=True, text=True, check=False)


def test_each_part_stands_under_the_name_of_its_file() -> None:
    assert list(files()) == ["/usr/local/sbin/tsproxy-netns", *(f"/etc/systemd/system/{name}" for name in UNITS)]
    assert files("-b", "::1")["/usr/local/sbin/tsproxy-netns"].strip() == text("netns", "-b", "::1").strip()


def test_systemd_takes_the_units_without_a_word(unit_directory: Path) -> None:
    done = analyze(unit_directory, "verify", *(str(unit_directory / name) for name in UNITS))
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_systemd_finds_little_that_the_service_is_exposed_to(unit_directory: Path) -> None:
    (unit_directory / "tsproxy.service").write_text("\n".join(unit("tsproxy.service")))
    service = str(unit_directory / "tsproxy.service")
    done = analyze(unit_directory, "security", "--offline=true", "--threshold=12", service)  # 1.1 of 10
    assert done.returncode == 0, done.stdout


def test_the_listener_stays_in_the_hosts_namespace_and_the_service_does_not() -> None:
    assert setting(unit("tsproxy.socket", "-p9000", "-b::1"), "ListenStream") == ["[::1]:9000"]
    assert setting(unit("tsproxy.socket"), "NetworkNamespacePath") == []
    assert setting(unit("tsproxy.service"), "NetworkNamespacePath") == ["/run/netns/tsproxy"]
    assert setting(unit("tsproxy.socket"), "ReusePort") == []
    assert setting(unit("tsproxy.socket", "--reuse-port"), "ReusePort") == ["yes"]


@pytest.mark.parametrize("more", [(), ("--user=a.b",), ("--cpus=0", "--max-connections=70000", "--drain-timeout=90.5")])
def test_the_service_is_started_with_the_options_that_were_given(more: Tuple[str, ...]) -> None:
    given_options = ("--target=[fe80::1%eth0]:9", "--keepalive=7", *more)
    service = unit("tsproxy.service", "-p9000", "-b::1", "--reuse-port", *given_options)
    started = setting(service, "ExecStart")[0].replace("%%", "%").replace("$$", "$").split()
    assert started[:4] == ["/usr/bin/python3", "-I", "-S", "/usr/local/bin/tsproxy"]
    policy = parsed(T, *given_options)
    assert parsed(*started[4:]) == policy._replace(user=None)
    assert setting(service, "User") == ([policy.user] if policy.user else [])
    assert setting(service, "DynamicUser") == ([] if policy.user else ["yes"])
    assert setting(service, "LimitNOFILE") == [str(descriptors_for(route_of(policy).max_connections, policy.workers))]
    assert int(setting(service, "TimeoutStopSec")[0]) > policy.drain_timeout_s
    assert ("sched_setaffinity" in setting(service, "SystemCallFilter")) == bool(policy.cpus)


def test_a_start_that_fails_is_tried_again_for_ever_and_the_socket_stays() -> None:
    """With a start limit a client that waits uses it up in a moment, and the socket fails: nobody can connect any more."""
    for name in ("tsproxy.service", "tsproxy-netns.service"):
        lines = unit(name)
        assert setting(lines, "StartLimitIntervalSec") == ["0"]
        assert setting(lines, "Restart") == ["on-failure"]
        assert setting(lines, "RestartSec") == ["2"], "the pace, since there is no limit"
        assert setting(lines, "RestartPreventExitStatus") == []
    assert setting(unit("tsproxy.socket"), "TriggerLimitIntervalSec") == ["0"]


USERS = st.from_regex(r"[A-Za-z0-9_.][A-Za-z0-9_.-]{0,30}\$?", fullmatch=True).filter(lambda name: name != "nobody")
ZONES = st.from_regex(r"[A-Za-z0-9_.-]{1,15}", fullmatch=True)


def read_by_systemd(text: str, variables: bool) -> str:
    """As systemd reads it: %% is %, any other % a specifier; in a command line $$ is $, any other $ a variable."""
    for one in "%$" if variables else "%":
        assert not re.search(rf"(?<!\{one})(\{one}\{one})*\{one}(?!\{one})", text), text
        text = text.replace(one * 2, one)
    return text


@given(USERS, ZONES)
@example("a$", "h")
@settings(deadline=None)
def test_whatever_a_user_or_a_zone_is_called_systemd_reads_it_as_it_was_given(user: str, zone: str) -> None:
    target = f"--target=[fe80::1%{zone}]:9"
    service = unit("tsproxy.service", target, f"--user={user}")
    assert [read_by_systemd(name, variables=False) for name in setting(service, "User")] == [user]
    assert target in read_by_systemd(setting(service, "ExecStart")[0], variables=True).split()


@pytest.mark.parametrize("kind", ["netns", "docker"])
@given(user=USERS, zone=ZONES)
@settings(deadline=None, max_examples=examples(25))
def test_whatever_a_user_or_a_zone_is_called_a_shell_reads_it_as_it_was_given(kind: str, user: str, zone: str) -> None:
    """The command that the heading tells, and what the script says or does with the options."""
    options = (T, f"--target=[fe80::1%{zone}]:9", f"--user={user}")
    script = made(kind, *options)
    (told,) = (line for line in re.findall(r"^# (?:Make|Write): +(tsproxy.py .*?) [|>]", script, re.M))
    said = subprocess.run(["sh", "-c", f"printf '%s\\n' {told}"], capture_output=True, text=True, check=True).stdout.split("\n")
    assert parsed(*said[3:-1]) == parsed(*options)
    assert subprocess.run(["sh", "-n"], input=script, text=True, check=False).returncode == 0
    if kind == "docker":
        assert f"id -u {shlex.quote(user)}" in script


@given(st.sampled_from(["--user", "--bind", "--source", "--allow", "--target", "--cpus", "--runtime"]), st.text())
def test_no_text_that_a_file_could_take_for_its_own_gets_past_the_options(option: str, value: str) -> None:
    """So no kind has to escape a line break, a quote, a backslash or a blank."""
    try:
        taken = parsed(T, f"{option}={value}")
    except config.UsageError:
        return
    assert all(re.fullmatch(r"[\w.:/%$@,=\[\]-]+", word, re.ASCII) for word in words(taken)), words(taken)


def test_the_undo_of_systemd_and_of_journald_leave_nothing_of_theirs_whichever_comes_first(tmp_path: Path) -> None:
    """The drop-in's directory stood in the way of `rm tsproxy.s*`; what somebody else put into it stays."""
    units = tmp_path / "etc/systemd/system"
    undo = {}
    for kind, printed in (("systemd", text("systemd")), ("journald", generate.SHIPPERS["journald"]())):
        (lines,) = re.findall(r"^# Undo: +(.*\n(?:# {9}.*\n)*)", printed, re.M)[:1]
        steps = re.sub(r"^# +", "", lines, flags=re.M)
        for root in ("/etc/", "/usr/"):
            steps = steps.replace(root, f"{tmp_path}{root}")
        undo[kind] = f"systemctl() {{ :; }}; set -e\n{steps}"
    for order in (("systemd", "journald"), ("journald", "systemd")):
        for path in [*files(), "/etc/systemd/system/tsproxy.service.d/journald.conf"]:
            (tmp_path / path[1:]).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path[1:]).write_text("")
        for kind in order:
            done = subprocess.run(["sh", "-c", undo[kind]], capture_output=True, text=True, check=False)
            assert (done.returncode, done.stderr) == (0, ""), undo[kind]
        assert list(units.iterdir()) == []
        assert list((tmp_path / "usr/local/sbin").iterdir()) == []


def test_the_shared_user_nobody_is_given_a_user_of_its_own_by_systemd() -> None:
    service = unit("tsproxy.service", "--user=nobody")
    assert (setting(service, "User"), setting(service, "DynamicUser")) == ([], ["yes"])


def test_the_way_to_install_that_the_heading_tells_puts_each_part_in_its_file(tmp_path: Path) -> None:
    printed = text("systemd")
    program = re.search(r"awk '(.*)'$", printed, re.M)
    assert program
    for path in files():
        (tmp_path / os.path.dirname(path)[1:]).mkdir(parents=True, exist_ok=True)
    into = program[1].replace("file = $2", f'file = "{tmp_path}" $2')
    subprocess.run(["awk", into], input=printed, text=True, check=True)
    assert {path: (tmp_path / path[1:]).read_text() for path in files()} == files()


# docker


STAND_IN = """#!/bin/sh
if [ "$1" = info ]; then echo "$DOCKER_INFO"; exit "${DOCKER_INFO_CODE:-0}"; fi
for word; do printf '%s\\0' "$word"; done >>calls
printf '\\n' >>calls
"""


class Docker:
    """The script, beside a stand-in for docker that writes down how it was called. There is no engine in the tests."""

    def __init__(self, home: Path) -> None:
        self.home = home
        (home / "docker").write_text(STAND_IN)
        (home / "docker").chmod(0o755)
        (home / "tsproxy").write_text("")

    def script(self, *arguments: str, options: Tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "PATH": f"{self.home}:{os.environ['PATH']}", "DOCKER_INFO": "Debian [name=seccomp]", **environment}
        given = {"input": text("docker", *options), "env": env, "cwd": self.home}
        return subprocess.run(["sh", "-s", *arguments], capture_output=True, text=True, check=False, **given)  # type: ignore[call-overload,no-any-return]

    def calls(self) -> List[List[str]]:
        return [line.split("\0")[:-1] for line in (self.home / "calls").read_text().splitlines()]


@pytest.fixture
def docker(tmp_path: Path) -> Docker:
    return Docker(tmp_path)


DOCKER_OPTIONS = ("--target=[fe80::1%eth0]:9", "-p9000", "-b::1", "--user=nobody", "--keepalive=7", "--drain-timeout=90.5")


def test_docker_is_told_to_switch_timestamps_off_and_to_take_all_else_away(docker: Docker) -> None:
    done = docker.script(options=DOCKER_OPTIONS)
    assert done.returncode == 0, done.stderr
    build, _, run = docker.calls()
    assert build == ["build", "--tag", "tsproxy", "--file", "-", "."]
    for words_ in ("--sysctl net.ipv4.tcp_timestamps=0", "--publish [::1]:9000:9000", "--user 65534:65534", "--network bridge"):
        assert f" {words_} " in f" {' '.join(run)} "
    limit = descriptors_for(1000, parsed(T).workers)
    assert {"--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges", f"nofile={limit}:{limit}"} <= set(run)
    assert int(run[run.index("--stop-timeout") + 1]) > 90.5
    program = parsed(*run[run.index("tsproxy", run.index("--stop-timeout")) + 1 :])
    policy = parsed(T, *DOCKER_OPTIONS)
    assert program == with_route(policy._replace(user=None), bind="::")


def test_docker_knows_each_flag_that_it_is_given(docker: Docker) -> None:
    if not shutil.which("docker"):
        pytest.skip("no docker client, so its flags are not compared")
    docker.script()
    for call in docker.calls():
        call = call[: call.index("--bind=0.0.0.0")] if call[0] == "run" else call
        flags = [word.partition("=")[0] for word in call if word.startswith("--") and word != T]
        known = subprocess.run(["docker", call[0], "--help"], capture_output=True, text=True, check=True).stdout
        assert [flag for flag in flags if not re.search(rf"{flag}\b", known)] == []


@pytest.mark.parametrize("info", ["Debian [name=seccomp name=rootless]", "Docker Desktop [name=seccomp]"])
def test_docker_that_would_make_connections_anew_is_refused(docker: Docker, info: str) -> None:
    done = docker.script(DOCKER_INFO=info)
    assert (done.returncode, "timestamps would leak" in done.stderr) == (1, True)
    assert not (docker.home / "calls").exists()


@pytest.mark.parametrize("info", [("Debian [name=seccomp]", "1"), (" []", "0"), ("", "0"), ("", "1")])
def test_docker_that_does_not_say_what_it_is_is_refused(docker: Docker, info: Tuple[str, str]) -> None:
    """No daemon, no right to ask it: what it would do with connections is not known."""
    done = docker.script(DOCKER_INFO=info[0], DOCKER_INFO_CODE=info[1])
    assert (done.returncode, "docker info can't say" in done.stderr) == (1, True)
    assert not (docker.home / "calls").exists()


@pytest.mark.root
@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (["up"], {"NETWORK": "host"}, "NETWORK: given 'host'"),
        (["sideways"], {}, "given 'sideways'; allowed: up, down or compose"),
    ],
)
def test_what_can_not_be_run_in_docker_is_refused(
    docker: Docker, arguments: List[str], environment: Dict[str, str], said: str
) -> None:
    done = docker.script(*arguments, **environment)
    assert (done.returncode, said in done.stderr) == (1, True)


def test_without_the_bundle_docker_is_not_called(docker: Docker) -> None:
    (docker.home / "tsproxy").unlink()
    done = docker.script()
    assert (done.returncode, "to make it: tsproxy.py bundle tsproxy" in done.stderr) == (1, True)
    assert not (docker.home / "calls").exists()


def test_down_removes_the_container_and_the_image(docker: Docker) -> None:
    assert docker.script("down").returncode == 0
    assert docker.calls() == [["rm", "--force", "tsproxy"], ["image", "rm", "--force", "tsproxy"]]


def test_the_compose_file_says_the_same_as_the_command(docker: Docker) -> None:
    docker.script(options=DOCKER_OPTIONS)
    run = docker.calls()[-1]
    service = yaml.safe_load(docker.script("compose", options=DOCKER_OPTIONS).stdout)["services"]["tsproxy"]
    assert service["command"] == run[run.index("tsproxy", run.index("--stop-timeout")) + 1 :]
    assert service["sysctls"] == {"net.ipv4.tcp_timestamps": "0"}
    assert service["ports"] == [run[run.index("--publish") + 1]]
    assert service["user"] == run[run.index("--user") + 1]
    assert f"nofile={service['ulimits']['nofile']}:{service['ulimits']['nofile']}" in run
    assert (service["read_only"], service["cap_drop"], service["security_opt"]) == (True, ["ALL"], ["no-new-privileges"])
    assert service["stop_grace_period"] == run[run.index("--stop-timeout") + 1] + "s"
    assert service["build"]["dockerfile_inline"].startswith("FROM python:")


# kubernetes


def manifest(*options: str) -> Dict[str, Any]:
    return {part["kind"]: part for part in yaml.safe_load_all(text("kubernetes", *options))}


def pod(*options: str) -> Dict[str, Any]:
    found: Dict[str, Any] = manifest(*options)["Deployment"]["spec"]["template"]["spec"]
    return found


@pytest.mark.parametrize("version", ["1.25", "1.30", "1.37"])
def test_the_manifest_is_what_the_api_takes_with_no_field_that_it_does_not_know(version: str) -> None:
    parts = manifest("--user=nobody", "--keepalive=7")
    assert list(parts) == ["Deployment", "PodDisruptionBudget", "Service"]
    for part in parts.values():
        kubernetes_validate.validate(part, version, strict=True)
    parts["Deployment"]["spec"]["template"]["spec"]["sysctls"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(parts["Deployment"], version, strict=True)


def test_the_manifest_has_neither_anchors_nor_merges_which_a_strict_reader_may_refuse() -> None:
    tokens = list(yaml.scan(text("kubernetes")))
    assert not [token for token in tokens if isinstance(token, (yaml.AnchorToken, yaml.AliasToken))]


def test_pods_have_timestamps_off_and_no_privilege() -> None:
    spec = pod()
    security = spec["securityContext"]
    assert security["sysctls"] == [{"name": "net.ipv4.tcp_timestamps", "value": "0"}]
    assert (security["runAsNonRoot"], security["runAsUser"]) == (True, 65534)
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = spec["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert "hostNetwork" not in spec


def test_pods_are_started_with_the_options_that_were_given() -> None:
    given_options = (
        "--target=[fe80::1%eth0]:9",
        "-p9000",
        "-b::1",
        "--drain-timeout=90.5",
        "--workers=200",
        "--allow=10.0.0.0/8",
    )
    spec = pod(*given_options, "--user=nobody")
    (container,) = spec["containers"]
    assert parsed(*container["args"]) == with_route(parsed(T, *given_options), bind="::")
    assert container["ports"][0]["containerPort"] == 9000
    assert container["resources"]["requests"]["cpu"] == "200"
    assert spec["terminationGracePeriodSeconds"] > 90.5 + int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert manifest(*given_options)["Service"]["spec"]["ports"] == [{"name": "relay", "port": 9000, "targetPort": "relay"}]


def test_the_selectors_find_the_pods() -> None:
    parts = manifest()
    labels = parts["Deployment"]["spec"]["template"]["metadata"]["labels"].items()
    (attach,) = pod()["topologySpreadConstraints"]
    selectors = [part["spec"]["selector"]["matchLabels"] for part in (parts["Deployment"], parts["PodDisruptionBudget"])]
    for selector in (*selectors, attach["labelSelector"]["matchLabels"], parts["Service"]["spec"]["selector"]):
        assert selector
        assert selector.items() <= labels


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--source=192.0.2.1", "--source: given '192.0.2.1'; allowed with generate kubernetes: none"),
        ("--user=root", "--user: given 'root'; allowed with generate kubernetes: a user of this host but root"),
        ("--user=no.such.user", "--user: given 'no.such.user'; allowed with generate kubernetes: a user of this host but root"),
    ],
)
def test_what_pods_can_not_have_is_refused(option: str, said: str) -> None:
    with pytest.raises(Exit, match=re.escape(said)) as end:
        generate.run("kubernetes", parsed(T, option))
    assert end.value.code == exits.USAGE


def probe(namespace: Namespace, container: Dict[str, Any], name: str) -> bool:
    """Run a probe's command as the kubelet does; whether it is content."""
    command = [*namespace.enter, *container[name]["exec"]["command"]]
    done = subprocess.run(command, capture_output=True, check=False)
    assert (done.stdout, done.stderr) == (b"", b"")
    return done.returncode == 0


PROBES = ("startupProbe", "livenessProbe", "readinessProbe")


@pytest.mark.root
@pytest.mark.parametrize("family", [4, 6])
def test_probes_tell_who_listens_and_is_clean_without_a_connection_to_the_exchange(namespace: Namespace, family: int) -> None:
    namespace.sysctl("tcp_timestamps", "0")
    with namespace:
        far = Exchange(host=LOOPBACK[family])
        with socket.create_server((LOOPBACK[family], 0), family=[socket.AF_INET, socket.AF_INET6][family == 6]) as free:
            port = free.getsockname()[1]
    (container,) = pod("-p", str(port), "-b", LOOPBACK[family])["containers"]
    assert [probe(namespace, container, name) for name in PROBES] == [False] * 3
    options = [option for option in container["args"] if option != T]
    with contextlib.closing(far), contextlib.closing(Proxy([*namespace.enter, *CHECKOUT, "-t", far.target, *options])) as proxy:
        proxy.line("start")
        assert [probe(namespace, container, name) for name in PROBES] == [True] * 3
        namespace.sysctl("tcp_timestamps", "1")
        assert [probe(namespace, container, name) for name in PROBES] == [True, True, False]
        namespace.sysctl("tcp_timestamps", "0")
        assert proxy.metrics()["upstream_cx_total"] == 0
        assert proxy.stop() == 0
    assert [probe(namespace, container, name) for name in PROBES] == [False] * 3
