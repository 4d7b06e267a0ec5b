"""`check --routes`: each route is proved by itself, the table stays short, the JSON says of each what `check` says of one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

import pytest
from checked import NOWHERE, STRIP, far_end, rules, shows, was_tried
from harness import CHECKOUT, wait_until
from namespaces import Namespace
from rules import generated
from unprivileged import as_nobody

pytestmark = pytest.mark.root

SYN_SENT = "02"  # include/net/tcp_states.h
DEAF = 7  # SYNs to this port are dropped


class Routes:
    """A file of routes, and `check` of it in a namespace."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, *sections: str, **targets: str) -> None:
        """Sections as they are, and a route for each name, with a port of its own."""
        named = [f"[{name}]\nport = {9001 + at}\ntarget = {target}\n" for at, (name, target) in enumerate(targets.items())]
        self.path.write_text("\n".join([*sections, *named]))

    def command(self, namespace: Namespace, *options: str, command: Sequence[str] = CHECKOUT) -> List[str]:
        return [*namespace.enter, *command, "check", f"--routes={self.path}", *options]

    def table(self, namespace: Namespace, *options: str, encoding: str = "utf-8", **run: Any) -> Tuple[int, str]:
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        command = self.command(namespace, *options, **run)
        done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=60, check=False)
        assert done.stderr == ""
        return done.returncode, done.stdout

    def facts(self, namespace: Namespace, *options: str, **run: Any) -> Tuple[int, Dict[str, Dict[str, Any]]]:
        """The exit code, and what is said of each route."""
        code, out = self.table(namespace, *options, "--json", **run)
        assert out.count("\n") == 1
        found = json.loads(out)
        assert found.keys() == {"version", "holds", "routes"}
        assert found["holds"] == (code == 0) == all(route["holds"] for route in found["routes"])
        assert any(route["missing"] for route in found["routes"]) == (code == 78)
        return code, {route["route"]: route for route in found["routes"]}


@pytest.fixture
def routes(tmp_path: Path) -> Routes:
    return Routes(tmp_path / "routes.ini")


def state_count(namespace: Namespace, state: str) -> int:
    with namespace, open("/proc/thread-self/net/tcp") as file:
        return sum(line.split()[3] == state for line in file)


# What is said of each


def test_each_route_that_holds_is_tried_once_and_has_the_object_of_a_check_of_its_own(
    spaces: Any, routes: Routes, form: Tuple[List[str], Any]
) -> None:
    command, _ = form
    clean = spaces(tcp_timestamps="0")
    with far_end(clean) as four, far_end(clean, "::1") as six:
        routes.write(
            "[DEFAULT]\nkeepalive = 7", a=four.target, b=six.target, c=f"{four.target}\n {six.target}\ntimestamps = preserve"
        )
        code, found = routes.facts(clean, command=command)
        for exchange in (four, six):
            for _ in range(2):  # of its own route, and of the third one
                with exchange.accept() as seen:
                    assert seen.recv(1) == b"", "an orderly end"
            assert not was_tried(exchange)
        alone = [*clean.enter, *command, "check", "-t", four.target, "--json"]
        single = json.loads(subprocess.run(alone, capture_output=True, check=False).stdout)
    assert (code, list(found), {name: route["witness"] for name, route in found.items()}) == (
        *(0, ["a", "b", "c"]),
        {"a": "sysctl", "b": "sysctl", "c": "none"},
    )
    assert found["a"].keys() == single.keys() | {"route"}
    same = single.keys() - {"connections"}
    assert {name: found["a"][name] for name in same} == {name: single[name] for name in same}
    assert shows(found["b"], "SYN") == {"IPv6 SYN on loopback": "ok", f"SYN to {six.target} on lo": "ok"}
    assert [one["outcome"] for route in found.values() for one in route["connections"]] == ["connected"] * 4
    assert [one["relays"] for route in found.values() for one in route["connections"]] == [True] * 4


def test_a_route_that_fails_does_not_fail_the_others_and_its_target_is_left_alone(spaces: Any, routes: Routes) -> None:
    partly = spaces(rules(f"meta nfproto ipv4 {STRIP}"), tcp_timestamps="1")
    with far_end(partly) as four, far_end(partly, "::1") as six:
        routes.write(four=four.target, six=six.target, both=f"{four.target}\n {six.target}")
        code, found = routes.facts(partly)
        assert was_tried(four)
        assert not was_tried(four)
        assert not was_tried(six)
    assert (code, {name: route["witness"] for name, route in found.items()}) == (
        *(78,),
        {"four": "nftables", "six": None, "both": None},
    )
    assert found["four"]["missing"] == found["four"]["fixes"] == []
    assert found["six"]["missing"] == found["both"]["missing"] == ["the witness SYN (IPv6) carries TSopt"]
    assert f"tsproxy.py generate systemd --routes={routes.path}" in found["six"]["fixes"]


