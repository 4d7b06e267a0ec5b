"""A reload whose names are not answered, or not any more: what it says, and that nobody waits for it."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Any, Dict, Iterator

import pytest
from harness import CHECKOUT, Exchange, Proxy, echo, wait_until
from name_server import Names, asking_here
from namespaces import Namespace
from routed import RoutedProxy, answers

pytestmark = pytest.mark.root


class Station(contextlib.ExitStack):
    """A namespace with a name server and an exchange, to which all names lead."""

    def __init__(self, tmp_path: Path, patience_s: int) -> None:
        super().__init__()
        self.host = self.enter_context(contextlib.closing(Namespace()))
        with self.host:
            self.names = self.enter_context(contextlib.closing(Names("127.0.0.2")))
            self.far = self.enter_context(contextlib.closing(Exchange(echo, host="127.0.0.2")))
        self.command = [*self.host.enter, *asking_here(tmp_path, patience_s), *CHECKOUT]
        self._file = tmp_path / "routes.ini"

    def sections(self, *names: str) -> Dict[str, Any]:
        return {name: {"target": f"{name}.test:{self.far.port}", "port": 0} for name in names}

    def start(self, *names: str) -> RoutedProxy:
        proxy = RoutedProxy(self.command, self._file, self.sections(*names), "--workers=2")
        self.enter_context(contextlib.closing(proxy))
        proxy.line("start")
        return proxy

    def ask(self, proxy: RoutedProxy, name: str) -> None:
        with self.host:
            proxy.ask(name)

    def begin_without_answer(self, proxy: Proxy) -> None:
        """A reload that has asked, and is not answered."""
        self.names.address, asked = None, self.names.asked
        proxy.process.send_signal(signal.SIGHUP)
        wait_until(lambda: self.names.asked > asked, "the name server is asked")


@pytest.fixture
def station(tmp_path: Path) -> Iterator[Station]:
    with Station(tmp_path, 1) as station:
        yield station


@pytest.fixture
def patient(tmp_path: Path) -> Iterator[Station]:
    """Its tsproxy waits for an answer for longer than a test does for anything."""
    with Station(tmp_path, 30) as station:
        yield station


def test_a_name_that_can_not_be_resolved_refuses_the_file_and_names_the_route(station: Station) -> None:
    proxy = station.start("orders")
    station.names.code = Names.NXDOMAIN
    said = proxy.bad(station.sections("orders", "quotes"))
    assert f": [quotes] target: given 'quotes.test:{station.far.port}'; can't be resolved: " in said
    station.ask(proxy, "orders")
    station.names.code = Names.OK
    assert proxy.good(station.sections("orders", "quotes")) == [1, 0, 0, 1]
    station.ask(proxy, "quotes")


def test_clients_are_served_while_a_reload_waits_for_the_name_server(station: Station) -> None:
    proxy = station.start("orders")
    proxy.write(station.sections("orders", "quotes"))
    seen = len(proxy.lines)
    station.begin_without_answer(proxy)
    station.ask(proxy, "orders")
    assert proxy.reloaded(seen)["level"] == "error"


@pytest.mark.parametrize("new", [1, 3])
def test_sigterm_during_a_reload_without_an_answer_ends_at_once(patient: Station, new: int) -> None:
    """Python waits at its exit for threads that are no daemons, and getaddrinfo(3) can't be ended early."""
    proxy = patient.start("orders")
    proxy.write(patient.sections("orders", *(f"quotes-{number}" for number in range(new))))
    patient.begin_without_answer(proxy)
    assert proxy.stop() == 0
    assert proxy.count("reload") == 0
    assert proxy.stderr() == ""


def test_a_reload_that_is_answered_during_the_drain_comes_to_nothing(patient: Station) -> None:
    proxy = patient.start("orders")
    with patient.host:
        client = proxy.connect_to("orders")
    with client:
        answers(client)
        proxy.write(patient.sections("quotes"))
        before = threads(proxy)
        patient.begin_without_answer(proxy)
        proxy.process.send_signal(signal.SIGTERM)
        proxy.line("drain")
        patient.names.answer_at_last("127.0.0.2")
        wait_until(lambda: threads(proxy) <= before, "the reload has its answer")
        answers(client)
    assert proxy.wait() == 0
    assert (proxy.count("reload"), proxy.count("route")) == (0, 1)
    assert proxy.line("stop")["drained"]
    assert proxy.stderr() == ""


def threads(proxy: Proxy) -> int:
    return len(os.listdir(f"/proc/{proxy.process.pid}/task"))
