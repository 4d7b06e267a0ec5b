"""`generate KIND --routes=FILE`: one set-up for all routes of a file, read by the tools that it is meant for."""

from __future__ import annotations

import configparser
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence, Set, Tuple

import kubernetes_validate
import pytest
import yaml
from _tsproxy.cli import exits, parser, routes
from _tsproxy.cli.config import Config, Route
from _tsproxy.cli.exits import Exit
from _tsproxy.linux.limits import descriptors_for
from _tsproxy.tools import generate
from _tsproxy.tools.generate import templates
from command_line import MANUAL
from docopt import docopt
from handover import hand_over, listeners
from harness import CHECKOUT, Exchange, Proxy, echo, examples, free_port, leave_out, receive_exactly, wait_until
from hypothesis import example, given, settings
from hypothesis import strategies as st
from namespaces import Namespace

KINDS = list(generate.KINDS)
OTHERS = [kind for kind in KINDS if kind != "nftables"]
VENUE = """\
# One venue.
[DEFAULT]
idle-timeout = 1.5s
bind = 127.0.0.2

# /etc/no.file.of.mine
[oe-primary]
port = 9001
target = 203.0.113.10:443

[oe-backup.2_x-]
bind = ::1
port = 9001
target = [fe80::1%eth0]:443
         203.0.113.11:443
max-connections = 4
trust-host = off
allow = 10.1.0.0/16
        2001:db8::/32

[drop-copy]
port = 9003
target = dc1.exchange.example:443
timestamps = preserve
buffer-size = 1m
"""
NAMES = ["oe-primary", "oe-backup.2_x-", "drop-copy"]
MANY = "".join(f"[oe-{n}]\nport = {9000 + n}\ntarget = 203.0.113.{n}:443\nmax-connections = 4\n" for n in range(200))
OWN_PORTS = VENUE.replace("bind = ::1\nport = 9001", "bind = ::1\nport = 9002")
PLAIN = "[a]\nport = 9001\ntarget = 203.0.113.10:443\n[b]\nport = 9002\ntarget = 203.0.113.11:443\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "routes of 'it' & $HOME.ini"
    path.write_text(VENUE)
    return path


def asked(path: Path, text: str, *options: str) -> Config:
    """The Config of such a file, and of these options."""
    path.write_text(text)
    words = parser.normalize(MANUAL, [f"--routes={path}", *options])
    return routes.config_of(docopt(MANUAL, words, default_help=False), None)


def made(path: Path, kind: str, text: str, *options: str) -> str:
    return generate.KINDS[kind](asked(path, text, *options))


def command_line(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CHECKOUT, "generate", *options], capture_output=True, text=True, check=False)


def refusal(path: Path, kind: str, text: str, *options: str) -> str:
    """The line that it costs."""
    with pytest.raises(Exit) as end:
        generate.run(kind, asked(path, text, *options))
    assert end.value.code == exits.USAGE
    assert str(end.value).isprintable()
    return str(end.value)


def require(tool: str, why: str) -> None:
    """Skip, loudly, where a tool is not there; in CI that is a failure."""
    if not shutil.which(tool):
        leave_out(f"no {tool}: {why} is NOT tested here")


# What all kinds share


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_in_the_text_prints_the_text_of_all_routes_again(kind: str, file: Path) -> None:
    file.write_text(OWN_PORTS)
    printed = command_line(kind, f"--routes={file}", "--user=nobody", "--drain-timeout=7", "--keepalive=9")
    assert (printed.returncode, printed.stderr) == (0, "")
    found = re.search(rf"tsproxy\.py (generate {kind} [^|>\n]*)", printed.stdout)
    assert found
    again = shlex.split(found[1])
    assert {"--drain-timeout=7", "--keepalive=9"} <= set(again)
    assert command_line(*again[1:]).stdout == printed.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_a_set_up_for_routes_is_filled_in_and_fits_a_terminal(kind: str, tmp_path: Path) -> None:
    printed = made(tmp_path / "r", kind, OWN_PORTS, "--user=nobody", "--cpus=0", "--reuse-port")
    assert f"Asked for: the 3 routes of {tmp_path}/r." in printed
    assert "preserve (drop-copy):" in printed
    assert re.search(r"^# (Load|Make): ", printed, re.M)
    assert re.search(r"^# Undo: ", printed, re.M)
    assert not templates.PLACEHOLDER.findall(printed)
    assert not re.search(r"[ \t]$", printed, re.M)
    commands = (str(tmp_path), "tsproxy-routes.ini")
    assert [line for line in printed.splitlines() if len(line) > 128 and not any(map(line.__contains__, commands))] == []


@pytest.mark.parametrize("kind", KINDS)
def test_where_each_route_preserves_there_is_no_set_up(kind: str, tmp_path: Path) -> None:
    said = refusal(tmp_path / "r", kind, PLAIN, "--timestamps=preserve")
    assert said.endswith("[a], [b] timestamps: given 'preserve'; allowed with generate: strip or rewrite (it needs no set-up)")


@pytest.mark.parametrize("kind", OTHERS)
def test_what_a_route_can_not_have_in_a_namespace_of_its_own_is_refused_by_its_name(kind: str, tmp_path: Path) -> None:
    free = PLAIN.replace("9001", "0")
    assert refusal(tmp_path / "r", kind, free) == (
        f"{tmp_path}/r:2: [a] port: given '0'; allowed with generate {kind}: a port from 1 to 65535"
    )
    unsaid = PLAIN.replace("port = 9001\n", "")
    assert refusal(tmp_path / "r", kind, unsaid) == (
        f"{tmp_path}/r:1: [a] port: given nothing; allowed with generate {kind}: a port from 1 to 65535"
    )
    bound = f"[DEFAULT]\ninterface = eth1\n{PLAIN}"
    assert f"{tmp_path}/r:2: [a], [b] interface: given 'eth1'; allowed with generate {kind}: none (" in refusal(
        tmp_path / "r", kind, bound
    )
    assert "rewrite'; allowed with generate" in refusal(
        tmp_path / "r", kind, PLAIN, "--timestamps=rewrite", "--static-timestamp=1"
    )


def test_a_refusal_of_many_routes_is_one_short_line(tmp_path: Path) -> None:
    said = refusal(tmp_path / "r", "docker", f"[DEFAULT]\ninterface = eth1\n{MANY}")
    assert "[oe-0], [oe-1], [oe-2], [oe-3], [oe-4] and 195 more interface: given 'eth1'" in said


@pytest.mark.parametrize("name", ["a\nb", "a\tb", "\x1b[31m", "\u2028", "\u00e9", os.fsdecode(b"\xff")])
@pytest.mark.parametrize("kind", KINDS)
def test_a_path_that_a_comment_can_not_hold_is_refused(kind: str, name: str, tmp_path: Path) -> None:
    said = refusal(tmp_path / name, kind, PLAIN)
    assert said.startswith("--routes: given ")
    assert said.endswith("; allowed with generate: a path of printable ASCII characters")


@pytest.mark.parametrize(
    ("kind", "path"),
    [("systemd", "/etc/tsproxy/routes.ini"), ("netns", "/x/tsproxy-routes.ini"), ("docker", "/x/tsproxy-routes/routes.ini")],
)
def test_no_set_up_is_made_of_the_file_that_it_has_written(kind: str, path: str, tmp_path: Path) -> None:
    """It would be overwritten by one that does not say where clients connect; a shell empties it before it is read."""
    config = asked(tmp_path / "r", OWN_PORTS)
    with pytest.raises(Exit) as end:
        generate.run(kind, config._replace(routes_file=path))
    assert end.value.code == exits.USAGE
    assert str(end.value).startswith(f"--routes: given '{path}'; allowed with generate {kind}: a file elsewhere (")
    printed = generate.KINDS[kind](config)
    assert re.search(rf"^# /etc/tsproxy/routes.ini$|> ?{os.path.relpath(path, '/x')}$", printed, re.M), (
        "or the names differ now"
    )


# The routes as a set-up has them

_NAME = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,62}", fullmatch=True)
_KEYS = st.fixed_dictionaries(
    {},
    optional={
        "bind": st.sampled_from(["0.0.0.0", "::", "127.0.0.1", "2001:db8::5"]),
        "source": st.sampled_from(["::1", "10.0.0.1\n  ::1"]),
        "allow": st.sampled_from(["10.0.0.0/8", "10.0.0.0/8\n  2001:db8::/32"]),
        "timestamps": st.sampled_from(["strip", "preserve"]),
        "trust-host": st.sampled_from(["on", "off"]),
        "max-connections": st.integers(1, 1000),
        "on-full": st.sampled_from(["reject", "queue"]),
        "buffer-size": st.sampled_from(["64k", "1024"]),
        "connect-timeout": st.sampled_from(["5", "250ms", "0.001"]),
        "idle-timeout": st.sampled_from(["0", "1h", "100000.123456789"]),
        "keepalive": st.sampled_from(["0", "30", "1500ms"]),
        "dscp": st.integers(0, 63),
        "zero-copy": st.sampled_from(["auto", "never"]),
    },
)
_OPTIONS = st.lists(
    st.sampled_from(["--trust-host", "--timestamps=preserve", "--idle-timeout=9", "--max-connections=7", "--dscp=46"]),
    unique=True,
)


def _section(name: str, keys: Dict[str, Any]) -> str:
    return f"[{name}]\n" + "".join(f"{key} = {value}\n" for key, value in keys.items())