def test_a_name_that_can_not_be_resolved_ends_with_75_and_the_others_are_reported(spaces: Any, routes: Routes) -> None:
    clean = spaces(tcp_timestamps="0")
    routes.write(gone="no-such-host.invalid:443", here=NOWHERE, half=f"no-such-host.invalid:443\n {NOWHERE}")
    code, found = routes.facts(clean)
    assert (code, {name: route["holds"] for name, route in found.items()}) == (75, {"gone": False, "here": True, "half": True})
    assert [len(route["unresolved"]) for route in found.values()] == [1, 0, 1]
    assert found["gone"]["unresolved"][0].startswith("no-such-host.invalid:443: ")
    code, out = routes.table(clean)
    assert code == 75
    assert "NOT KNOWN for 1 of 3 routes, for want of an address: gone\n" in out
    assert out.count("can't be resolved: no-such-host.invalid:443") == 1
    clean.sysctl("tcp_timestamps", "1")
    code, out = routes.table(clean)
    assert code == 78, "what fails comes before what is not known"
    assert "NO: the policy would not hold for 2 of 3 routes: here, half\n" in out


def test_a_dscp_that_rules_do_not_set_fails_its_route_alone(spaces: Any, routes: Routes) -> None:
    filtered = spaces(generated(), tcp_timestamps="1")
    routes.write(plain=NOWHERE, marked=f"{NOWHERE}\ndscp = 46")
    code, found = routes.facts(filtered)
    assert (code, found["plain"]["holds"], found["marked"]["holds"]) == (78, True, False)
    (missing,) = found["marked"]["missing"]
    assert missing.startswith("--dscp: given '46'; allowed: 0, which packet filter rules set here")
    assert found["marked"]["connections"] == []


def test_a_trusted_route_is_not_watched_and_the_others_are(spaces: Any, routes: Routes) -> None:
    clean = spaces(tcp_timestamps="0")
    with far_end(clean) as exchange:
        routes.write(plain=exchange.target, trusted=f"{exchange.target}\ntrust-host = on")
        code, found = routes.facts(clean)
    assert (code, found["plain"]["witness"], found["trusted"]["witness"]) == (0, "sysctl", "trusted")
    assert shows(found["plain"], "wire") == {}
    assert shows(found["plain"], "on lo")[f"SYN to {exchange.target} on lo"] == "ok"
    assert shows(found["trusted"], "wire") == {"SYN on the wire": "unknown"}


def test_a_file_for_listeners_that_are_handed_over_is_checked_as_well(spaces: Any, routes: Routes) -> None:
    routes.path.write_text(f"[a]\ntarget = {NOWHERE}\n")
    assert routes.facts(spaces(tcp_timestamps="0"))[0] == 0


# Many


def test_routes_are_tried_at_the_same_time(spaces: Any, routes: Routes) -> None:
    """All 30 wait at once; then their SYNs, which are sent again, are answered."""
    deaf = spaces(rules(f"tcp dport {DEAF} drop"), tcp_timestamps="0")
    routes.write("[DEFAULT]\nconnect-timeout = 20s", **{f"r{number}": f"127.0.0.1:{DEAF}" for number in range(30)})
    with subprocess.Popen(routes.command(deaf, "--json"), stdout=subprocess.PIPE) as process:
        assert process.stdout
        wait_until(lambda: state_count(deaf, SYN_SENT) == 30, "30 connections are being made")
        deaf.run("nft", "delete", "table", "inet", "tsproxy")
        found = json.loads(process.stdout.read())
    assert (process.returncode, found["holds"]) == (0, True)
    outcomes = [(one["outcome"], one["note"]) for route in found["routes"] for one in route["connections"]]
    assert outcomes == [("failed", "Connection refused")] * 30


def test_one_route_has_one_connection_at_a_time(spaces: Any, routes: Routes) -> None:
    """A look at /proc may see one that has just ended beside the next one; two looks, one after the other, do not."""
    deaf = spaces(rules(f"tcp dport {DEAF} drop"), tcp_timestamps="0")
    routes.write("[DEFAULT]\nconnect-timeout = 500ms", a=f"127.0.0.1:{DEAF}\n 127.0.0.2:{DEAF}", b=f"127.0.0.3:{DEAF}")
    seen = [0]
    with subprocess.Popen(routes.command(deaf, "--json"), stdout=subprocess.PIPE) as process:
        while process.poll() is None:
            seen.append(state_count(deaf, SYN_SENT))
        assert process.stdout
        found = json.loads(process.stdout.read())
    assert max(map(min, seen, seen[1:])) <= 2
    assert [one["outcome"] for route in found["routes"] for one in route["connections"]] == ["timed out"] * 3


def test_the_wire_is_watched_for_more_ports_than_one_filter_can_have(spaces: Any, routes: Routes) -> None:
    clean = spaces(tcp_timestamps="0")
    routes.write(**{f"r{number}": f"127.0.0.1:{20000 + number}" for number in range(300)})
    code, found = routes.facts(clean)
    assert code == 0
    assert [list(shows(route, "SYN to ").values()) for route in found.values()] == [["ok"]] * 300


# The table

NAMES = ["oe-primary", "oe-backup", "a-name-that-is-longer-than-its-column", *(f"md-{number}" for number in range(27))]


def many(target: str) -> Dict[str, str]:
    return dict.fromkeys(NAMES, target)


