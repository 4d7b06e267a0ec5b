"""Any sequence of reloads: what the last good file names is served, what it does not name is not, and nobody is cut off."""

from __future__ import annotations

import contextlib
import socket
import tempfile
from pathlib import Path
from typing import Any, Dict, List, NamedTuple

import pytest
from harness import CHECKOUT, Exchange, echo, examples, free_port
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from routed import RoutedProxy, Talkers, answers

_STAYS = "stays"
_NAMES = ["orders", "quotes", "trades", "drop-copy", "backup"]
_OPTIONS = {
    "bind": "0.0.0.0",
    "idle-timeout": 300,
    "max-connections": 50,
    "keepalive": 20,
    "buffer-size": 16384,
    "zero-copy": "never",
}
_NAME = st.sampled_from(_NAMES)
_BAD = ["", "[orders]\nport = 1\n", "[orders]\ntarget = 127.0.0.1:9\nport = 0\nsource = 192.0.2.1\n", "[a]\nno = yes\n"]


class Client(NamedTuple):
    """Who is connected, and to what."""

    route: str
    sock: socket.socket


def toggled(section: Dict[str, Any], option: str) -> Dict[str, Any]:
    """With the option if it was without, and the other way round."""
    rest = {name: value for name, value in section.items() if name != option}
    return rest if option in section else {**rest, option: _OPTIONS[option]}