_FILES = st.tuples(_KEYS, st.dictionaries(_NAME, _KEYS, min_size=1, max_size=4)).map(
    lambda given: (
        _section("DEFAULT", given[0])
        + "".join(
            _section(name, {**keys, "port": 9000 + number, "target": "[fe80::1%eth0.7]:9\n b.example:1"})
            for number, (name, keys) in enumerate(given[1].items())
        )
    )
)


def without_listener(route: Route) -> Route:
    return route._replace(port=0, bind="", listen_options=())


@given(_FILES, _OPTIONS)
@settings(deadline=None, max_examples=examples(100))
def test_the_file_that_the_service_reads_has_the_same_routes_without_listeners(
    tmp_path_factory: pytest.TempPathFactory, text: str, options: Set[str]
) -> None:
    config = asked(tmp_path_factory.getbasetemp() / "drawn.ini", text, *options)
    written = parts(generate.KINDS["systemd"](config))["/etc/tsproxy/routes.ini"]
    names = [route.name for route in config.routes]
    base = config.defaults
    assert base
    again = routes.parse(written.encode(), "written", base, names).routes
    assert [without_listener(route) for route in again] == [without_listener(route) for route in config.routes]
    assert [route.listen_options for route in again] == [()] * len(names)
    configparser.ConfigParser(interpolation=None, delimiters="=").read_string(written)


@given(_FILES, _OPTIONS)
@settings(deadline=None, max_examples=examples(100))
def test_the_file_that_a_container_reads_has_the_same_routes_on_all_its_addresses(
    tmp_path_factory: pytest.TempPathFactory, text: str, options: Set[str]
) -> None:
    config = asked(tmp_path_factory.getbasetemp() / "drawn.ini", text, *options)
    printed = subprocess.run(["sh", "-s", "routes"], input=generate.KINDS["docker"](config), capture_output=True, text=True)
    assert (printed.returncode, printed.stderr) == (0, "")
    base = config.defaults
    assert base
    again = routes.parse(printed.stdout.encode(), "printed", base, ()).routes
    assert [without_listener(route) for route in again] == [without_listener(route) for route in config.routes]
    assert {route.bind for route in again} <= {"0.0.0.0", "::"}


# nftables


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    with contextlib.closing(Namespace(tcp_timestamps="1")) as made_:
        yield made_


@pytest.mark.root
@pytest.mark.parametrize("options", [(), ("--user=nobody",), ("--timestamps=rewrite", "--static-timestamp=7")])
def test_one_set_of_rules_for_all_routes_loads(namespace: Namespace, options: Tuple[str, ...], tmp_path: Path) -> None:
    rules = made(tmp_path / "r", "nftables", PLAIN if "--timestamps=rewrite" in options else VENUE, *options)
    namespace.run("nft", "-c", "-f", "-", input=rules)
    namespace.run("nft", "-f", "-", input=rules)
    assert namespace.run("nft", "list", "tables") == "table inet tsproxy\n"
    assert ("tsval set 7" in namespace.run("nft", "list", "ruleset")) == ("--timestamps=rewrite" in options)


def test_the_rules_do_not_depend_on_how_many_routes_there_are(tmp_path: Path) -> None:
    def rules(text: str) -> str:
        return re.sub(r"^ *#.*\n", "", made(tmp_path / "r", "nftables", text), flags=re.M)

    assert rules(MANY) == rules(PLAIN) == rules(VENUE)


def test_rules_set_one_dscp_for_all_routes_and_say_for_which_others(tmp_path: Path) -> None:
    named = PLAIN.replace("[a]\n", "[a]\ndscp = 46\n")
    printed = made(tmp_path / "r", "nftables", named)
    assert re.findall(r"ip6? dscp set (\d+)", printed) == ["46", "46"]
    assert "# Note:   dscp = 46 is set for all: also for b.\n" in printed
    assert "is set for all" not in made(tmp_path / "r", "nftables", named, "--dscp=46")


def test_rules_need_no_port_of_a_route_whose_socket_is_handed_over(tmp_path: Path) -> None:
    assert "table inet tsproxy" in made(tmp_path / "r", "nftables", "[a]\ntarget = 192.0.2.1:443\n")


def test_routes_with_dscps_of_their_own_are_refused_under_rules(tmp_path: Path) -> None:
    differ = PLAIN.replace("[a]\n", "[a]\ndscp = 46\n").replace("[b]\n", "[b]\ndscp = 10\n")
    assert refusal(tmp_path / "r", "nftables", differ) == (
        f"{tmp_path}/r:2: [a] dscp: given '46'; allowed with generate nftables: one for all, as its rules set it; not 10 (b)"
    )
    tagged = PLAIN.replace("[b]\n", "[b]\ndscp = 3\n")
    said = "[b] dscp: given '3'; allowed with generate nftables: any other (it is tsproxy's tag)"
    assert refusal(tmp_path / "r", "nftables", tagged).endswith(said)


