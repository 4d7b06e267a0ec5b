"""Reloads under a storm of clients: who has a route that stays notices none of them, and nothing of the others is left."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest
from harness import Exchange, free_port
from program import RUNTIME, RUNTIMES, checkout_alone, python_for, slow_but
from routed import RoutedProxy, Sections, Talkers, routed_starter
from storms import Storm, far_end

_EACH = [f"{runtime} {workers}" for runtime in RUNTIMES for workers in (1, 2)]
_RELOADS = 50
_STORMED, _TALKING = ("orders", "drop-copy"), ("quotes", "trades")


@pytest.fixture(params=slow_but([f"{RUNTIME} 1", f"{RUNTIME} 2"], _EACH))
def start_routed(request: pytest.FixtureRequest, bundle: Path, tmp_path: Path) -> Iterator[Any]:
    """Under each runtime, with one worker and with two."""
    runtime, workers = request.param.split()
    command = [python_for(runtime), "-I", "-S", str(checkout_alone(bundle))]
    yield from routed_starter(command, tmp_path, f"--runtime={runtime}", f"--workers={workers}")


def staying(storm: str, echoing: Exchange) -> Dict[str, Any]:
    ends = {**dict.fromkeys(_STORMED, storm), **dict.fromkeys(_TALKING, echoing.target)}
    return {name: {"target": target, "port": 0} for name, target in ends.items()}


def others(target: str, turn: int, port: int) -> Dict[str, Any]:
    """Of three more routes one comes, one changes, one goes; and one moves from one address to all, on the same port."""
    numbered = {f"other-{number}": {"target": target, "port": 0} for number in range(turn, turn + 3)}
    bind = "0.0.0.0" if turn % 4 == 1 else "127.0.0.1"
    changing = {"target": target, "port": port, "bind": bind, "idle-timeout": 100 + turn}
    return {**numbered, "changing": changing}


BAD = [
    "[orders]\ntarget = 127.0.0.1:9\nport = nine\n",
    "[orders]\n",
    "",
    "[added]\ntarget = 127.0.0.1:9\nport = 0\nsource = 192.0.2.1\n",
    "[added]\ntarget = 127.0.0.1:9\nport = 0\ninterface = nowhere0\n",
]


def reload_all(proxy: RoutedProxy, always: Sections, reloads: int, port: int, target: str) -> List[int]:
    """So many, every fifth of a bad file. Each new or changed route serves; the counts of the last good one."""
    counts: List[int] = []
    for turn in range(reloads):
        if turn % 5 == 4:
            proxy.bad(BAD[turn // 5 % len(BAD)])
        else:
            counts = proxy.good({**always, **others(target, turn, port)})
            for name in (f"other-{turn + 2}", "changing"):
                proxy.ask(name)
    return counts


@contextlib.contextmanager
def stormed(proxy: RoutedProxy) -> Iterator[None]:
    """Clients of the routes that stay: new ones without a rest, and some who talk all the time. Nothing befalls them."""
    with contextlib.ExitStack() as stack:
        storms = [stack.enter_context(contextlib.closing(Storm(("127.0.0.1", proxy.port(name))))) for name in _STORMED]
        talkers = stack.enter_context(Talkers([proxy.connect_to(name) for name in _TALKING for _ in range(3)]))
        yield
        seen = [storm.end() for storm in storms]
    assert [told["failures"] for told in seen] == [[], []]
    assert all(told["served"] > 0 for told in seen)
    assert talkers.failures == []
    assert talkers.messages > 0


def conserved(proxy: RoutedProxy, sections: Sections) -> None:
    """What the lines of all connections say together is what the process's last line says, and nobody is missing."""
    assert proxy.stop() == 0
    last = [line for line in proxy.lines if line["event"] == "metrics" and line["route"] is None][-1]
    told = [line for line in proxy.lines if line["event"] == "connection"]
    assert len(told) == last["downstream_cx_total"]
    assert len({line["connection_id"] for line in told}) == len(told)
    assert sum(line["rx_bytes"] for line in told) == last["downstream_cx_rx_bytes_total"]
    assert {line["reason"] for line in told} == {"closed"}
    assert set(sections) <= {line["route"] for line in told}


def test_fifty_reloads_under_a_storm_refuse_reset_and_cut_nobody_and_leave_nothing(
    start_routed: Any, echoing: Exchange
) -> None:
    port = free_port()
    with far_end() as target:
        always = staying(target, echoing)
        proxy = start_routed(always)
        with stormed(proxy):
            reload_all(proxy, always, 5, port, echoing.target)
        proxy.good(always)
        for name in _TALKING:  # each worker has what it keeps for a route from its first client on
            for _ in range(2):
                proxy.ask(name)
        before = proxy.settled(len(always))
        with stormed(proxy):
            assert reload_all(proxy, always, _RELOADS, port, echoing.target) == [1, 1, 1, 6]
        proxy.good(always)
        proxy.holds_no_more_than(before, len(always))
        conserved(proxy, always)
        assert proxy.stderr() == ""
