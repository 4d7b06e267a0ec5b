"""Many routes in one process: their lines, their counters, and what becomes of a route that goes."""

from __future__ import annotations

import contextlib
import socket
from types import SimpleNamespace
from typing import Any, Dict, List, Optional

from _tsproxy.cli.config import Config
from _tsproxy.linux.addresses import Address
from _tsproxy.supervisor.listening import Ends
from _tsproxy.supervisor.startup import refuse_circles
from harness import Exchange, Line, free_port, wait_until
from routed import RoutedProxy, StartRouted, answers

# Counters of the process alone; and what is no sum: times, and percentiles of all that was measured.
_OF_PROCESS = {"log_lines_dropped_total", "worker_restarts_total"}
_SUMMED = ("_total", "_active", "_overflow", "_denied", "_connect_fail", "_connect_timeout")


def section(far: Exchange, **keys: Any) -> Dict[str, Any]:
    return {"target": far.target, "port": 0, **{name.replace("_", "-"): value for name, value in keys.items()}}


def summed(line: Line) -> Dict[str, int]:
    return {name: value for name, value in line.items() if name.endswith(_SUMMED) and name not in _OF_PROCESS}


def add_up(by_route: Dict[Optional[str], Line], gone: Optional[Dict[str, int]] = None) -> None:
    """The process's totals are the sums of the routes', and of what routes had counted that are gone."""
    routes = [summed(line) for name, line in by_route.items() if name is not None]
    sums = {name: sum(line[name] for line in routes) + (gone or {}).get(name, 0) for name in routes[0]}
    assert summed(by_route[None]) == sums


def told(proxy: RoutedProxy, event: str = "connection") -> List[Line]:
    return [line for line in proxy.lines if line["event"] == event]


def test_the_start_line_is_the_processs_and_each_route_has_a_line(start_routed: StartRouted, echoing: Exchange) -> None:
    port = free_port()
    sections = {"orders": section(echoing, port=port, max_connections=7, idle_timeout=60), "quotes": section(echoing)}
    proxy = start_routed(sections, "--workers=2")
    start = proxy.line("start")
    assert (start["routes"], start["listen_address"], start["listen_port"]) == (2, None, None)
    assert (start["workers"], "route" in start, "targets" in start) == (2, False, False)
    orders, quotes = proxy.route("orders"), proxy.route("quotes")
    assert (orders["listen_address"], orders["listen_port"], orders["listeners"]) == ("127.0.0.1", port, [f"127.0.0.1:{port}"])
    assert (orders["targets"], orders["timestamps"], orders["witness"]) == ([echoing.target], "preserve", "none")
    assert {"max_connections=7", "idle_timeout_s=60"} <= set(orders["limits"])
    assert quotes["listen_port"] not in (0, port)
    assert [line["event"] for line in proxy.lines[:3]] == ["start", "route", "route"]


def test_one_route_of_a_file_has_its_listener_in_the_start_line_too(start_routed: StartRouted, echoing: Exchange) -> None:
    proxy = start_routed({"orders": section(echoing)})
    assert proxy.line("start")["listen_port"] == proxy.port("orders")
    assert proxy.line("start")["routes"] == 1


def test_each_line_of_a_connection_and_each_counter_has_its_route(start_routed: StartRouted, echoing: Exchange) -> None:
    proxy = start_routed({"orders": section(echoing), "quotes": section(echoing)}, "--workers=2")
    for name, count in (("orders", 3), ("quotes", 5)):
        for _ in range(count):
            proxy.ask(name, name.encode())
    proxy.wait_lines()
    by_route = proxy.metrics_by_route()
    assert set(by_route) == {"orders", "quotes", None}
    for name, count in (("orders", 3), ("quotes", 5)):
        lines = [line for line in told(proxy) if line["route"] == name]
        assert [line["rx_bytes"] for line in lines] == [len(name)] * count
        assert by_route[name]["downstream_cx_total"] == by_route[name]["connect_us_count"] == count
        assert by_route[name]["downstream_cx_rx_bytes_total"] == len(name) * count
    add_up(by_route)
    assert by_route[None]["connect_us_count"] == 8
    assert "loop_lag_us_count" not in by_route["orders"]
    assert _OF_PROCESS <= by_route[None].keys()
    assert not _OF_PROCESS & by_route["orders"].keys()


def test_a_line_about_a_limit_has_its_route(start_routed: StartRouted, echoing: Exchange) -> None:
    sections = {"orders": section(echoing, max_connections=1), "quotes": section(echoing, max_connections=1)}
    proxy = start_routed(sections, "--workers=2")
    for name in sections:
        with proxy.connect_to(name) as client:
            answers(client)
            with contextlib.suppress(ConnectionResetError), proxy.connect_to(name) as one_more:
                assert one_more.recv(1) is None
        assert "all that --max-connections allows" in proxy.line("warning", lambda line: line["route"] == name)["message"]  # noqa: B023
    by_route = proxy.metrics_by_route()
    assert [by_route[name]["downstream_cx_overflow"] for name in ("orders", "quotes", None)] == [1, 1, 2]


def test_a_target_that_refuses_is_counted_for_its_route_alone(start_routed: StartRouted, echoing: Exchange) -> None:
    closed = {"target": f"127.0.0.1:{free_port()}", "port": 0}
    proxy = start_routed({"orders": section(echoing), "closed": closed}, "--workers=2")
    with contextlib.suppress(ConnectionResetError), proxy.connect_to("closed") as client:
        assert client.recv(1) == b""
    proxy.ask("orders")
    proxy.wait_lines()
    assert {line["route"]: line["reason"] for line in told(proxy)} == {"orders": "closed", "closed": "connect_refused"}
    by_route = proxy.metrics_by_route()
    assert [by_route[name]["upstream_cx_connect_fail"] for name in ("orders", "closed", None)] == [0, 1, 1]


