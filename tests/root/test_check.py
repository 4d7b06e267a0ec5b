"""`check` on hosts of each kind: the table, the JSON, the verdict, and that no SYN leaves that would be the leak."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence, Tuple

import pytest
from _tsproxy.policy import rehearsal
from checked import NOWHERE, STRIP, far_end, rules, shows, was_tried
from common.segments import ACK, FIN, RST, SYN, mss, timestamp
from far_end import Peer
from harness import CHECKOUT, Exchange, wait_until
from namespaces import Namespace
from pty_session import PtySession
from rules import generated
from unprivileged import as_nobody
from wire import UPSTREAM, Wire

pytestmark = pytest.mark.root

SPOOF = ["--spoof-timestamps", "--static-timestamp=287454020"]
REWRITE = generated(*SPOOF)


def check(namespace: Namespace, *options: str, command: Sequence[str] = CHECKOUT, **run: Any) -> Tuple[int, str]:
    """The exit code and what was printed; nothing is ever said on standard error."""
    done = subprocess.run(
        [*namespace.enter, *command, "check", *options], capture_output=True, encoding="utf-8", timeout=60, check=False, **run
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


def facts(namespace: Namespace, *options: str, **run: Any) -> Tuple[int, Dict[str, Any]]:
    code, out = check(namespace, *options, "--json", **run)
    assert out.count("\n") == 1
    found: Dict[str, Any] = json.loads(out)
    assert found["holds"] == (code == 0)
    assert bool(found["missing"]) == (code == 78)
    return code, found


# The sysctl


def test_in_a_clean_namespace_the_policy_holds_and_the_target_is_tried(spaces: Any, form: Tuple[List[str], Any]) -> None:
    command, cwd = form
    clean = spaces(tcp_timestamps="0")
    with far_end(clean) as exchange:
        code, found = facts(clean, "-t", exchange.target, command=command, cwd=cwd)
        exchange.accept()
    assert (code, found["witness"], found["fixes"]) == (0, "sysctl", [])
    assert shows(found, "tcp_timestamps") == {"net.ipv4.tcp_timestamps": "ok"}
    assert shows(found, "SYN") == {"IPv4 SYN on loopback": "ok", f"SYN to {exchange.target} on lo": "ok"}
    assert all("TS" not in row["value"] for row in found["witnesses"])
    (connection,) = found["connections"]
    assert (connection["outcome"], connection["timestamps"], connection["relays"]) == ("connected", False, True)
    assert connection["connect_us"] >= 0


@pytest.mark.parametrize("value", ["1", "2"])
def test_where_timestamps_are_on_no_syn_leaves_and_the_fixes_are_told(spaces: Any, value: str) -> None:
    dirty = spaces(tcp_timestamps=value)
    with far_end(dirty) as exchange:
        code, found = facts(dirty, "-t", exchange.target)
        assert not was_tried(exchange)
    assert (code, found["witness"]) == (78, None)
    assert shows(found, "") == {
        "net.ipv4.tcp_timestamps": "off",
        "nftables": "off",
        "IPv4 SYN on loopback": "leak",
        "SYN on the wire": "unknown",
    }
    assert "TS val" in found["witnesses"][0]["value"]
    assert found["connections"][0]["outcome"] == "not tried"
    assert "sysctl -w net.ipv4.tcp_timestamps=0" in found["fixes"]


def test_both_families_are_witnessed(spaces: Any) -> None:
    clean = spaces(tcp_timestamps="0")
    with far_end(clean) as four, far_end(clean, "::1") as six:
        code, found = facts(clean, "-t", four.target, "-t", six.target)
    assert code == 0
    assert shows(found, "on loopback") == {"IPv4 SYN on loopback": "ok", "IPv6 SYN on loopback": "ok"}
    assert shows(found, "on lo") == {**shows(found, "on loopback"), **dict.fromkeys(wire(four, six), "ok")}


def wire(*exchanges: Exchange) -> List[str]:
    return [f"SYN to {exchange.target} on lo" for exchange in exchanges]


def test_each_target_is_listed_once(spaces: Any) -> None:
    _, found = facts(spaces(tcp_timestamps="0"), "-t", "192.0.2.1:1", "-t", "192.0.2.1:2")
    assert found["targets"] == ["192.0.2.1:1", "192.0.2.1:2"]


@pytest.mark.parametrize("target", ["127.0.0.1:9", "[::1]:9"])
def test_loopback_down_is_said_and_its_fix_is_the_only_one(spaces: Any, target: str) -> None:
    lonely = spaces(tcp_timestamps="0")
    lonely.run("ip", "link", "set", "lo", "down")
    code, found = facts(lonely, "-t", target)
    assert code == 78
    assert found["host"]["interfaces"] == "lo down"
    assert shows(found, "on loopback") == {f"IPv{6 if '[' in target else 4} SYN on loopback": "unknown"}
    assert "loopback interface is down" in found["missing"][0]
    assert found["fixes"] == ["ip link set lo up"]


# nftables


def test_rules_that_strip_are_seen_on_the_syn_and_on_the_wire(spaces: Any) -> None:
    filtered = spaces(rules(STRIP), tcp_timestamps="1")
    with far_end(filtered) as exchange:
        code, found = facts(filtered, "-t", exchange.target)
    assert (code, found["witness"]) == (0, "nftables")
    assert shows(found, "") == {
        "net.ipv4.tcp_timestamps": "off",
        "nftables": "ok",
        "IPv4 SYN on loopback": "ok",
        f"SYN to {exchange.target} on lo": "ok",
    }
    assert {row["name"]: row["value"] for row in found["levers"]}["nftables"] == "inet tsproxy"
    assert all("nop*" in row["value"] for row in found["witnesses"])
    assert found["connections"][0]["timestamps"] is False


def joined(near: Namespace, far: Namespace) -> None:
    """A veth pair: 10.77.0.1 in `near`, 10.77.0.2 in `far`."""
    near.run("ip", "link", "add", "v0", "type", "veth", "peer", "name", "v1", "netns", f"{far.pid}")
    for namespace, name, address in ((near, "v0", "10.77.0.1/24"), (far, "v1", "10.77.0.2/24")):
        namespace.run("ip", "address", "add", address, "dev", name)
        namespace.run("ip", "link", "set", name, "up")


def test_a_rule_that_serves_loopback_alone_is_caught_on_the_wire(spaces: Any) -> None:
    fooled, far = spaces(rules(f'oifname "lo" {STRIP}'), tcp_timestamps="1"), spaces()
    joined(fooled, far)
    with far_end(far, "10.77.0.2") as exchange:
        code, found = facts(fooled, "-t", exchange.target)
    assert code == 78
    assert shows(found, "SYN") == {"IPv4 SYN on loopback": "ok", f"SYN to {exchange.target} on v0": "leak"}
    assert f"the SYN to {exchange.target} leaves v0 with TSval" in found["missing"][0]
    assert found["fixes"]


def test_over_a_real_link_a_clean_syn_is_seen_leaving_its_interface(spaces: Any) -> None:
    clean, far = spaces(tcp_timestamps="0"), spaces()
    joined(clean, far)
    with far_end(far, "10.77.0.2") as exchange:
        code, found = facts(clean, "-t", exchange.target)
    assert code == 0
    assert shows(found, "to 10.77.0.2") == {f"SYN to {exchange.target} on v0": "ok"}


# What follows the SYN


@contextlib.contextmanager
def raw_far_end(text: str = "", sysctl: str = "1") -> Iterator[Peer]:
    """Behind a veth of a namespace with that sysctl and those rules: wire.clean."""
    with contextlib.closing(Wire(split=False, sysctl=sysctl)) as wire:
        if text:
            wire.rules(text)
        with contextlib.closing(Peer(wire, 4)) as peer:
            yield peer


@contextlib.contextmanager
def checking(peer: Peer, *options: str) -> Iterator[Future[Any]]:
    """facts(), while the far end is played."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(facts, peer.wire.clean, "-t", peer.target, *options)