@pytest.mark.root
def test_rules_leave_a_route_alone_that_preserves_timestamps_as_they_say(namespace: Namespace, tmp_path: Path) -> None:
    with namespace, contextlib.closing(Exchange(host="127.0.0.1")) as far:
        text = f"[a]\nport = 1\ntarget = {far.target}\n[b]\nport = 2\ntarget = {far.target}\ntimestamps = preserve\n"
        rules = made(tmp_path / "r", "nftables", text)
        assert "theirs have no tag, so these rules leave them alone" in rules
        namespace.run("nft", "-f", "-", input=rules)
        said = json.loads(namespace.run(*CHECKOUT, "check", f"--routes={tmp_path}/r", "--json"))
    seen = {route["route"]: route["witnesses"][-1]["value"] for route in said["routes"]}
    assert "nop*11" in seen["a"]
    assert "TS val" in seen["b"]


# netns


@pytest.mark.parametrize("text", [VENUE, MANY], ids=["few", "200"])
def test_the_namespace_is_made_for_the_addresses_of_all_routes(text: str, file: Path) -> None:
    script = made(file, "netns", f"[DEFAULT]\nsource = 192.0.2.7\n  ::1\n{text.replace('[DEFAULT]', '')}")
    assert subprocess.run(["sh", "-n"], input=script, text=True, check=False).returncode == 0
    assert "SOURCES='192.0.2.7 ::1'" in script
    assert ("fd74:7370::2" in script) == ("fe80" in text)


def answers(address: Tuple[str, int]) -> bool:
    with socket.create_connection(address, 20) as client:
        client.sendall(b"order")
        return receive_exactly(client, 5) == b"order"


FORMS = {
    "plain": "[a]\nport = 9001\nbind = 127.0.0.2\ntarget = x.example:1\n",
    "no blanks": "[a]\nport=9001\nbind=127.0.0.2\ntarget=x.example:1\n",
    "indented": "  [a]\n \tport = 9001\n \tbind\t=\t127.0.0.2\n \ttarget = x.example:1\n",
    "blanks that are not ASCII": "[a]\n\u00a0port = 9001\n\u3000bind = 127.0.0.2\n\u00a0target = x.example:1\n",
    "the value in the next line": "[a]\nport =\n 9001\nbind =\n\t127.0.0.2\ntarget =\n x.example:1\n y.example:1\n",
    "comments between": "[a]\nport =\n# c\n 9001\nbind =\n  ; c\n 127.0.0.2\ntarget =\n x.example:1\n#port = 9\n y.example:1\n",
    "a blank line between": "[a]\nport = 9001\ntarget = x.example:1\nallow = 192.0.2.1\nbind =\n\n 127.0.0.2\n",
    "in DEFAULT": "[DEFAULT]\nbind = 127.0.0.2\nport = 9001\n[a]\ntarget = x.example:1\nidle-timeout = 9\n",
}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("form", FORMS)
def test_however_the_file_says_where_to_listen_the_one_for_the_namespace_does_not(form: str, end: str, tmp_path: Path) -> None:
    config = asked(tmp_path / "r", "\ufeff" + FORMS[form].replace("\n", end))
    script = generate.KINDS["netns"](config)
    printed = subprocess.run(["sh", "-s", "routes"], input=script, capture_output=True, text=True, check=False)
    assert (printed.returncode, printed.stderr) == (0, "")
    assert config.defaults
    assert [route.port for route in config.routes] == [9001]
    again = routes.parse(printed.stdout.encode(), "printed", config.defaults, ["a"]).routes
    assert [without_listener(route) for route in again] == [without_listener(route) for route in config.routes]
    assert [route.listen_options for route in again] == [()]
    assert "# Clients connect to 127.0.0.2:9001.\n" in printed.stdout


@pytest.mark.root
def test_the_listeners_of_routes_are_left_outside_as_the_script_says(tmp_path: Path, namespace: Namespace) -> None:
    """Each route's socket is handed over by its name, and the file has no listeners any more."""
    require("systemd-socket-activate", "the listeners handed over from outside the namespace")
    namespace.sysctl("tcp_timestamps", "0")
    with namespace:
        far = Exchange(echo)
    ports = free_port(), free_port()
    text = f"[DEFAULT]\n bind = 127.0.0.1\ntarget = {far.target}\n[oe.a]\nport={ports[0]}\n"
    text += f"[oe-b]\n  port =\n\n# ours\n    {ports[1]}\n"
    text += "allow = 127.0.0.1\nbind =\n    127.0.0.1\nmax-connections =\n    9\n"
    script = made(tmp_path / "routes of it.ini", "netns", text, "--metrics-interval=0", "--user=nobody")
    found = re.search(r"^ +tsproxy\.py (generate netns .*)\n +(systemd-socket-activate .*)$", script, re.M)
    assert found
    subprocess.run(["sh", "-c", f"{shlex.join(CHECKOUT)} {found[1]}"], cwd=tmp_path, check=True)
    words = shlex.split(re.sub(r"ip netns exec tsproxy \S+", shlex.join(CHECKOUT), found[2]))
    words = [word for word in words if word != "--user=nobody"]  # who may have no right to read this directory
    at = words.index(CHECKOUT[0])
    command = [*words[:at], *namespace.enter, *words[at:]]
    with contextlib.closing(far), contextlib.closing(Proxy(command, cwd=tmp_path)) as proxy:
        for port in ports:
            wait_until(lambda port=port: f":{port:04X} " in Path("/proc/net/tcp").read_text(), "it listens")
        assert all(answers(("127.0.0.1", port)) for port in ports)
        lines = [proxy.line("connection", lambda line, name=name: line["route"] == name) for name in ("oe.a", "oe-b")]
    assert [(line["witness"], line["upstream_timestamps"]) for line in lines] == [("sysctl", False)] * 2


# systemd


def parts(printed: str) -> Dict[str, str]:
    """Path -> text, by the headings."""
    found = re.split(r"^# (/\S+)\n", printed, flags=re.M)
    return dict(zip(found[1::2], found[2::2]))


def units(path: Path, text: str, *options: str) -> Dict[str, str]:
    """By their names, without the script and the routes."""
    found = parts(made(path, "systemd", text, *options))
    return {os.path.basename(name): unit for name, unit in found.items() if name.startswith("/etc/systemd/system/")}


def setting(unit: str, name: str) -> List[str]:
    return [line.partition("=")[2] for line in unit.splitlines() if line.startswith(f"{name}=")]


def test_each_route_has_a_socket_of_its_name_in_the_hosts_namespace(tmp_path: Path) -> None:
    found = units(tmp_path / "r", VENUE)
    assert list(found) == ["tsproxy-netns.service", *(f"tsproxy-{name}.socket" for name in NAMES), "tsproxy.service"]
    sockets = [found[f"tsproxy-{name}.socket"] for name in NAMES]
    assert [setting(unit, "FileDescriptorName") for unit in sockets] == [[name] for name in NAMES]
    assert [setting(unit, "ListenStream") for unit in sockets] == [["127.0.0.2:9001"], ["[::1]:9001"], ["127.0.0.2:9003"]]
    for unit in sockets:
        assert setting(unit, "Service") == ["tsproxy.service"]
        assert setting(unit, "WantedBy") == ["sockets.target tsproxy.service"]
        assert setting(unit, "NetworkNamespacePath") == []
    assert setting(units(tmp_path / "r", VENUE, "--reuse-port")["tsproxy-drop-copy.socket"], "ReusePort") == ["yes"]


def test_the_service_reads_the_routes_and_reads_them_again_on_every_systemd(tmp_path: Path) -> None:
    service = units(tmp_path / "r", VENUE, "--drain-timeout=90.5", "--user=daemon")["tsproxy.service"]
    started = setting(service, "ExecStart")[0].split()
    assert started[:4] == ["/usr/bin/python3", "-I", "-S", "/usr/local/bin/tsproxy"]
    assert started[4:] == ["--routes=/etc/tsproxy/routes.ini", "--drain-timeout=90.5"]
    assert setting(service, "Type") == ["notify"], "notify-reload is of systemd 253: before, it would be taken for simple"
    assert setting(service, "ExecReload") == ["/bin/sh -c 'kill -HUP $MAINPID'"]
    assert "Type=notify-reload" in service
    assert setting(service, "Requires") == [], "one route's socket is stopped without the others"
    assert int(setting(service, "TimeoutStopSec")[0]) > 90.5
    assert setting(service, "LimitNOFILE") == ["524288"], "a route that is added needs some, too"


def test_descriptors_are_for_the_connections_of_all_routes(tmp_path: Path) -> None:
    text = PLAIN.replace("[b]", "max-connections = 500000\n[b]\nmax-connections = 7")
    service = units(tmp_path / "r", text)["tsproxy.service"]
    workers = asked(tmp_path / "r", text).workers
    assert setting(service, "LimitNOFILE") == [str(descriptors_for(500007, workers, 2))]
    # Docker can't give more than it has itself, and a port that is added takes a new container anyway.
    few = descriptors_for(2000, workers, 2)
    assert f"--ulimit nofile={few}:{few} " in made(tmp_path / "r", "docker", PLAIN)


def test_the_file_of_the_service_has_no_listener_whoever_said_it(tmp_path: Path) -> None:
    written = parts(made(tmp_path / "r", "systemd", VENUE))["/etc/tsproxy/routes.ini"]
    assert not re.search(r"^ *(port|bind|\[DEFAULT\])", written, re.M)
    assert "# Clients connect to [::1]:9001: tsproxy-oe-backup.2_x-.socket\n" in written


