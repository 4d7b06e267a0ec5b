"""The units that `generate systemd` prints, under a real systemd: stormed, stopped, stuck, failed, booted, undone."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import socket
import subprocess
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest
import roots
from harness import Line, children, pause, receive_exactly
from machine import EXCHANGE, HEALED_S, Machine, eventually, steps
from progress import Progress
from storms import Storm, far_end
from wire import UPSTREAM, Sniffer

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(1200)]
NAME = "exchange.example"
LISTENER = ("127.0.0.1", 8080)
PROGRAM = "/opt/tsproxy/tsproxy.py"  # whoever installs has one; what is installed is made from it
STORMED_S = 60
STORMERS = 8  # of six clients each
LATEST = "1000"  # of some hundred thousand after a storm


class Service:
    """tsproxy as installed on a machine, its exchange, and its clients."""

    def __init__(self, machine: Machine, program: Path) -> None:
        self.machine = machine
        self._stack = contextlib.ExitStack()
        self.port = int(self._stack.enter_context(far_end(EXCHANGE, machine.exchange.enter)).split(":")[1])
        machine.sh(f"mkdir -p {Path(PROGRAM).parent}; : >/etc/resolv.conf")
        machine.write(PROGRAM, program.read_text(), "755")
        self.know_the_exchange()
        self.before = self.files()

    def know_the_exchange(self) -> None:
        self.machine.write("/etc/hosts", f"127.0.0.1 localhost\n{EXCHANGE} {NAME}\n")

    def forget_the_exchange(self) -> None:
        self.machine.write("/etc/hosts", "127.0.0.1 localhost\n")

    def generated(self, *words: str) -> str:
        return self.machine.run("python3", PROGRAM, "generate", *words)

    @functools.cached_property
    def units(self) -> str:
        return self.generated("systemd", f"--target={NAME}:{self.port}")

    def do(self, commands: str) -> None:
        self.machine.sh(f"PATH={Path(PROGRAM).parent}:$PATH\n{commands}")

    def install(self) -> None:
        self.do(steps(self.units, "Make"))
        self.trade()

    def files(self) -> List[str]:
        """What is there that an installation could have left."""
        return self.machine.sh(
            "find /etc /usr/local /opt /var/lib/private /run/netns/* /run/tsproxy* 2>/dev/null | sort || :"
        ).splitlines()

    # What systemd says of it

    def show(self, what: str, unit: str = "tsproxy.service") -> str:
        return self.machine.run("systemctl", "show", "--value", f"--property={what}", unit).strip()

    @property
    def main(self) -> int:
        """The main process, by the number that it has on this side."""
        return self.machine.outside(int(self.show("MainPID")))

    @property
    def workers(self) -> List[int]:
        """Behind the fork server."""
        return [worker for server in children(self.main) for worker in children(server)]

    def journal(self, *words: str) -> List[str]:
        return self.machine.run("journalctl", "--no-pager", "-q", "-o", "cat", *words).splitlines()

    def lines(self, event: str) -> List[Line]:
        """Its JSON lines of that event among the latest."""
        said = self.journal("-n", LATEST, "-u", "tsproxy", "-t", "tsproxy")
        found = [json.loads(line) for line in said if line.startswith("{")]
        return [line for line in found if line["event"] == event]

    def watchdog_kills(self) -> List[str]:
        return [line for line in self.journal("-u", "tsproxy", "-t", "systemd") if "Watchdog timeout" in line]

    # What a client sees

    def connect(self, patience_s: float = HEALED_S) -> socket.socket:
        with self.machine.host:
            return socket.create_connection(LISTENER, patience_s)

    def trade(self, patience_s: float = HEALED_S) -> None:
        """Connect, order, and be answered."""
        with self.connect(patience_s) as client:
            client.sendall(b"order")
            assert receive_exactly(client, 5) == b"order"

    def is_served(self) -> bool:
        with contextlib.suppress(OSError, AssertionError):
            self.trade(2)
            return True
        return False

    def seconds_until_served(self) -> float:
        began = time.monotonic()
        eventually(self.is_served, "a client is served again", HEALED_S)
        return time.monotonic() - began

    @contextlib.contextmanager
    def storm(self, stormers: int) -> Iterator[Dict[str, int]]:
        """So many times six clients meanwhile, of whom not one may have been refused, reset, or answered wrongly."""
        count: Dict[str, int] = {}
        storms = [Storm(LISTENER, self.machine.host.enter) for _ in range(stormers)]
        try:
            yield count
            reports = [one.end() for one in storms]
        finally:
            for one in storms:
                one.close()
        count.update(
            served=sum(report["served"] for report in reports), slowest_s=max(report["slowest_s"] for report in reports)
        )
        assert [failure for report in reports for failure in report["failures"]] == []

    def close(self) -> None:
        self._stack.close()


@pytest.fixture(scope="module")
def service(bundle: Path, tell: Progress) -> Iterator[Service]:
    """Installed and serving."""
    with contextlib.ExitStack() as stack:
        machine = stack.enter_context(contextlib.closing(Machine(roots.made(roots.DEBIAN, tell))))
        tell(machine.run("systemctl", "--version").splitlines()[0])
        one = stack.enter_context(contextlib.closing(Service(machine, bundle)))
        one.install()
        yield one


@pytest.fixture(autouse=True)
def journal_of_a_failure(request: pytest.FixtureRequest, service: Service) -> Iterator[None]:
    """What systemd and tsproxy said, where a test fails."""
    failures = request.session.testsfailed
    yield
    if request.session.testsfailed > failures:
        print(*service.journal("-b", "-u", "tsproxy*", "-n", "80"), sep="\n")


def test_the_units_as_printed_relay_without_timestamps_and_privileges(service: Service, tell: Progress) -> None:
    with contextlib.closing(Sniffer(service.machine.exchange, UPSTREAM)) as sniffer:
        service.trade()
        packets = sniffer.stop()
    sent = [packet for packet in packets if packet.target == (EXCHANGE, service.port)]
    assert len(sent) >= 4
    assert [packet for packet in packets if packet.tsval is not None] == []
    assert {
        unit: service.show("ActiveState", unit) for unit in ("tsproxy.socket", "tsproxy.service", "tsproxy-netns.service")
    } == {
        "tsproxy.socket": "active",
        "tsproxy.service": "active",
        "tsproxy-netns.service": "active",
    }
    assert service.show("StatusText").startswith("relaying")


def test_the_listener_is_the_hosts_and_the_process_in_the_clean_namespace(service: Service) -> None:
    clean = service.machine.run("stat", "-L", "-c", "%i", "/run/netns/tsproxy").strip()
    for pid in (service.main, *service.workers):
        assert Path(f"/proc/{pid}/ns/net").readlink().name == f"net:[{clean}]"
    assert "127.0.0.1:8080" in service.machine.run("ss", "-Hltn")
    assert "8080" not in service.machine.run("ip", "netns", "exec", "tsproxy", "ss", "-Hltn")


def test_no_process_of_it_has_a_capability_or_a_user_of_anybody_else(service: Service) -> None:
    users = set()
    for pid in (service.main, *children(service.main), *service.workers):
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
        assert {status[each] for each in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
        assert status["NoNewPrivs"] == "1"
        users.add(status["Uid"])
    (user,) = users
    assert 61184 <= int(user.split()[0]) <= 65519  # DynamicUser= of systemd.exec(5)


def test_its_lines_are_in_the_journal_and_say_that_no_timestamp_was_sent(service: Service) -> None:
    service.trade()
    eventually(lambda: service.lines("connection"), "a line of the connection in the journal")
    assert service.lines("start")[-1]["witness"] == "sysctl"
    line = service.lines("connection")[-1]
    assert (line["upstream_timestamps"], line["client_timestamps"]) == (False, True)  # clients keep theirs


def test_systemd_analyze_security_finds_little_exposed(service: Service, tell: Progress) -> None:
    verdict = service.machine.run("systemd-analyze", "security", "--no-pager", "tsproxy.service").splitlines()[-1]
    exposure = re.search(r"([\d.]+) OK", verdict)
    tell(verdict.strip())
    assert exposure, verdict
    assert float(exposure.group(1)) <= 2


def test_a_storm_of_clients_is_no_hang_for_the_watchdog_and_nobody_is_lost(service: Service, tell: Progress) -> None:
    main = service.main
    with service.storm(STORMERS) as count:
        time.sleep(STORMED_S)  # the length of the storm, not a wait for anything
    tell(f"{6 * STORMERS} clients for {STORMED_S} s: {count['served']:,} served, the slowest in {count['slowest_s']} s")
    assert service.watchdog_kills() == []
    assert service.main == main


def test_a_restart_under_a_storm_lets_clients_wait_and_loses_none(service: Service, tell: Progress) -> None:
    with service.storm(2) as count:
        for _ in range(3):
            main = int(service.show("MainPID"))
            eventually(lambda main=main: service.lines("connection")[-1]["pid"] == main, "the storm has come to it")
            service.machine.run("systemctl", "restart", "tsproxy.service")
    tell(f"three restarts under a storm: {count['served']:,} served, the slowest in {count['slowest_s']} s")


def test_a_stop_with_a_connection_that_stays_is_the_whole_drain_and_no_hang(service: Service, tell: Progress) -> None:
    with service.connect() as client:
        client.sendall(b"stays")
        assert receive_exactly(client, 5) == b"stays"
        began = time.monotonic()
        service.machine.run("systemctl", "stop", "--no-block", "tsproxy.socket", "tsproxy.service")
        eventually(lambda: service.show("StatusText").startswith("draining 1 connection"), "the status says so")
        eventually(lambda: time.monotonic() - began > 16, "longer than the watchdog's limit", 30)
        assert service.show("StatusText").startswith("draining 1 connection")
        client.sendall(b"still")
        assert receive_exactly(client, 5) == b"still"
        eventually(lambda: service.show("ActiveState") == "inactive", "the drain ends", HEALED_S)
        took_s = time.monotonic() - began
    tell(f"stopped with a connection that stays: {took_s:.1f} s")
    assert took_s > 29
    assert service.show("Result") == "success"
    eventually(lambda: service.lines("stop")[-1]["killed_connections"] == 1, "the last line is in the journal")
    assert service.lines("stop")[-1]["drained"] is False
    service.machine.run("systemctl", "start", "tsproxy.socket", "tsproxy.service")
    service.trade()


@pytest.mark.parametrize("kind", ["the main process stopped", "a worker stopped", "the main process killed", "a worker killed"])
def test_what_hangs_or_dies_is_replaced_and_clients_are_served_again(service: Service, tell: Progress, kind: str) -> None:
    service.trade()
    main = service.main
    victim = service.workers[0] if "worker" in kind else main
    if "stopped" in kind:
        pause(victim)
        replaced = lambda: service.watchdog_kills() and service.show("MainPID") != "0" and service.main != main  # noqa: E731
    else:
        subprocess.run(["kill", "-KILL", str(victim)], check=True)
        replaced = lambda: victim not in [service.main, *service.workers]  # noqa: E731
    began = time.monotonic()
    eventually(replaced, f"{kind}: replaced")
    served = service.seconds_until_served()
    tell(f"{kind}: replaced and serving after {time.monotonic() - began:.1f} s")
    assert served < HEALED_S
    assert service.show("ActiveState", "tsproxy.socket") == "active"


@contextlib.contextmanager
def unresolvable(service: Service) -> Iterator[str]:
    service.machine.run("systemctl", "stop", "tsproxy.service")
    service.forget_the_exchange()
    try:
        yield "status=75"
    finally:
        service.know_the_exchange()


@contextlib.contextmanager
def no_default_route(service: Service) -> Iterator[str]:
    service.machine.run("systemctl", "stop", "tsproxy.service", "tsproxy-netns.service")
    service.machine.host.run("ip", "route", "del", "default")
    try:
        yield "no default route here"
    finally:
        service.machine.host.run("ip", "route", "add", "default", "via", EXCHANGE)


@contextlib.contextmanager
def policy_not_attainable(service: Service) -> Iterator[str]:
    service.machine.run("systemctl", "stop", "tsproxy.service")
    switch = "ip netns exec tsproxy sh -c 'echo {} >/proc/sys/net/ipv4/tcp_timestamps'"
    service.machine.sh(switch.format(1))
    try:
        yield "status=78"
    finally:
        service.machine.sh(switch.format(0))


@pytest.mark.parametrize("cause", [unresolvable, no_default_route, policy_not_attainable])
def test_a_start_that_fails_heals_when_the_cause_is_gone_and_a_client_waits_for_it(
    service: Service, tell: Progress, cause: Any
) -> None:
    since = service.machine.run("date", "+%s").strip()
    failures = lambda sign: sum(sign in line for line in service.journal(f"--since=@{since}", "-u", "tsproxy*", "-n", LATEST))  # noqa: E731
    with contextlib.ExitStack() as stack:
        with cause(service) as sign:
            client = stack.enter_context(service.connect())
            client.sendall(b"waits")
            # More often than any default start limit (five in ten seconds) allows.
            eventually(lambda: failures(sign) >= 7, f"seven failed starts with {sign!r}", HEALED_S)
            assert service.show("ActiveState", "tsproxy.socket") == "active"
        began = time.monotonic()
        assert receive_exactly(client, 5) == b"waits"
        tell(f"{cause.__name__}: the client that waited was served {time.monotonic() - began:.1f} s after the cause was gone")
    assert service.show("ActiveState") == "active"
    assert service.show("Result", "tsproxy.socket") == "success"


def test_after_a_boot_it_serves_by_itself(service: Service, tell: Progress) -> None:
    service.machine.shut_down()
    service.machine.boot()
    began = time.monotonic()
    service.trade()
    tell(f"booted again: served {time.monotonic() - began:.1f} s after systemd was up")
    assert service.show("NRestarts") == "0"


def test_undo_leaves_nothing_nor_does_that_of_journald_and_logrotate(service: Service) -> None:
    for name in ("journald", "logrotate"):
        service.do(steps(service.generated(name), "Make"))
    service.trade()
    main = int(service.show("MainPID"))
    eventually(lambda: service.lines("connection")[-1]["pid"] == main, "under journald's drop-in the lines are in the journal")
    for text in (service.generated("journald"), service.generated("logrotate"), service.units):
        service.do(steps(text, "Undo"))
    service.machine.sh("rm /usr/local/bin/tsproxy; rmdir /var/log/tsproxy")
    left = set(service.files()) - set(service.before)
    assert left == set()
    assert service.machine.run("ip", "netns").strip() == ""
    assert service.machine.run("nft", "list", "ruleset").strip() == ""
    assert "tsproxy0" not in service.machine.run("ip", "link")
    assert service.machine.run("systemctl", "list-units", "--all", "--no-legend", "tsproxy*").strip() == ""
    assert service.machine.run("cat", f"/proc/sys/net/ipv4/conf/{UPSTREAM}/forwarding").strip() == "0"