def sparing(which: str, *options: str) -> str:
    """The rules of `generate`, but for segments of that kind through the veth; all of them hold on loopback."""
    return generated(*options).replace("chain ours {", f'chain ours {{\n oifname "{UPSTREAM}" tcp flags {which} return')


def strips_syns_alone() -> str:
    """Through the veth, that is: neither a later segment on its way out, nor what the far end sends."""
    return sparing("& syn != syn").replace("ct mark 0x74730001 tcp", 'iifname "lo" ct mark 0x74730001 tcp')


def judge(peer: Peer, code: int, found: Dict[str, Any]) -> None:
    """The witness, the rehearsal and the SYN are clean; a later segment is not."""
    name = f"SYN to {peer.target} on {UPSTREAM}"
    assert (code, shows(found, "SYN")) == (78, {"IPv4 SYN on loopback": "ok", name: "leak"})
    assert re.match(rf"a later segment \(flags 0x..\) to {peer.target} leaves {UPSTREAM} with TSval \d", found["missing"][0])


def test_rules_that_strip_syns_alone_are_caught_in_a_later_segment_when_a_timestamp_comes_unasked() -> None:
    with raw_far_end(strips_syns_alone()) as peer, checking(peer) as result:
        flow = peer.accept()
        flow.send(SYN | ACK, mss() + timestamp(7))
        judge(peer, *result.result())


