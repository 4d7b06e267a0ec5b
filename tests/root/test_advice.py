"""What is advised where the policy can't be honoured: it can be run as it stands, and is for the options that were given."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, List, Sequence

import pytest
from _tsproxy.linux.sockets import TAG_DSCP
from checked import far_end
from harness import CHECKOUT, ROOT, Proxy
from namespaces import Namespace
from routed import routed_starter

pytestmark = pytest.mark.root

KINDS = ("systemd", "nftables", "docker", "kubernetes")
LIMITS = ["--port=8081", "--bind=0.0.0.0", "--allow=10.0.0.0/8", "--allow=10.1.0.0/16", "--max-connections=4"]
VENUE = re.findall(r"```ini\n(.*?)```", (ROOT / "docs" / "routes.md").read_text(), re.S)[0]
ROUTE = "[{name}]\nport = {port}\ntarget = 192.0.2.1:443\n{keys}\n"


def shell(namespace: Namespace, command: str) -> subprocess.CompletedProcess[str]:
    """As an administrator runs it, with the program on the PATH."""
    path = os.pathsep.join([str(ROOT), os.path.dirname(sys.executable), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path}
    words = [*namespace.enter, "sh", "-c", command]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60, check=False)


def refused(namespace: Namespace, *options: str) -> List[str]:
    """The commands that a start which is refused advises."""
    done = subprocess.run([*namespace.enter, *CHECKOUT, *options], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (78, "")
    return re.findall("^    (.*)", done.stderr, re.M)


def checked(namespace: Namespace, *options: str) -> List[str]:
    """Those that `check` advises, for all routes."""
    command = [*namespace.enter, *CHECKOUT, "check", *options, "--json"]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert done.returncode == 78, done.stderr
    found = json.loads(done.stdout)
    return list(dict.fromkeys(fix for one in found.get("routes", [found]) for fix in one["fixes"]))


def kinds_in(commands: Sequence[str]) -> List[str]:
    """The kinds that are advised."""
    return [kind for kind in KINDS if re.search(rf"generate {kind} |# or {kind}$", "\n".join(commands), re.M)]


def can_be_made(namespace: Namespace, *options: str) -> List[str]:
    """The kinds that `generate` takes."""
    done = {kind: shell(namespace, shlex.join(["tsproxy.py", "generate", kind, *options])) for kind in KINDS}
    assert {one.returncode for one in done.values()} <= {0, 2}
    return [kind for kind in KINDS if done[kind].returncode == 0]


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        (["--timestamps=strip"], "--timestamps=strip"),
        (["--timestamps=rewrite"], "--timestamps=rewrite with --static-timestamp=0, which is strip,"),
        (["--spoof-timestamps", "--static-timestamp=0"], "--timestamps=rewrite with --static-timestamp=0, which is strip,"),
    ],
)
def test_what_can_not_be_honoured_is_told_in_the_words_of_who_asked(spaces: Any, options: List[str], asked: str) -> None:
    words = [*spaces(tcp_timestamps="1").enter, *CHECKOUT, "-t", "127.0.0.1:9", *options]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 78
    assert done.stderr.startswith(f"tsproxy.py: {asked} can't be honoured here: ")


@pytest.mark.parametrize("advised", [refused, checked])
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_rules_that_are_advised_are_those_for_the_same_options(spaces: Any, host: str, advised: Any) -> None:
    namespace = spaces(tcp_timestamps="1")
    with far_end(namespace, host) as far:
        options = ["-t", far.target, "--dscp=46", f"--source={host}", "--interface=lo", "-p0", "-b", host]
        (rules,) = [command for command in advised(namespace, *options) if command.endswith("| nft -f -")]
        loaded = shell(namespace, rules)
        assert (loaded.returncode, loaded.stderr) == (0, "")
        proxy = Proxy([*namespace.enter, *CHECKOUT], *options)
        try:
            assert proxy.line("start")["witness"] == "nftables"
        finally:
            proxy.close()


@pytest.mark.parametrize("advised", [refused, checked])
def test_each_set_up_that_is_advised_is_for_all_options_that_were_given(spaces: Any, advised: Any) -> None:
    namespace, options = spaces(tcp_timestamps="1"), ["--target=192.0.2.1:443", "--target=[2001:db8::1]:443", *LIMITS]
    commands = [command for command in advised(namespace, *options) if " generate " in command]
    assert len(commands) == 3
    for command in commands:
        done = shell(namespace, command.partition(" | ")[0])
        assert (done.returncode, done.stderr) == (0, "")
        for option in options:
            assert shlex.quote(option) in done.stdout, "it says which command prints it"


@pytest.mark.parametrize("options", [["--source=192.0.2.9"], ["-p0"], [f"--dscp={TAG_DSCP}"], ["--user=no-such-user"]])
def test_only_a_kind_that_generate_takes_is_advised(spaces: Any, options: List[str]) -> None:
    namespace, asked = spaces(tcp_timestamps="1"), ["-t", "127.0.0.1:9", *options]
    assert kinds_in(checked(namespace, *asked)) == can_be_made(namespace, *asked)


@pytest.mark.parametrize(
    ("text", "possible"),
    [
        (VENUE, ["nftables"]),
        (ROUTE.format(name="a", port=9001, keys="dscp = 8") + ROUTE.format(name="b", port=9002, keys="dscp = 46"), KINDS[::2]),
        (ROUTE.format(name="a", port=9001, keys="interface = lo"), ["nftables"]),
        (ROUTE.format(name="a", port=9001, keys="") + "[b]\ntarget = 192.0.2.1:443\n", ["nftables"]),
    ],
)
def test_only_a_kind_that_generate_takes_is_advised_for_a_file_of_routes(
    spaces: Any, tmp_path: Path, text: str, possible: Sequence[str]
) -> None:
    namespace, file = spaces(tcp_timestamps="1"), tmp_path / "venue.ini"
    file.write_text(text)
    advised, made = checked(namespace, f"--routes={file}"), can_be_made(namespace, f"--routes={file}")
    assert kinds_in(advised) == made
    assert set(possible) <= set(made)
    assert ("nftables" in possible) == ("nftables" in made)


def test_a_refused_reload_advises_for_all_routes_of_the_new_file(spaces: Any, tmp_path: Path) -> None:
    namespace = spaces(tcp_timestamps="1")
    start = routed_starter([*namespace.enter, *CHECKOUT], tmp_path)
    kept = {"port": 0, "target": "192.0.2.1:443", "timestamps": "preserve"}
    proxy = next(start)({"kept": kept})
    for keys, possible in (({"port": 9001}, ["nftables"]), ({"port": 9001, "dscp": TAG_DSCP}, [])):
        told = proxy.bad({"kept": kept, "new": {"timestamps": "strip", "target": "192.0.2.1:443", **keys}})
        commands = re.findall("^    (.*)", told, re.M)
        assert kinds_in(commands) == possible
        assert all(f"--routes={proxy.file} --timestamps=preserve" in one for one in commands if " generate " in one)
        assert "--runtime" not in told
        assert shell(namespace, commands[-1].partition(" | ")[0]).returncode == 0
    next(start, None)
