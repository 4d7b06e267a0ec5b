"""What `generate systemd --routes` prints, under a real systemd: a socket a route, reload, routes added and removed, undo."""

from __future__ import annotations

import contextlib
import re
import socket
from pathlib import Path
from typing import Iterator

import pytest
import roots
from harness import receive_exactly
from machine import Machine, eventually, steps
from progress import Progress
from routed_machine import ROUTES, A, B, C, Service
from wire import UPSTREAM, Sniffer

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def service(bundle: Path, tell: Progress) -> Iterator[Service]:
    with contextlib.ExitStack() as stack:
        machine = stack.enter_context(contextlib.closing(Machine(roots.made(roots.DEBIAN, tell))))
        tell(machine.run("systemctl", "--version").splitlines()[0])
        yield stack.enter_context(contextlib.closing(Service(machine, bundle)))


@pytest.fixture(autouse=True)
def journal_of_a_failure(request: pytest.FixtureRequest, service: Service) -> Iterator[None]:
    failures = request.session.testsfailed
    yield
    if request.session.testsfailed > failures:
        print(service.machine.run("journalctl", "--no-pager", "-q", "-b", "-u", "tsproxy*", "-n", "60"))


def test_each_route_has_its_socket_outside_and_relays_without_timestamps(service: Service) -> None:
    eventually(lambda: service.trades(A, B), "both are served")
    with contextlib.closing(Sniffer(service.machine.exchange, UPSTREAM)) as sniffer:
        assert service.trades(A, B)
        packets = sniffer.stop()
    assert len(packets) >= 8
    assert [packet for packet in packets if packet.tsval is not None] == []
    states = {
        unit: service.show("ActiveState", unit) for unit in ("tsproxy-oe.a.socket", "tsproxy-oe-b.socket", "tsproxy.service")
    }
    assert set(states.values()) == {"active"}, states
    assert "9001" not in service.machine.run("ip", "netns", "exec", "tsproxy", "ss", "-Hltn")
    assert {line["route"]: line["witness"] for line in service.lines("route")} == {"oe.a": "sysctl", "oe-b": "sysctl"}


def test_systemctl_reload_has_the_file_read_again_and_no_connection_ends(service: Service) -> None:
    main = service.show("MainPID")
    with service.machine.host, socket.create_connection(A, 20) as client:
        service.write_routes(service.machine.run("cat", ROUTES) + "max-connections = 7\n")
        service.machine.run("systemctl", "reload", "tsproxy.service")
        eventually(lambda: service.lines("reload"), "a reload line")
        assert (service.lines("reload")[-1]["changed"], service.lines("reload")[-1]["unchanged"]) == (1, 1)
        client.sendall(b"still")
        assert receive_exactly(client, 5) == b"still"
    assert service.trades(A, B)
    eventually(lambda: service.show("ActiveState") == "active", "it is no longer reloading")
    assert service.show("MainPID") == main


def test_a_route_is_added_as_the_heading_says(service: Service) -> None:
    service.write_routes(f"{service.machine.run('cat', ROUTES)}\n[c]\ntarget = {service.target}\n")
    change = "s/oe\\.a/c/g; s/^ListenStream=.*/ListenStream=127.0.0.1:9003/"
    service.machine.sh(f"cd /etc/systemd/system; sed '{change}' tsproxy-oe.a.socket >tsproxy-c.socket")
    (told,) = re.findall(r"^# +(systemctl daemon-reload && systemctl enable tsproxy-NAME.*)$", service.units, re.M)
    service.do(told.replace("NAME", "c"))
    eventually(lambda: service.trades(A, B, C), "all three are served")


def test_a_route_of_its_own_port_is_added_without_a_restart(service: Service) -> None:
    main = service.show("MainPID")
    before = service.machine.run("cat", ROUTES)
    service.write_routes(f"{before}\n[inside]\nbind = 10.203.116.2\nport = 9004\ntarget = {service.target}\n")
    service.machine.run("systemctl", "reload", "tsproxy.service")
    eventually(lambda: service.trades(("10.203.116.2", 9004)), "it is served at an address of the namespace")
    assert service.trades(A, B, C)
    assert service.show("MainPID") == main
    service.write_routes(before)


def test_a_socket_that_is_stopped_takes_nothing_from_the_others_and_the_route_goes(service: Service) -> None:
    text = service.machine.run("cat", ROUTES)
    service.write_routes(text[: text.index("\n[c]\n")])
    main = service.show("MainPID")
    count = len(service.lines("reload"))
    service.machine.run("systemctl", "reload", "tsproxy.service")
    eventually(lambda: len(service.lines("reload")) > count, "a reload line")
    assert service.lines("reload")[-1]["level"] == "info", service.lines("reload")[-1]
    service.do("systemctl disable --now tsproxy-c.socket; rm /etc/systemd/system/tsproxy-c.socket")
    assert service.show("MainPID") == main
    assert service.trades(A, B)
    service.machine.run("systemctl", "restart", "tsproxy.service")
    eventually(lambda: service.trades(A, B), "it starts without that socket")
    with pytest.raises(ConnectionRefusedError):
        service.trades(C)


def test_after_a_boot_all_routes_are_served(service: Service) -> None:
    service.machine.shut_down()
    service.machine.boot()
    eventually(lambda: service.trades(A, B), "both are served")


def test_undo_leaves_nothing(service: Service) -> None:
    service.do(steps(service.units, "Undo"))
    service.machine.sh("rm /usr/local/bin/tsproxy")
    assert set(service.files()) - set(service.before) == set()
    assert service.machine.run("systemctl", "list-units", "--all", "--no-legend", "tsproxy*").strip() == ""


# What systemd 253 and later can do


def test_where_systemd_has_notify_reload_a_reload_is_over_when_the_routes_are_served(bundle: Path, tell: Progress) -> None:
    """Type=notify-reload, as the comment in the unit says: systemd sends SIGHUP itself, and waits for RELOADING and READY."""
    with contextlib.ExitStack() as stack:
        machine = stack.enter_context(contextlib.closing(Machine(roots.made(roots.WITH_NEWER_SYSTEMD, tell))))
        tell(machine.run("systemctl", "--version").splitlines()[0])
        service = stack.enter_context(contextlib.closing(Service(machine, bundle)))
        unit = "/etc/systemd/system/tsproxy.service"
        machine.sh(f"sed -i 's/^Type=notify$/Type=notify-reload/; /^ExecReload=/d' {unit}")
        machine.sh("systemctl daemon-reload && systemctl restart tsproxy.service")
        assert service.show("Type") == "notify-reload"
        eventually(lambda: service.trades(A, B), "both are served")
        main, kept = service.show("MainPID"), machine.run("cat", ROUTES)
        for limit in range(5, 10):
            service.write_routes(f"{kept}max-connections = {limit}\n")
            machine.run("systemctl", "reload", "tsproxy.service")
            assert f"max_connections={limit}" in service.lines("route")[-1]["limits"], "before systemctl has returned"
            assert service.trades(A, B)
        service.write_routes("nonsense")
        machine.run("systemctl", "reload", "tsproxy.service")
        assert service.lines("reload")[-1]["level"] == "error"
        assert "; reload refused at " in service.show("StatusText")
        assert service.trades(A, B)
        assert (service.show("ActiveState"), service.show("MainPID")) == ("active", main)