def test_rules_that_strip_syns_alone_are_caught_by_what_follows_an_attempt_that_timed_out() -> None:
    """A simultaneous open (RFC 9293, section 3.5) that is finished too late: no connection shows that TSopt was negotiated."""
    with raw_far_end(strips_syns_alone()) as peer, checking(peer, "--connect-timeout=2s") as result:
        flow = peer.accept()
        flow.send(SYN, mss() + timestamp(7))
        flow.expect(SYN | ACK)
        wait_until(lambda: not is_opening(peer.wire.clean), "the attempt is given up")
        flow.send(ACK, timestamp(8))
        flow.expect_any([FIN | ACK, RST, RST | ACK])
        code, found = result.result()
    judge(peer, code, found)
    assert (found["connections"][0]["outcome"], len(found["missing"])) == ("timed out", 1)


@pytest.mark.parametrize(("spared", "flags"), [("& syn != syn", "0x10"), ("& fin == fin", "0x11")], ids=["all but SYNs", "FIN"])
def test_rules_that_do_not_rewrite_each_segment_are_caught_in_a_later_one(spared: str, flags: str) -> None:
    with contextlib.closing(Wire(split=False)) as wire:
        wire.rules(sparing(spared, *SPOOF))
        exchange = wire.far_end(4)
        code, found = facts(wire.clean, "-t", exchange.target, *SPOOF)
    assert (code, found["connections"][0]["relays"]) == (78, True)
    (missing,) = found["missing"]
    assert missing.startswith(f"a later segment (flags {flags}) to {exchange.target} leaves {UPSTREAM} with TSval ")


def test_an_answer_that_comes_after_the_connect_timeout_is_watched_too() -> None:
    with raw_far_end(sysctl="0") as peer, checking(peer, "--connect-timeout=100ms") as result:
        flow = peer.accept()
        wait_until(lambda: not is_opening(peer.wire.clean), "the attempt is given up")
        flow.send(SYN | ACK, mss())
        flow.expect(RST)
        code, found = result.result()
    assert (code, found["connections"][0]["outcome"]) == (0, "timed out")
    assert found["witnesses"][-1]["note"] == "no timestamp, nor in 1 segments that followed"


def is_opening(namespace: Namespace) -> bool:
    """Whether a connection there is in SYN_SENT or SYN_RECV (include/net/tcp_states.h)."""
    with namespace, open("/proc/thread-self/net/tcp") as file:
        return any(line.split()[3] in ("02", "03") for line in file)


def test_a_capture_that_lost_packets_gives_no_yes(spaces: Any) -> None:
    """Without CAP_NET_ADMIN its buffer has the size of net.core.rmem_max; others send more to the port than it holds."""
    clean, ended = spaces(tcp_timestamps="0"), threading.Event()
    small = ["setpriv", "--bounding-set=-net_admin", *CHECKOUT]
    with far_end(clean) as exchange, clean, socket.create_connection((exchange.host, exchange.port)) as sender:
        with exchange.accept() as receiver, ThreadPoolExecutor(2) as pool:
            pool.submit(pour, sender, ended)
            pool.submit(drain, receiver)
            try:
                code, found = facts(clean, "-t", exchange.target, command=small)
            finally:
                ended.set()
    assert (code, found["witness"], found["fixes"]) == (78, None, [])
    assert found["witnesses"][-1]["shows"] == "unknown"
    assert re.match(r"not all was watched: \d+ packets to these ports were dropped", found["missing"][0])


def pour(sender: socket.socket, ended: threading.Event) -> None:
    """Some 100 MB/s at most, as the other tests want the machine, too."""
    while not ended.wait(0.01):
        sender.sendall(bytes(1 << 20))
    sender.shutdown(socket.SHUT_WR)


def drain(receiver: socket.socket) -> None:
    while receiver.recv(1 << 20):
        pass


# rewrite, preserve, --trust-host


def test_rewrite_holds_where_the_rules_are(spaces: Any) -> None:
    rewriting = spaces(REWRITE, tcp_timestamps="1")
    with far_end(rewriting) as exchange:
        code, found = facts(rewriting, "-t", exchange.target, *SPOOF)
    assert (code, found["witness"], found["timestamps"]) == (0, "nftables", "rewrite")
    assert set(shows(found, "").values()) == {"ok"}
    assert all("TS val 287454020 ecr 0" in row["value"] for row in found["witnesses"])
    assert found["connections"][0]["timestamps"] is True