@pytest.mark.parametrize("value", ["0", "1"])
def test_the_table_of_30_routes_has_a_row_for_each_and_says_what_is_wrong_once(spaces: Any, routes: Routes, value: str) -> None:
    namespace = spaces(tcp_timestamps=value)
    routes.write(
        "[x-copy]\nport = 1\ntarget = [::1]:9\ntimestamps = preserve",
        **many("gateway-with-a-long-name.invalid:443\n 192.0.2.1:9"),
    )
    code, out = routes.table(namespace)
    body, _, commands = out.partition("An administrator runs one of these, once:")
    assert [line for line in body.splitlines() if len(line) > 80 and line.strip() != str(routes.path)] == []
    assert len(body.splitlines()) < 31 + 50
    rows = re.findall(r"^  [✓✗] (\S+)", out, re.M)
    assert [row for row in rows if not row.startswith("nft")] == ["x-copy", *NAMES]
    assert code == (0 if value == "0" else 78)
    if value == "1":
        assert body.count("missing") == 1
        assert "NO: the policy would not hold for 30 of 31 routes: oe-primary, oe-backup," in body
        assert commands.count("sysctl -w") == 1
        assert commands.count(f"generate systemd --routes={routes.path}") == 1
    else:
        assert "YES, for all 31 routes:" in body


def test_one_row_and_one_yes_for_a_single_route(spaces: Any, routes: Routes) -> None:
    routes.write(only=NOWHERE)
    code, out = routes.table(spaces(tcp_timestamps="0"))
    assert code == 0
    assert re.search(r"^  ✓ only 192\.0\.2\.1:9 +strip +sysctl +failed$", out, re.M)
    assert out.endswith("YES: the policy holds by this namespace's sysctl, for the route\n")


def test_leaks_that_differ_in_their_target_alone_are_one_in_the_table_and_exact_in_json(spaces: Any, routes: Routes) -> None:
    fooled, far = spaces(rules(f'oifname "lo" {STRIP}'), tcp_timestamps="1"), spaces()
    fooled.run("ip", "link", "add", "v0", "type", "veth", "peer", "name", "v1", "netns", f"{far.pid}")
    for namespace, name, address in ((fooled, "v0", "10.77.0.1/24"), (far, "v1", "10.77.0.2/24")):
        namespace.run("ip", "address", "add", address, "dev", name)
        namespace.run("ip", "link", "set", name, "up")
    with far_end(far, "10.77.0.2") as one, far_end(far, "10.77.0.2") as other:
        routes.write(a=one.target, b=other.target)
        code, found = routes.facts(fooled)
        out = routes.table(fooled)[1]
    assert code == 78
    for name, exchange in (("a", one), ("b", other)):
        assert re.fullmatch(rf"the SYN to {exchange.target} leaves v0 with TSval \d+", found[name]["missing"][0])
    assert re.findall(r"^  missing +(.*)$", out, re.M) == [
        "the SYN to its target leaves v0 with a TSval",
        "the connection to its target would not be relayed: timestamps",
    ]
    assert "SYNs on the wire            ✗ leak    2 of 2 leave with what they must not" in out


def test_leaks_of_one_route_are_told_with_their_targets(spaces: Any, routes: Routes) -> None:
    fooled = spaces(rules(f'oifname "lo" tcp dport != {{ 44, 443 }} {STRIP}'), tcp_timestamps="1")
    routes.write(a="127.0.0.1:44\n 127.0.0.1:443", b=NOWHERE)
    found = re.findall(r"^  missing +(.*)$", routes.table(fooled)[1], re.M)
    assert [re.sub(r"TSval \d+", "TSval", text) for text in found] == [
        f"the SYN to 127.0.0.1:{port} leaves lo with TSval" for port in (44, 443)
    ]


def test_a_table_in_plain_ascii_shows_which_routes_fail(spaces: Any, routes: Routes) -> None:
    routes.write(a=NOWHERE, b=f"{NOWHERE}\ntimestamps = preserve")
    code, out = routes.table(spaces(tcp_timestamps="1"), encoding="ascii")
    assert (code, out.isascii()) == (78, True)
    assert re.findall(r"^  ([yN?]) ([ab]) ", out, re.M) == [("N", "a"), ("y", "b")]


def test_no_name_of_a_file_reaches_a_terminal_raw(spaces: Any, tmp_path: Path) -> None:
    routes = Routes(tmp_path / "\x1b[31m.ini")
    routes.write(a=NOWHERE)
    assert "\x1b" not in routes.table(spaces(tcp_timestamps="1"))[1]


def test_why_the_wire_was_not_watched_is_told_once(spaces: Any, bundle: Path) -> None:
    text = "".join(f"[r{number}]\nport = {9000 + number}\ntarget = 127.0.0.1:{number}\n" for number in range(1, 31))
    with as_nobody(bundle) as command, tempfile.NamedTemporaryFile("w") as file:
        file.write(text)
        file.flush()
        os.chmod(file.name, 0o644)
        code, out = Routes(Path(file.name)).table(spaces(tcp_timestamps="0"), command=command)
    assert code == 0
    assert " ".join(out.split()).count("CAP_NET_RAW, which uid 65534") == 1