def test_without_routes_there_is_one_metrics_line_and_the_route_is_default(start: Any, echoing: Exchange) -> None:
    proxy = start(echoing, "--workers=2")
    with proxy.connect() as client:
        answers(client)
    assert proxy.wait_lines()["route"] == "default"
    assert proxy.line("connection")["route"] == "default"
    assert proxy.stop() == 0
    assert {line["route"] for line in told(proxy, "metrics")} == {"default"}
    assert (proxy.count("route"), "routes" in proxy.line("start")) == (0, False)


def test_the_lines_of_a_removed_route_go_on_until_its_last_session_has_ended(
    start_routed: StartRouted, echoing: Exchange
) -> None:
    """And what it counted stays in the process's totals, to the byte."""
    stays = {"quotes": section(echoing)}
    proxy = start_routed({**stays, "orders": section(echoing)}, "--workers=2")
    proxy.ask("orders", b"first")
    proxy.ask("quotes", b"quote")
    with proxy.connect_to("orders") as client:
        answers(client, b"second")
        proxy.good(stays)
        answers(client, b"third")
        by_route = proxy.wait_by_route(lambda found: found["orders"]["downstream_cx_tx_bytes_total"] == 16)
        assert by_route["orders"]["downstream_cx_active"] == 1
        add_up(by_route)
    proxy.wait_lines()
    last = proxy.metrics_by_route()
    ended = wait_until(lambda: without(proxy.metrics_by_route(), "orders"), "its line stops")
    add_up(ended, summed(last["orders"]))
    assert proxy.stop() == 0
    assert sum(line["rx_bytes"] for line in told(proxy)) == last[None]["downstream_cx_rx_bytes_total"] == 21
    assert [line["route"] for line in told(proxy, "metrics")][-2:] == ["quotes", None]
    assert told(proxy, "metrics")[-1]["connect_us_count"] == 3


def without(by_route: Dict[Optional[str], Line], name: str) -> Optional[Dict[Optional[str], Line]]:
    return None if name in by_route else by_route


def test_a_changed_route_goes_on_counting_where_it_was(start_routed: StartRouted, echoing: Exchange) -> None:
    proxy = start_routed({"orders": section(echoing)}, "--workers=2")
    with proxy.connect_to("orders") as client:
        answers(client)
        for turn in range(1, 4):
            proxy.good({"orders": section(echoing, idle_timeout=turn * 100)})
            proxy.ask("orders")
            assert proxy.metrics_by_route()["orders"]["downstream_cx_total"] == turn + 1
    proxy.wait_lines()
    maps = proxy.held()[0].memory_maps
    wait_until(lambda: proxy.held()[0].memory_maps < maps, "the counters of the first versions are taken over")
    by_route = proxy.metrics_by_route()
    add_up(by_route)
    assert by_route["orders"]["downstream_cx_total"] == by_route["orders"]["connect_us_count"] == 4
    assert by_route["orders"]["downstream_cx_rx_bytes_total"] == sum(line["rx_bytes"] for line in told(proxy)) == 20
    assert by_route["orders"]["downstream_cx_active"] == 0


def test_what_a_route_took_is_given_back_though_no_line_is_due(start_routed: StartRouted, echoing: Exchange) -> None:
    """The reporter sleeps until there is something to write, and it is the last to forget a route."""
    always = {"orders": {"target": echoing.target, "port": 0}}
    proxy = start_routed(always, "--workers=2")
    for _ in range(4):
        proxy.ask("orders")
    proxy.good({**always, "quotes": {"target": echoing.target, "port": 0}})
    proxy.good(always)
    before = proxy.settled(routes=1)
    proxy.good({**always, "quotes": {"target": echoing.target, "port": 0}})
    proxy.ask("quotes")
    proxy.good(always)
    proxy.holds_no_more_than(before, routes=1)


def test_what_a_route_of_the_start_took_is_given_back_too(start_routed: StartRouted, echoing: Exchange) -> None:
    proxy = start_routed({"orders": section(echoing), "quotes": section(echoing)}, "--workers=2")
    proxy.line("start")
    before = proxy.held()[0].memory_maps
    proxy.good({"orders": section(echoing)})
    wait_until(lambda: proxy.held()[0].memory_maps < before, "its counters are unmapped")


class Asked(socket.socket):
    """Counts how often it was asked for its address."""

    times = 0

    def getsockname(self) -> Any:
        self.times += 1
        return super().getsockname()


def test_each_listener_is_asked_for_its_address_once_however_many_routes_there_are() -> None:
    """A reload asks in the thread that accepts."""
    with contextlib.ExitStack() as stack:
        listeners: List[Asked] = []
        for _ in range(20):
            listeners.append(stack.enter_context(Asked()))
            listeners[-1].bind(("127.0.0.1", 0))
            listeners[-1].listen()
        proved: Any = [SimpleNamespace(route=None, ends=Ends([Address(socket.AF_INET, "127.0.0.1", 9)], [])) for _ in listeners]
        refuse_circles(Config((), routes_file="venue.ini"), proved, [[listener] for listener in listeners])
        assert {listener.times for listener in listeners} == {1}