def test_rewrite_without_rules_is_a_leak_and_nothing_is_sent(spaces: Any) -> None:
    dirty = spaces(tcp_timestamps="1")
    with far_end(dirty) as exchange:
        code, found = facts(dirty, "-t", exchange.target, *SPOOF)
        assert not was_tried(exchange)
    assert code == 78
    assert shows(found, "on loopback") == {"IPv4 SYN on loopback": "leak"}
    assert any("--static-timestamp=287454020" in fix for fix in found["fixes"])


def test_rewrite_where_the_sysctl_is_off_has_nothing_to_rewrite(spaces: Any) -> None:
    code, found = facts(spaces(tcp_timestamps="0"), "-t", "127.0.0.1:9", *SPOOF)
    assert code == 78
    assert shows(found, "tcp_timestamps") == {"net.ipv4.tcp_timestamps": "off"}
    assert "no timestamp to rewrite" in found["missing"][0]
    assert found["fixes"][0] == "sysctl -w net.ipv4.tcp_timestamps=1"


def test_preserve_always_holds_and_still_shows_the_syn(spaces: Any) -> None:
    dirty = spaces(tcp_timestamps="1")
    with far_end(dirty) as exchange:
        code, found = facts(dirty, "-t", exchange.target, "--timestamps=preserve")
    assert (code, found["witness"]) == (0, "none")
    assert len(found["witnesses"]) == 2
    assert all("TS val" in row["value"] and row["shows"] == "ok" for row in found["witnesses"])
    assert (found["connections"][0]["timestamps"], found["connections"][0]["relays"]) == (True, True)


def test_a_trusted_host_is_believed_until_a_connection_shows_otherwise(spaces: Any) -> None:
    dirty = spaces(tcp_timestamps="1")
    code, found = facts(dirty, "-t", "127.0.0.1:9", "--trust-host")
    assert (code, found["witness"]) == (0, "trusted")
    assert shows(found, "on loopback") == {"IPv4 SYN on loopback": "leak"}
    with far_end(dirty) as exchange:
        code, found = facts(dirty, "-t", exchange.target, "--trust-host")
    assert code == 78
    assert (found["connections"][0]["timestamps"], found["connections"][0]["relays"]) == (True, False)
    assert "would not be relayed: timestamps negotiated" in found["missing"][0]


# Targets


def test_a_target_that_refuses_times_out_or_has_no_route_changes_nothing(spaces: Any) -> None:
    clean = spaces(rules("tcp dport 7 drop"), tcp_timestamps="0")
    targets = [f"--target={target}" for target in ("127.0.0.1:9", "127.0.0.1:7", "192.0.2.1:9")]
    code, found = facts(clean, *targets, "--connect-timeout=50ms")
    assert (code, {one["relays"] for one in found["connections"]}) == (0, {None})
    outcomes = {one["address"]: (one["outcome"], one["note"]) for one in found["connections"]}
    assert outcomes == {
        "127.0.0.1:9": ("failed", "Connection refused"),
        "127.0.0.1:7": ("timed out", "no answer within 0.05 s"),
        "192.0.2.1:9": ("failed", "Network is unreachable"),
    }