def test_the_file_of_the_service_is_served_reloaded_and_shortened_as_the_heading_says(
    tmp_path: Path, echoing: Exchange
) -> None:
    """With a socket of each route's name; a route that goes leaves its socket behind until that is stopped."""
    text = f"[DEFAULT]\ntarget = {echoing.target}\n" + "".join(
        f"[{name}]\nport = {9001 + at}\n" for at, name in enumerate("ab")
    )
    written = parts(made(tmp_path / "r", "systemd", text))["/etc/tsproxy/routes.ini"]
    (tmp_path / "routes.ini").write_text(written)
    with listeners(2) as socks:
        words = (f"--routes={tmp_path}/routes.ini", "--timestamps=preserve", "--metrics-interval=0")
        proxy = hand_over(socks, *words, LISTEN_FDNAMES="a:b")
        with contextlib.closing(proxy):
            proxy.line("route", lambda line: line["route"] == "b")
            assert all(answers(sock.getsockname()) for sock in socks)
            first = written.partition("[b]")[0]
            (tmp_path / "routes.ini").write_text(f"{first}[c]\nport = 0\ntarget = {echoing.target}\n")
            proxy.process.send_signal(signal.SIGHUP)
            reload = proxy.line("reload")
            assert {name: reload.get(name) for name in ("added", "removed", "unchanged")} == {
                "added": 1,
                "removed": 1,
                "unchanged": 1,
            }
            come = proxy.line("route", lambda line: line["route"] == "c")
            assert answers(socks[0].getsockname())
            assert answers((come["listen_address"], come["listen_port"]))
            assert proxy.stop() == 0


LONGEST = "a" + ".-_9" * 15 + "z."
STRANGE = ["0", "netns", "a.socket", "a..", "x-", "journald.service", "-".join("abc"), LONGEST]


