"""How many upstream addresses are tried: all of them up to a limit, and what is beyond it is said."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
from pathlib import Path
from typing import Any, Dict, List

import pytest
from _tsproxy.cli.config import MOST_UPSTREAMS, Target
from _tsproxy.linux.addresses import Address
from _tsproxy.supervisor.resolver import Resolver
from harness import CHECKOUT, Exchange, Proxy, echo, receive_exactly
from namespaces import require_root

BEYOND = 6


@pytest.mark.parametrize("workers", ["--workers=1", "--workers=2", "--runtime=threads"])
def test_the_last_of_as_many_targets_as_may_be_given_is_tried(start: Any, workers: str) -> None:
    far = Exchange(echo, host=f"127.1.0.{MOST_UPSTREAMS}")
    others = [f"--target=127.1.0.{number}:{far.port}" for number in range(1, MOST_UPSTREAMS)]
    proxy = start(f"127.1.0.1:{far.port}", *others[1:], f"--target={far.target}", workers)
    with proxy.connect() as client:
        client.sendall(b"the last")
        assert receive_exactly(client, 8) == b"the last"
    assert proxy.line("connection")["upstream_address"] == far.host
    assert proxy.metrics()["upstream_cx_total"] == MOST_UPSTREAMS
    far.close()


def test_one_target_more_is_refused(start: Any) -> None:
    proxy = start("127.0.0.1:9", *(f"-t127.0.0.1:{number + 10}" for number in range(MOST_UPSTREAMS)))
    assert proxy.wait() == 2
    assert f"--target: given {MOST_UPSTREAMS + 1} times; allowed: up to {MOST_UPSTREAMS} times" in proxy.stderr()


def knowing(tmp_path: Path, hosts: Dict[str, List[str]], *command: str) -> List[str]:
    """The command where these names have these addresses."""
    require_root()
    (tmp_path / "nsswitch.conf").write_text("hosts: files\n")
    (tmp_path / "host.conf").write_text("multi on\n")
    (tmp_path / "hosts").write_text("".join(f"{address} {name}\n" for name, some in hosts.items() for address in some))
    binds = " && ".join(f"mount --bind {tmp_path}/{name} /etc/{name}" for name in ("hosts", "nsswitch.conf", "host.conf"))
    return ["unshare", "--mount", "sh", "-c", f'{binds} && exec "$@"', "sh", *CHECKOUT, *command]


def many(tmp_path: Path, *command: str) -> List[str]:
    """The command where the name many.test has too many addresses, the first of which is 127.2.0.1."""
    return knowing(tmp_path, {"many.test": [f"127.2.0.{number}" for number in range(1, MOST_UPSTREAMS + BEYOND)]}, *command)


@pytest.mark.root
def test_addresses_beyond_the_limit_are_left_out_with_a_warning_and_every_target_keeps_one(tmp_path: Path) -> None:
    far = Exchange(echo, host="127.0.0.1")
    words = ("-t", f"many.test:{far.port}", "-t", far.target, "-p0", "--timestamps=preserve", "--metrics-interval=0")
    proxy = Proxy(many(tmp_path, *words))
    said = proxy.line("warning")["message"]
    assert said.startswith(
        f"the targets have {MOST_UPSTREAMS + BEYOND} addresses, and {MOST_UPSTREAMS} can be tried: {BEYOND} "
    )
    with proxy.connect() as client:
        client.sendall(b"backup")
        assert receive_exactly(client, 6) == b"backup"
    assert proxy.line("connection")["upstream_address"] == "127.0.0.1"
    assert proxy.metrics()["upstream_cx_total"] == MOST_UPSTREAMS
    proxy.close()
    far.close()


@pytest.mark.root
def test_check_says_how_many_addresses_it_leaves_out(tmp_path: Path) -> None:
    words = ("check", "-t", "many.test:9", "--timestamps=preserve", "--json")
    done = subprocess.run(many(tmp_path, *words), capture_output=True, check=False)
    found = json.loads(done.stdout)
    assert (found["left_out"], len(found["connections"])) == (BEYOND - 1, MOST_UPSTREAMS)
    table = subprocess.run(many(tmp_path, *words[:-1]), capture_output=True, check=False, text=True).stdout
    assert f"  and {BEYOND - 1} addresses more, which would not be tried" in table


def test_the_longest_answer_gives_way() -> None:
    targets = [Target(name, 1) for name in ("long", "short", "other")]
    resolver = Resolver(targets)
    of = lambda block, count: [Address(2, f"127.{block}.0.{number}", 1) for number in range(count)]  # noqa: E731
    resolver._answers = {targets[0]: of(1, 100), targets[1]: of(2, 3), targets[2]: [*of(3, 2), *of(1, 2)]}
    resolver._publish()
    assert resolver.addresses == [*of(1, MOST_UPSTREAMS - 5), *of(2, 3), *of(3, 2)]
    assert resolver.left_out == 100 + 3 + 2 - MOST_UPSTREAMS


GROUPS = ["224.0.0.1", "255.255.255.255", "::ffff:239.1.1.1", "ff02::1"]
_NO_GROUP = "TCP connects to no multicast or broadcast address"


@pytest.mark.root
def test_multicast_and_broadcast_addresses_of_a_name_are_left_out_with_a_warning(tmp_path: Path, echoing: Exchange) -> None:
    """As for a literal one, but a name may have others."""
    hosts = {"mixed.test": [*GROUPS, "127.0.0.1"]}
    words = ("-t", f"mixed.test:{echoing.port}", "-p0", "--timestamps=preserve", "--metrics-interval=0")
    with contextlib.closing(Proxy(knowing(tmp_path, hosts, *words))) as proxy:
        assert proxy.line("start")["upstream_addresses"] == [f"127.0.0.1:{echoing.port}"]
        said = proxy.line("warning")["message"]
        with proxy.connect() as client:
            client.sendall(b"x")
            assert receive_exactly(client, 1) == b"x"
        assert proxy.metrics()["upstream_cx_total"] == 1
        assert proxy.stop() == 0
    found = re.fullmatch(rf"mixed\.test:{echoing.port}: left out (.*): {_NO_GROUP}", said)
    assert found
    assert sorted(found[1].split(", ")) == ["224.0.0.1", "239.1.1.1", "255.255.255.255", "ff02::1"]


@pytest.mark.root
@pytest.mark.parametrize("address", GROUPS)
def test_a_name_without_a_unicast_address_ends_the_start_with_75(address: str, tmp_path: Path) -> None:
    command = knowing(tmp_path, {"group.test": [address]}, "-t", "group.test:9", "--timestamps=preserve")
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    said = f"no unicast address, but {address.replace('::ffff:', '')}: {_NO_GROUP}\n"
    assert (done.returncode, done.stdout) == (75, "")
    assert done.stderr == f"tsproxy.py: --target: given 'group.test:9'; can't be resolved: {said}"


@pytest.mark.root
def test_check_makes_no_connection_to_a_multicast_address_of_a_name(tmp_path: Path) -> None:
    words = ("check", "-t", "mixed.test:9", "--timestamps=preserve", "--json")
    done = subprocess.run(knowing(tmp_path, {"mixed.test": [*GROUPS, "127.0.0.1"]}, *words), capture_output=True, check=False)
    found = json.loads(done.stdout)
    assert (found["left_out"], [one["address"] for one in found["connections"]]) == (4, ["127.0.0.1:9"])