def test_a_target_that_can_not_be_resolved_ends_with_75_as_for_relaying() -> None:
    done = subprocess.run(
        [*CHECKOUT, "check", "-t", "no-such-host.invalid:443"], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (75, "")
    assert done.stderr.startswith("tsproxy.py: --target: given 'no-such-host.invalid:443'; can't be resolved")
    assert done.stderr.count("\n") == 1


def test_one_target_of_two_that_can_not_be_resolved_is_shown(spaces: Any) -> None:
    code, found = facts(spaces(tcp_timestamps="0"), "-t", NOWHERE, "-t", "no-such-host.invalid:443")
    assert code == 0
    assert [text.split(":")[0] for text in found["unresolved"]] == ["no-such-host.invalid"]


# Without rights


@pytest.fixture
def unprivileged(bundle: Path) -> Iterator[List[str]]:
    """The program as user 65534 runs it."""
    with as_nobody(bundle) as command:
        yield command


@pytest.mark.parametrize(("value", "code", "loopback"), [("0", 0, "ok"), ("1", 78, "leak")])
def test_a_user_without_rights_gets_the_same_verdict(
    spaces: Any, unprivileged: List[str], value: str, code: int, loopback: str
) -> None:
    found_code, found = facts(spaces(tcp_timestamps=value), "-t", "127.0.0.1:9", command=unprivileged)
    assert found_code == code
    assert shows(found, "SYN") == {"IPv4 SYN on loopback": loopback, "SYN on the wire": "unknown"}
    assert found["host"]["rights"] == "uid 65534, neither CAP_NET_ADMIN nor CAP_NET_RAW"


def test_a_user_without_rights_is_told_that_the_wire_was_not_watched_and_why(spaces: Any, unprivileged: List[str]) -> None:
    code, out = check(spaces(generated(), tcp_timestamps="1"), "-t", "127.0.0.1:9", command=unprivileged)
    said = " ".join(out.split())
    assert code == 0
    assert "not watched: that takes CAP_NET_RAW, which uid 65534 does not have here" in said
    assert "the rules can't be read (that takes CAP_NET_ADMIN)" in said
    assert rehearsal.UNASKED in said
    assert rehearsal.RESET not in said, "it takes a right to see that"


# The table


def table(namespace: Namespace, *options: str, **environment: str) -> str:
    return check(namespace, *options, env={**os.environ, **environment})[1]


@pytest.mark.parametrize("value", ["0", "1"])
def test_the_table_fits_80_columns_but_for_the_commands_to_copy(spaces: Any, value: str) -> None:
    out = table(spaces(tcp_timestamps=value), "-t", "[::1]:9", "-t", "127.0.0.1:9", PYTHONIOENCODING="utf-8")
    body, _, commands = out.partition("An administrator runs one of these, once:")
    assert all(len(line) <= 80 for line in body.splitlines())
    assert f"net.ipv4.tcp_timestamps = {value}" in body
    assert ("sysctl -w net.ipv4.tcp_timestamps=0" in commands) == (value == "1")
    assert ("YES" in body, "NO: " in body) == (value == "0", value == "1")
    assert "\x1b" not in out


def test_a_long_address_keeps_its_line_whole(spaces: Any) -> None:
    target = "[2001:db8:1111:2222:3333:4444:5555:6666]:65535"
    out = table(spaces(tcp_timestamps="0"), "-t", target, PYTHONIOENCODING="utf-8")
    assert f"  {target}" in out.splitlines()
    assert all(len(line) <= 80 for line in out.splitlines())


def test_output_that_can_not_show_marks_gets_plain_ascii(spaces: Any) -> None:
    out = table(spaces(tcp_timestamps="1"), "-t", "127.0.0.1:9", PYTHONIOENCODING="ascii")
    assert out.isascii()
    assert re.search(r"IPv4 SYN on loopback +LEAK +TSval", out)


@pytest.mark.parametrize(("no_colour", "coloured"), [("", True), ("1", False)])
def test_a_terminal_gets_colours_unless_no_color_says_no(spaces: Any, no_colour: str, coloured: bool) -> None:
    command = [*spaces(tcp_timestamps="0").enter, *CHECKOUT, "check", "-t", NOWHERE]
    with PtySession(command, env={"NO_COLOR": no_colour}) as session:
        assert session.wait() == 0
    assert (b"\x1b[32m" in session.output) == coloured
    assert "✓ ok" in session.output.decode()


def test_who_stops_reading_is_no_traceback(spaces: Any) -> None:
    command = [*spaces(tcp_timestamps="0").enter, *CHECKOUT, "check", "-t", NOWHERE]
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer) as stdout:
        done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, timeout=60, check=False)
    assert (done.returncode, b"Traceback" in done.stderr) == (1, False)


def test_a_real_exchange_sees_one_orderly_connection(spaces: Any) -> None:
    """No reset, no byte: what a check leaves in an exchange's log is a connection that came and went."""
    clean = spaces(tcp_timestamps="0")
    with far_end(clean) as exchange:
        check(clean, "-t", exchange.target)
        with exchange.accept() as seen:
            assert seen.recv(1) == b""
        assert not was_tried(exchange)


def test_a_namespace_with_a_name_is_called_by_it_and_a_strange_one_stops_nothing(spaces: Any) -> None:
    clean = spaces(tcp_timestamps="0")
    script = """mount -t tmpfs tmpfs /run && mkdir /run/netns && name=$(printf 'b\\303\\266rse') && touch "/run/netns/$name" &&
        mount --bind /proc/self/ns/net "/run/netns/$name" && exec "$@" """
    inside = ["unshare", "--mount", "sh", "-c", script, "sh", *CHECKOUT]
    assert "börse" in facts(clean, "-t", NOWHERE, command=inside)[1]["host"]["network_namespace"]
    code, out = check(clean, "-t", NOWHERE, command=inside, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert code == 0
    assert '"b?rse"' in out