def analyzed(directory: Path, found: Dict[str, str]) -> subprocess.CompletedProcess[str]:
    require("systemd-analyze", "whether systemd takes the units")
    for name, unit in found.items():
        (directory / name).write_text(unit)
    environment = {**os.environ, "SYSTEMD_UNIT_PATH": f"{directory}:"}
    command = ["systemd-analyze", "verify", *(str(directory / name) for name in found)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("names", [NAMES, STRANGE], ids=["few", "strange names"])
def test_systemd_takes_the_units_of_routes_without_a_word(names: Sequence[str], tmp_path: Path) -> None:
    text = "".join(
        f"[{name}]\nport = {9000 + number}\nbind = {('::', '192.0.2.1')[number % 2]}\ntarget = [fe80::1%eth0]:9\n"
        for number, name in enumerate(names)
    )
    (tmp_path / "units").mkdir()
    done = analyzed(tmp_path / "units", units(tmp_path / "r", text, "--user=daemon", "--cpus=0", "--reuse-port"))
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_systemd_would_not_take_all_units(tmp_path: Path) -> None:
    (tmp_path / "units").mkdir()
    broken = {name: unit.replace("Service=tsproxy.", "Service=none.") for name, unit in units(tmp_path / "r", VENUE).items()}
    done = analyzed(tmp_path / "units", broken)
    assert done.returncode != 0 or done.stderr


def test_200_routes_are_put_in_their_files_by_the_way_that_the_heading_tells(tmp_path: Path) -> None:
    root = tmp_path / "root"
    printed = made(tmp_path / "r", "systemd", MANY)
    script = re.search(r"awk '(.*)'$", printed, re.M)
    assert script
    expected = parts(printed)
    assert len(expected) == 200 + 4
    for path in expected:
        (root / path[1:]).parent.mkdir(parents=True, exist_ok=True)
    into = script[1].replace("file = $2", f'file = "{root}" $2')
    subprocess.run(["prlimit", "--nofile=64", "awk", into], input=printed, text=True, check=True)
    assert {path: (root / path[1:]).read_text() for path in expected} == expected


def test_more_routes_than_systemd_can_hand_over_sockets_for_are_refused(tmp_path: Path) -> None:
    text = "".join(f"[r{number}]\nport = {number}\ntarget = a:1\n" for number in range(1, 1026))
    said = "--routes: given 1025 routes; allowed with generate systemd: up to 1024, a socket each"
    assert refusal(tmp_path / "r", "systemd", text) == said


# docker

STAND_IN = """#!/bin/sh
if [ "$1" = info ]; then echo 'Debian [name=seccomp]'; exit; fi
for word; do printf '%s\\0' "$word"; done >>calls
printf '\\n' >>calls
"""


class Docker:
    """The script, beside a stand-in for docker that writes down how it was called."""

    def __init__(self, home: Path, text: str, *options: str) -> None:
        self.home = home
        self.printed = made(home / "r", "docker", text, *options)
        (home / "docker").write_text(STAND_IN)
        (home / "docker").chmod(0o755)
        (home / "tsproxy").write_text("")

    def script(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "PATH": f"{self.home}:{os.environ['PATH']}"}
        command = ["sh", "-s", *arguments]
        return subprocess.run(command, input=self.printed, env=env, cwd=self.home, capture_output=True, text=True, check=False)

    def write_routes(self) -> None:
        (self.home / "tsproxy-routes").mkdir()
        (self.home / "tsproxy-routes/routes.ini").write_text(self.script("routes").stdout)

    def run_words(self) -> List[str]:
        """Of docker run."""
        calls = [line.split("\0")[:-1] for line in (self.home / "calls").read_text().splitlines()]
        (run,) = [call for call in calls if call[0] == "run"]
        return run


def given_to(words: Sequence[str], flag: str) -> List[str]:
    return [words[number + 1] for number, word in enumerate(words) if word == flag]


def test_docker_publishes_each_route_and_mounts_the_directory_of_the_file(tmp_path: Path) -> None:
    docker = Docker(tmp_path, VENUE, "--user=nobody")
    docker.write_routes()
    assert docker.script().returncode == 0
    run = docker.run_words()
    inside = configparser.ConfigParser(interpolation=None)
    inside.read(tmp_path / "tsproxy-routes/routes.ini")
    ports = [inside[name]["port"] for name in NAMES]
    assert len({*ports}) == 3, "the two on 9001 differ in their address alone, and in there all is one"
    outside = ["127.0.0.2:9001", "[::1]:9001", "127.0.0.2:9003"]
    assert given_to(run, "--publish") == [f"{ends}:{port}" for ends, port in zip(outside, ports)]
    assert given_to(run, "--mount") == [f"type=bind,source={tmp_path}/tsproxy-routes,target=/etc/tsproxy,readonly"]
    assert run[run.index("tsproxy", run.index("--stop-timeout")) :] == ["tsproxy", "--routes=/etc/tsproxy/routes.ini"]


def test_without_the_routes_docker_is_not_called_and_the_way_to_them_is_told(tmp_path: Path) -> None:
    docker = Docker(tmp_path, VENUE)
    done = docker.script()
    assert (done.returncode, "no file 'tsproxy-routes/routes.ini' here" in done.stderr) == (1, True)
    assert not (tmp_path / "calls").exists()
    assert "allowed: up, down, compose or routes" in docker.script("sideways").stderr


def test_the_compose_file_of_routes_says_the_same_as_the_command(tmp_path: Path) -> None:
    docker = Docker(tmp_path, VENUE)
    docker.write_routes()
    docker.script()
    run = docker.run_words()
    service = yaml.safe_load(docker.script("compose").stdout)["services"]["tsproxy"]
    assert service["ports"] == given_to(run, "--publish")
    mount = {"type": "bind", "source": "./tsproxy-routes", "target": "/etc/tsproxy", "read_only": True}
    assert service["volumes"] == [mount]
    assert service["command"] == ["--routes=/etc/tsproxy/routes.ini"]


@pytest.mark.root
def test_the_file_of_a_container_is_served_in_it(tmp_path: Path, namespace: Namespace) -> None:
    """Two routes that differ in their address outside are two there as well."""
    namespace.sysctl("tcp_timestamps", "0")
    with namespace:
        far = Exchange(echo)
    docker = Docker(tmp_path, f"[DEFAULT]\ntarget = {far.target}\nport = 9001\n[a]\n[b]\nbind = ::1\n[c]\nbind = 127.0.0.3\n")
    docker.write_routes()
    command = [*namespace.enter, *CHECKOUT, f"--routes={tmp_path}/tsproxy-routes/routes.ini", "--metrics-interval=0"]
    with contextlib.closing(far), contextlib.closing(Proxy(command)) as proxy:
        lines = [proxy.line("route", lambda line, name=name: line["route"] == name) for name in "abc"]
        assert [line["listen_address"] for line in lines] == ["0.0.0.0", "::", "0.0.0.0"]
        with namespace:
            assert all(answers(("127.0.0.1", line["listen_port"])) for line in lines if line["listen_address"] == "0.0.0.0")
            assert answers(("::1", lines[1]["listen_port"]))


def test_compose_takes_the_file(tmp_path: Path) -> None:
    docker = Docker(tmp_path, MANY)
    if subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip("no docker compose, so it is parsed as YAML alone")
    (tmp_path / "compose.yaml").write_text(docker.script("compose").stdout)
    command = ["docker", "compose", "-f", str(tmp_path / "compose.yaml"), "config", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# kubernetes


def manifest(path: Path, text: str, *options: str) -> Dict[str, Any]:
    return {part["kind"]: part for part in yaml.safe_load_all(made(path, "kubernetes", text, *options))}


def container(found: Dict[str, Any]) -> Dict[str, Any]:
    (one,) = found["Deployment"]["spec"]["template"]["spec"]["containers"]
    return dict(one)


@pytest.mark.parametrize("version", ["1.25", "1.37"])
@pytest.mark.parametrize("text", [OWN_PORTS, MANY], ids=["few", "200"])
def test_the_manifest_of_routes_is_what_the_api_takes(version: str, text: str, tmp_path: Path) -> None:
    found = manifest(tmp_path / "r", text)
    assert list(found) == ["ConfigMap", "Deployment", "PodDisruptionBudget", "Service"]
    for part in found.values():
        kubernetes_validate.validate(part, version, strict=True)


def test_pods_and_service_have_the_port_of_each_route_and_the_routes(tmp_path: Path) -> None:
    found = manifest(tmp_path / "r", OWN_PORTS, "--drain-timeout=9")
    one = container(found)
    assert one["args"] == ["--routes=/etc/tsproxy/routes.ini", "--drain-timeout=9"]
    assert one["ports"] == [
        {"name": "oe-primary", "containerPort": 9001},
        {"name": "oe-backup-2-x", "containerPort": 9002},
        {"name": "drop-copy", "containerPort": 9003},
    ]
    assert found["Service"]["spec"]["ports"] == [
        {"name": port["name"], "port": port["containerPort"], "targetPort": port["name"]} for port in one["ports"]
    ]
    config = asked(tmp_path / "r", OWN_PORTS)
    assert config.defaults
    again = routes.parse(found["ConfigMap"]["data"]["routes.ini"].encode(), "map", config.defaults).routes
    assert [without_listener(route) for route in again] == [without_listener(route) for route in config.routes]
    assert {route.bind for route in again} == {"0.0.0.0", "::"}
    assert {"name": "routes", "mountPath": "/etc/tsproxy", "readOnly": True} in one["volumeMounts"]
    volumes = found["Deployment"]["spec"]["template"]["spec"]["volumes"]
    assert {"name": "routes", "configMap": {"name": found["ConfigMap"]["metadata"]["name"]}} in volumes


@given(st.lists(_NAME | st.from_regex(r"[a-c][._-]{0,3}[0-9]{0,20}", fullmatch=True), unique=True, min_size=1, max_size=8))
@example(["oe-backup-primary", "oe-backup-primary-1", "oe-backup-pri-0", "oe-backup-pri-1", "oe.backup"])
@example(["20260101-000000-oe", "123456789012345a", "123456789012345b", "1"])
@example(["null", "on", "y", "1e3", "0x10"])
@settings(deadline=None, max_examples=examples(50))
def test_ports_have_names_that_kubernetes_takes_and_no_two_the_same(
    tmp_path_factory: pytest.TempPathFactory, names: List[str]
) -> None:
    text = "".join(f"[{name}]\nport = {9000 + number}\ntarget = a:1\n" for number, name in enumerate(names))
    ports = container(manifest(tmp_path_factory.getbasetemp() / "drawn.ini", text))["ports"]
    found = [port["name"] for port in ports]
    assert len({*found}) == len(names)
    for name in found:
        assert re.fullmatch(r"(?=.*[a-z])(?!.*--)[a-z0-9]([a-z0-9-]{0,13}[a-z0-9])?", name), name


def test_a_probe_finds_whichever_route_is_listened_for(tmp_path: Path) -> None:
    """A reload may take away the first route; the pod goes on."""
    port = free_port()
    last = "".join(f"[r{number}]\nport = {number}\ntarget = a:1\n" for number in (1, 2, port))
    command = container(manifest(tmp_path / "r", last))["livenessProbe"]["exec"]["command"]
    assert subprocess.run(command, check=False).returncode == 1
    with socket.create_server(("127.0.0.1", port)):
        assert subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode == 0


def test_memory_is_for_the_connections_of_all_routes(tmp_path: Path) -> None:
    def limit(text: str) -> int:
        return int(container(manifest(tmp_path / "r", text))["resources"]["limits"]["memory"][: -len("Mi")])

    assert limit(MANY) == 128 + 200 * 4 * (2 * 65536 + (512 << 10)) // (1 << 20)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (VENUE, "[oe-primary], [oe-backup.2_x-] port: given '9001'; allowed with generate kubernetes: a port for each route"),
        (
            f"[DEFAULT]\nsource = 192.0.2.1\n{PLAIN}",
            "[a], [b] source: given '192.0.2.1'; allowed with generate kubernetes: none",
        ),
    ],
    ids=["port", "source"],
)
def test_routes_that_pods_can_not_have_are_refused_by_their_names(text: str, said: str, tmp_path: Path) -> None:
    assert said in refusal(tmp_path / "r", "kubernetes", text)