class AnyOrder(RuleBasedStateMachine):
    """`wanted` is what the next file will say, `served` what the last good one has said."""

    def __init__(self) -> None:
        super().__init__()
        self._stack = contextlib.ExitStack()
        self.clients: List[Client] = []

    @initialize(workers=st.sampled_from([1, 2]))
    def begin(self, workers: int) -> None:
        enter = self._stack.enter_context
        directory = Path(enter(tempfile.TemporaryDirectory()))
        self.far = enter(contextlib.closing(Exchange(echo)))
        self.all_ports = [free_port() for _ in range(len(_NAMES) + 1)]
        self.ports = list(self.all_ports)  # that no route of the next file has
        self.served: Dict[str, Dict[str, Any]] = {_STAYS: {"target": self.far.target, "port": 0}}
        self.wanted = dict(self.served)
        self.proxy = RoutedProxy(CHECKOUT, directory / "routes.ini", self.served, f"--workers={workers}")
        enter(contextlib.closing(self.proxy))
        for _ in range(2 * workers):
            self.proxy.ask(_STAYS)  # each worker has what it keeps for a route
        self.before = self.proxy.settled(routes=1)
        self.talkers = Talkers([self.proxy.connect_to(_STAYS) for _ in range(2)])
        self._talking = self._stack.enter_context(contextlib.ExitStack())
        self._talking.enter_context(self.talkers)
        for name in _NAMES[:2]:
            self.add_or_remove(name, now=True)

    # The file

    def edit(self, name: str, section: Dict[str, Any], now: bool) -> None:
        """Several edits may come with one reload."""
        self.wanted[name] = section
        if now:
            self.reload()

    def _others(self) -> List[str]:
        return [name for name in self.wanted if name != _STAYS]

    @rule(name=_NAME, now=st.booleans())
    def add_or_remove(self, name: str, now: bool) -> None:
        if name in self.wanted:
            section = self.wanted.pop(name)
            self.ports.append(section["port"])
        else:
            self.wanted[name] = {"target": self.far.target, "port": self.ports.pop(0)}
        if now:
            self.reload()

    @precondition(lambda self: self._others())
    @rule(data=st.data(), option=st.sampled_from(sorted(_OPTIONS)), now=st.booleans())
    def change(self, data: st.DataObject, option: str, now: bool) -> None:
        """Or change back."""
        name = data.draw(st.sampled_from(self._others()))
        self.edit(name, toggled(self.wanted[name], option), now)

    @precondition(lambda self: self._others())
    @rule(data=st.data(), name=_NAME, now=st.booleans())
    def rename(self, data: st.DataObject, name: str, now: bool) -> None:
        if name not in self.wanted:
            self.edit(name, self.wanted.pop(data.draw(st.sampled_from(self._others()))), now)

    @precondition(lambda self: len(self._others()) > 1)
    @rule(data=st.data(), now=st.booleans())
    def swap_ports(self, data: st.DataObject, now: bool) -> None:
        one, other = data.draw(st.lists(st.sampled_from(self._others()), min_size=2, max_size=2, unique=True))
        ports = self.wanted[one]["port"], self.wanted[other]["port"]
        self.wanted[one] = {**self.wanted[one], "port": ports[1]}
        self.edit(other, {**self.wanted[other], "port": ports[0]}, now)

    @rule()
    def reload(self) -> None:
        names, before = self.wanted.keys(), self.served
        same = [name for name in names & before.keys() if self.wanted[name] == before[name]]
        expected = [len(names - before.keys()), len(before.keys() - names), len(names & before.keys()) - len(same), len(same)]
        assert self.proxy.good(self.wanted) == expected
        self.served = dict(self.wanted)
        self.all_are_served()

    @rule(text=st.sampled_from(_BAD))
    def reload_a_bad_file(self, text: str) -> None:
        self.proxy.bad(text)
        self.all_are_served()

    @precondition(lambda self: self._narrow())
    @rule(data=st.data())
    def reload_with_a_port_of_another_program(self, data: st.DataObject) -> None:
        """All that listen on one address would move to all: each listener is closed for that, and back when one fails."""
        victim = data.draw(st.sampled_from(self._narrow()))
        wide = {name: {**section, "bind": "0.0.0.0"} for name, section in self.served.items() if name in self._narrow()}
        with socket.create_server(("127.0.0.2", self.served[victim]["port"])):
            said = self.proxy.bad({**self.served, **wide})
            assert f": [{victim}] can't listen on 0.0.0.0:" in said
            self.all_are_served()

    def _narrow(self) -> List[str]:
        return [name for name, section in self.served.items() if name != _STAYS and "bind" not in section]

    # The clients

    @rule(data=st.data())
    def connect(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.served)))
        self.clients.append(Client(name, self.proxy.connect_to(name)))

    @precondition(lambda self: self.clients)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.clients.pop(data.draw(st.integers(0, len(self.clients) - 1))).sock.close()

    @invariant()
    def who_is_connected_stays_so(self) -> None:
        for client in self.clients:
            answers(client.sock)

    # What must hold

    def all_are_served(self) -> None:
        for name in self.served:
            self.proxy.ask(name)
        listening = {section["port"] for section in self.served.values()}
        for port in set(self.all_ports) - listening:
            assert self.proxy.refuses(port)
        assert not self.talkers.failures

    def teardown(self) -> None:
        with self._stack:
            if not hasattr(self, "talkers"):
                return
            self.proxy.good({_STAYS: self.served[_STAYS]})
            self.who_is_connected_stays_so()
            for client in self.clients:
                client.sock.close()
            self._talking.close()
            assert self.talkers.failures == []
            self.proxy.holds_no_more_than(self.before, routes=1)
            self.all_adds_up()

    def all_adds_up(self) -> None:
        assert self.proxy.stop() == 0
        told = [line for line in self.proxy.lines if line["event"] == "connection"]
        last = [line for line in self.proxy.lines if line["event"] == "metrics" and line["route"] is None][-1]
        assert len(told) == last["downstream_cx_total"]
        assert {line["reason"] for line in told} == {"closed"}
        for field, total in (("rx_bytes", "downstream_cx_rx_bytes_total"), ("tx_bytes", "downstream_cx_tx_bytes_total")):
            assert sum(line[field] for line in told) == last[total]
        assert (last["internal_errors_total"], self.proxy.stderr()) == (0, "")


@pytest.mark.timeout(600)  # all examples together
def test_any_sequence_of_reloads_serves_what_the_last_good_file_names_and_cuts_nobody_off() -> None:
    run_state_machine_as_test(
        AnyOrder,
        settings=settings(
            deadline=None,
            phases=[Phase.explicit, Phase.reuse, Phase.generate],  # each step is a process's: to shrink takes minutes
            max_examples=examples(30),
            stateful_step_count=30,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )
