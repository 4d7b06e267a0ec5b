"""Names that can't be resolved, or that mean something else now: what is said, and that clients are served meanwhile."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest
from faults import ends
from harness import PATIENCE, wait_until
from name_server import Named, Names

# A thread's first getaddrinfo(3) loads NSS modules and takes a malloc arena of its own: 0.7 to 1.2 MiB.
FIRST_LOOKUP_KIB = 2048

pytestmark = pytest.mark.root


@pytest.mark.parametrize("workers", ["--workers=1", "--workers=2"])
def test_an_exchange_that_moves_is_followed_when_connecting_fails(named: Named, workers: str) -> None:
    proxy = named.start(workers)
    assert proxy.line("start")["upstream_addresses"] == [f"127.0.0.2:{named.old.port}"]
    with named.stand.unharmed(proxy, growth_kib=FIRST_LOOKUP_KIB):
        named.names.address = "127.0.0.3"
        named.move()
        assert named.refused(proxy)["reason"] == "connect_refused"
        assert proxy.line("resolve")["message"] == f"upstream addresses are now 127.0.0.3:{named.old.port}"
    used = [line["upstream_address"] for line in proxy.lines if line["event"] == "connection"]
    assert used == ["127.0.0.2"] * 9 + ["127.0.0.3"] * 8
    assert ends(proxy) == {("connect_refused", "SC"): 1}


@pytest.mark.parametrize("how", ["NXDOMAIN", "silent", "multicast"])
def test_a_resolver_that_fails_leaves_the_last_answer_in_use(named: Named, how: str) -> None:
    proxy = named.start()
    rejecting = f"tcp dport {named.old.port} reject with tcp reset"
    with named.stand.unharmed(proxy, growth_kib=FIRST_LOOKUP_KIB):
        named.names.code = getattr(Names, how, Names.OK)
        named.names.address = {"silent": None, "multicast": "224.0.0.1"}.get(how, "127.0.0.2")
        with named.stand.rule(rejecting):
            named.refused(proxy)
            warning = proxy.line("warning")["message"]
        named.stand.ask(proxy)
        named.names.address, named.names.code = "127.0.0.2", Names.OK
        with named.stand.rule(rejecting):
            named.refused(proxy)
            healed = proxy.line("resolve")["message"]
    assert warning.startswith(f"can't resolve exchange.test:{named.old.port}: ")
    assert warning.endswith("; the last answer stays in use")
    assert healed == f"exchange.test:{named.old.port} can be resolved again"
    assert (proxy.count("warning"), proxy.count("resolve")) == (1, 1), "once for each change"


@pytest.mark.parametrize("how", ["NXDOMAIN", "SERVFAIL", "NODATA", "silent"])
def test_a_name_that_can_not_be_resolved_yet_ends_the_start_with_75_and_the_next_one_is_good(named: Named, how: str) -> None:
    """Not with 2: there is nothing wrong with what was given."""
    named.names.code = getattr(Names, how, Names.OK)
    named.names.address = None if how == "silent" else "127.0.0.2"
    early = named.start()
    assert early.wait() == 75
    (line,) = early.stderr().splitlines()
    assert line.startswith(f"tsproxy.py: --target: given 'exchange.test:{named.old.port}'; can't be resolved: ")
    named.names.address, named.names.code = "127.0.0.2", Names.OK
    named.stand.ask(named.start())


def test_a_resolver_that_keeps_silent_holds_neither_clients_nor_the_end_up(named: Named) -> None:
    proxy = named.start("--drain-timeout=0")
    named.stand.ask(proxy)
    named.names.address = None
    asked = named.names.asked
    with named.stand.rule(f"tcp dport {named.old.port} reject with tcp reset"):
        named.refused(proxy)
    wait_until(lambda: named.names.asked > asked, "it asks")
    named.stand.ask(proxy)
    assert proxy.stop() == 0


@pytest.mark.parametrize("kind", ["check", "check --routes", "audit"])
def test_ctrl_c_ends_a_command_whose_names_are_not_answered(named: Named, tmp_path: Path, kind: str) -> None:
    """getaddrinfo(3) goes on for longer than this test waits, and no signal interrupts it."""
    named.names.address = None
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:30 attempts:5\n")
    (tmp_path / "routes").write_text("[a]\nport = 9001\ntarget = exchange.test:1\n")
    words = {
        "check": ["check", "--target=exchange.test:1"],
        "check --routes": ["check", f"--routes={tmp_path / 'routes'}"],
        "audit": ["audit", "--target=exchange.test:1", "/dev/null"],
    }[kind]
    with subprocess.Popen(named.command(*words), stderr=subprocess.PIPE) as process:
        try:
            wait_until(lambda: named.names.asked, "the name is looked up")
            process.send_signal(signal.SIGINT)
            assert process.wait(PATIENCE) == 130
            assert process.communicate()[1] == b""
        finally:
            process.kill()
