"""The lines through real log shippers, by the generated configuration: each field arrives under its name, with its type."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Set, Tuple

import pytest
import shippers
import yaml
from _tsproxy.tools import generate
from _tsproxy.tools.generate import fields, templates
from harness import CHECKOUT, PATIENCE, Exchange, Line, Proxy, children, free_port, receive_exactly, reset, wait_until
from namespaces import Namespace
from shippers import Shipper, environment, find, generated

# What the fields are called elsewhere, written here by hand. An excerpt (names and types) of elastic/ecs 8.11.0 and 9.4.0,
# generated/csv/fields.csv, and of open-telemetry/semantic-conventions 1.40 and 1.44, model/*/registry.yaml.

ECS = {
    "@timestamp": "date",
    "client.bytes": "long",
    "client.ip": "ip",
    "client.port": "long",
    "destination.bytes": "long",
    "destination.ip": "ip",
    "destination.port": "long",
    "ecs.version": "keyword",
    "event.action": "keyword",
    "event.category": "keyword",
    "event.dataset": "keyword",
    "event.duration": "long",
    "event.kind": "keyword",
    "event.module": "keyword",
    "event.reason": "keyword",
    "event.type": "keyword",
    "log.level": "keyword",
    "message": "match_only_text",
    "network.bytes": "long",
    "network.transport": "keyword",
    "process.pid": "long",
    "server.bytes": "long",
    "server.ip": "ip",
    "server.port": "long",
    "service.name": "keyword",
    "service.version": "keyword",
    "source.bytes": "long",
    "source.ip": "ip",
    "source.port": "long",
}
OTEL = {
    *("client.address", "client.port", "network.local.address", "network.local.port", "network.peer.address"),
    *("network.peer.port", "process.pid", "process.runtime.version", "server.address", "server.port", "service.version"),
    *("Timestamp", "SeverityText", "SeverityNumber", "EventName", "Body"),  # the log data model's own
}


def ecs_of(line: Line) -> Line:
    """A line as ECS, flat; fields that are null are absent."""
    rest = {name: value for name, value in line.items() if value is not None}
    event = rest.pop("event")
    out = {
        "@timestamp": rest.pop("timestamp"),
        "ecs.version": "8.11.0",
        "event.action": event,
        "event.dataset": f"tsproxy.{event}",
        "event.kind": "metric" if event == "metrics" else "event",
        "event.module": "tsproxy",
        "log.level": rest.pop("level"),
        "process.pid": rest.pop("pid"),
        "service.name": "tsproxy",
    }
    if event == "connection":
        out.update({"event.category": ["network"], "event.type": ["connection", "end"], "network.transport": "tcp"})
        out["network.bytes"] = rest["rx_bytes"] + rest["tx_bytes"]
        out["event.duration"] = 1000 * rest.pop("duration_us")
        for ours, theirs in (("client", ("source", "client")), ("upstream", ("destination", "server"))):
            address, port = rest.pop(f"{ours}_address", None), rest.pop(f"{ours}_port", None)
            out.update({f"{name}.ip": address for name in theirs if address})
            out.update({f"{name}.port": port for name in theirs if port})
        received, sent = rest.pop("rx_bytes"), rest.pop("tx_bytes")
        out.update({"source.bytes": received, "client.bytes": received, "destination.bytes": sent, "server.bytes": sent})
    for ours, theirs in (("reason", "event.reason"), ("message", "message"), ("version", "service.version")):
        if ours in rest:
            out[theirs] = rest.pop(ours)
    return {**out, **{f"tsproxy.{name}": value for name, value in rest.items()}}


def flat(record: Line, prefix: str = "") -> Line:
    """{"a": {"b": 1}} as {"a.b": 1}; null is absence."""
    found: Line = {}
    for name, value in record.items():
        if isinstance(value, dict):
            found.update(flat(value, f"{prefix}{name}."))
        elif value is not None:
            found[prefix + name] = value
    return found


def moment(rfc3339: str) -> str:
    """With all of its digits: Vector leaves out three zeros at the end."""
    return datetime.fromisoformat(rfc3339.replace("Z", "+00:00")).isoformat(timespec="microseconds")


def assert_same(records: List[Line], lines: List[Line]) -> None:
    """Field by field, types too: 1 is neither True nor "1"; a shipper may write 30.0 as 30."""
    assert len(records) == len(lines)
    for record, line in zip(records, lines):
        got, wanted = flat(record), ecs_of(line)
        for made in (got, wanted):
            made["@timestamp"] = moment(made["@timestamp"])
        assert got == wanted
        kinds = {name: (type(value), type(wanted[name])) for name, value in got.items()}
        assert all(one is other or {one, other} == {int, float} for one, other in kinds.values()), kinds
        assert all(isinstance(got[name], int) for name in got if ECS.get(name) == "long")


# The map itself


def test_each_standard_name_is_one_of_the_published_ones() -> None:
    names = [name for standard in fields.STANDARD.values() for name in standard.ecs]
    added = [name for some in fields.ADDED.values() for name in some]
    assert {*names, *added} == ECS.keys()
    assert {name for standard in fields.STANDARD.values() for name in standard.otel} == OTEL


def test_fields_prints_the_map_as_json_with_a_row_for_each_field() -> None:
    printed = json.loads(generated("fields"))
    rows = {row["field"]: row for row in printed["fields"]}
    assert len(rows) == len(printed["fields"])
    assert rows.keys() == {name for names in fields.EVENTS.values() for name in names}
    assert rows["client_address"]["ecs"] == ["source.ip", "client.ip"]
    assert rows["connect_us"]["ecs"] == rows["connect_us"]["otel"] == ["tsproxy.connect_us"]
    assert rows["duration_us"]["ecs_scale"] == 1000
    assert rows["reason"]["lines"] == ["connection", "stop"]
    assert all(row["ecs"] and row["otel"] and row["lines"] for row in rows.values())


def mapped(line: Line) -> Set[str]:
    only_of_routes = {"routes"} - line.keys()
    return {*fields.EVENTS["every line"], *fields.EVENTS[line["event"]]} - only_of_routes


@pytest.mark.root
def test_no_field_of_a_real_line_is_unmapped() -> None:
    seen: Set[str] = set()
    with contextlib.closing(Namespace(tcp_timestamps="0")) as namespace:
        with namespace:
            far = Exchange()
        command = [*namespace.enter, *CHECKOUT, "-t", far.target, "-p0", "--workers=1", "--runtime=processes"]
        with contextlib.closing(far), contextlib.closing(Proxy(command)) as proxy, namespace:
            with proxy.connect() as client, far.accept():
                client.sendall(b"order")
            proxy.line("connection")
            namespace.sysctl("tcp_timestamps", "1")
            proxy.line("timestamps_drift")
            (fork_server,) = children(proxy.process.pid)
            os.kill(children(fork_server)[0], signal.SIGKILL)
            proxy.line("error")
            proxy.metrics()
            proxy.stop()
            for line in proxy.lines:
                seen.add(line["event"])
                assert line.keys() <= mapped(line), line["event"]
                if line["event"] not in ("error", "warning"):  # those of the acceptor have no worker
                    assert line.keys() == mapped(line), line["event"]
    assert seen >= {"start", "connection", "metrics", "timestamps_drift", "error", "drain", "stop"}


def test_no_field_of_a_real_line_of_routes_is_unmapped(tmp_path: Path, echoing: Exchange) -> None:
    path, lines = tmp_path / "routes.ini", f"port = 0\ntarget = {echoing.target}\n"
    path.write_text(f"[oe]\n{lines}[md]\n{lines}")
    with contextlib.closing(Proxy([*CHECKOUT, f"--routes={path}", "--timestamps=preserve", "--workers=1"])) as proxy:
        proxy.line("route", lambda line: line["route"] == "md")
        path.write_text(f"[oe]\n{lines}[md-b]\n{lines}")
        proxy.process.send_signal(signal.SIGHUP)
        proxy.line("reload")
        proxy.stop()
    assert {line["event"] for line in proxy.lines} >= {"start", "route", "reload", "metrics", "stop"}
    for line in proxy.lines:
        assert line.keys() <= mapped(line), line["event"]
        if line["event"] == "route":
            assert line.keys() == mapped(line)
    (of_process,) = {frozenset(line) for line in proxy.lines if line["event"] == "metrics" and line["route"] is None}
    (of_route,) = {frozenset(line) for line in proxy.lines if line["event"] == "metrics" and line["route"]}
    missing = of_process - of_route
    assert missing >= {"log_lines_dropped_total", "worker_restarts_total", "loop_lag_us_count"}
    assert all(name.startswith(fields.OF_PROCESS) for name in missing)


# What each of them prints


@pytest.mark.parametrize("kind", generate.ALONE)
def test_each_kind_is_filled_in_and_needs_no_option(kind: str) -> None:
    text = generated(kind)
    assert not templates.PLACEHOLDER.findall(text)
    assert not re.search(r"[ \t]$", text, re.M)
    assert text.endswith("\n")


@pytest.mark.parametrize("kind", [kind for kind in generate.ALONE if kind not in ("fields", "grafana")])
def test_each_configuration_says_how_to_make_it_try_it_and_undo_it(kind: str) -> None:
    comments = [line for line in generated(kind).splitlines() if re.match(r"(#|//|\.\\\") ", line)]
    for word in ("Make:", "Try:", "Undo:"):
        assert any(line.split()[1] == word for line in comments), word
    assert any(re.search(rf"generate {kind} [>|]", line) for line in comments)
    assert max(map(len, comments)) <= 128


@pytest.mark.parametrize("kind", generate.ALONE)
def test_the_single_file_prints_the_same(kind: str, bundle: Path, tmp_path: Path) -> None:
    script = shutil.copy(bundle, tmp_path / "tsproxy.py")  # by the same name, which is printed
    done = subprocess.run([sys.executable, "-I", "-S", script, "generate", kind], capture_output=True, text=True, check=True)
    assert done.stdout == generated(kind)


@pytest.mark.parametrize("kind", shippers.SHIPPERS)
def test_the_pipe_that_the_comments_show_is_the_one_that_is_tested_here(kind: str) -> None:
    assert f"| {LOGGER} " in generated(kind)


# Through rsyslog and syslog-ng


LOGGER = "logger --tag tsproxy --size 8192"


@pytest.fixture(params=shippers.SHIPPERS)
def shipper(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Shipper]:
    with contextlib.closing(shippers.SHIPPERS[request.param](tmp_path)) as running:
        yield running


Feed = Callable[..., List[str]]


def by_file(shipper: Shipper, copy: Path, *command: str) -> List[str]:
    """tsproxy as a shell runs it that appends its lines to the file."""
    copy.symlink_to(shipper.lines_file)
    return ["sh", "-c", 'exec "$@" >>"$0"', str(shipper.lines_file), *command]


def by_pipe(shipper: Shipper, copy: Path, *command: str) -> List[str]:
    """tsproxy as a shell runs it that pipes its lines into logger; tee keeps a copy for the test."""
    script = f'copy=$0 log=$1; shift; "$@" | tee "$copy" | exec {LOGGER} --socket "$log"'
    return ["sh", "-c", script, str(copy), str(shipper.socket), *command]


class Shipped:
    """A tsproxy whose lines go to a shipper; what it wrote is kept in `copy`."""

    def __init__(self, shipper: Shipper, feed: Feed, far: Exchange, *options: str) -> None:
        self.copy = shipper.directory / "copy"
        relaying = [*CHECKOUT, "-t", far.target, "-p0", "--timestamps=preserve", "--metrics-interval=0", *options]
        self.process = subprocess.Popen(
            feed(shipper, self.copy, *relaying),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        wait_until(self.lines, "the start line")
        start = self.lines()[0]
        self.pid, self.address = start["pid"], (start["listen_address"], start["listen_port"])

    def lines(self) -> List[Line]:
        whole = self.copy.read_bytes().split(b"\n")[:-1] if self.copy.exists() else []
        return [json.loads(line) for line in whole]

    def relay(self, count: int) -> None:
        """So many connections, one after the other, each with its reply."""
        for number in range(count):
            with socket.create_connection(self.address, PATIENCE) as client:
                client.sendall(b"%06d" % number)
                assert receive_exactly(client, 6) == b"%06d" % number

    def stop(self) -> List[Line]:
        """SIGTERM, the end, and all that was written."""
        os.kill(self.pid, signal.SIGTERM)
        self.process.wait(PATIENCE)
        return self.lines()

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def ship(shipper: Shipper) -> Iterator[Callable[..., Shipped]]:
    with contextlib.ExitStack() as stack:
        yield lambda *given: stack.enter_context(contextlib.closing(Shipped(shipper, *given)))


FEEDS = pytest.mark.parametrize("feed", [by_file, by_pipe])


def refused() -> Exchange:
    """An exchange that is gone."""
    far = Exchange(port=free_port())
    far.close()
    return far


@FEEDS
def test_what_comes_out_is_what_went_in_field_by_field(
    shipper: Shipper, ship: Callable[..., Shipped], feed: Feed, echoing: Exchange
) -> None:
    proxy = ship(feed, echoing)
    proxy.relay(5)
    reset(socket.create_connection(proxy.address, PATIENCE))
    os.kill(proxy.pid, signal.SIGUSR1)
    wait_until(lambda: {"connection", "metrics"} <= {line["event"] for line in proxy.lines()})
    lines = proxy.stop()
    records = shipper.wait_for(len(lines))
    assert {line["event"] for line in lines} == {"start", "connection", "metrics", "drain", "stop"}
    assert max(len(json.dumps(line)) for line in lines) > 2048  # a metrics line, which logger would cut
    assert_same(records, lines)


@FEEDS
def test_what_is_null_is_left_out_and_addresses_of_version_6_are_addresses(
    shipper: Shipper, ship: Callable[..., Shipped], feed: Feed
) -> None:
    proxy = ship(feed, refused(), "-b", "::1")
    with contextlib.suppress(ConnectionResetError), socket.create_connection(proxy.address, PATIENCE) as client:
        assert client.recv(1) == b""
    wait_until(lambda: any(line["event"] == "connection" for line in proxy.lines()))
    lines = proxy.stop()
    records = shipper.wait_for(len(lines))
    assert_same(records, lines)
    (ended,) = [flat(record) for record in records if record["event"]["action"] == "connection"]
    assert (ended["event.reason"], ended["log.level"]) == ("connect_refused", "warning")
    assert ipaddress.ip_address(ended["source.ip"]) == ipaddress.ip_address("::1")
    assert "tsproxy.connect_us" not in ended


def test_the_lines_of_routes_come_out_with_their_route_and_that_of_the_process_without(
    shipper: Shipper, echoing: Exchange, start: Callable[..., Proxy]
) -> None:
    proxy = start(echoing)
    with proxy.connect() as client:
        round_trips(client, 1)
    proxy.line("connection")
    proxy.stop()
    lines = shippers.as_routes(proxy.lines)
    shipper.lines_file.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))
    records = shipper.wait_for(len(lines))
    assert_same(records, lines)
    totals = [flat(record) for record in records if record["event"]["action"] == "metrics"]
    assert [record.get("tsproxy.route") for record in totals] == ["oe-primary", None, "md.a"]


def test_a_line_that_is_no_json_comes_out_too(shipper: Shipper) -> None:
    shipper.lines_file.write_text('Segmentation fault "(core dumped)"\n')
    (record,) = shipper.wait_for(1)
    assert flat(record) == {
        "ecs.version": "8.11.0",
        "event.kind": "pipeline_error",
        "event.module": "tsproxy",
        "message": 'Segmentation fault "(core dumped)"',
        "service.name": "tsproxy",
    }


def round_trips(client: socket.socket, count: int) -> None:
    for _ in range(count):
        client.sendall(b"o" * 64)
        assert len(receive_exactly(client, 64)) == 64


@pytest.mark.slow
def test_a_shipper_that_stands_still_costs_lines_that_are_counted_and_no_time(
    shipper: Shipper, ship: Callable[..., Shipped], echoing: Exchange
) -> None:
    proxy = ship(by_pipe, echoing, "--workers=1")
    with socket.create_connection(proxy.address, PATIENCE) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        shipper.wait_for(1)
        shipper.signal(signal.SIGSTOP)
        held = 4096 + 2048  # lines: the backlog's room, that of two pipes (64 KiB each) and of a socket, and then some
        proxy.relay(held)
        round_trips(client, 1000)  # whatever would wait for the shipper would wait here for ever
        shipper.signal(signal.SIGCONT)
    os.kill(proxy.pid, signal.SIGUSR1)  # its line comes behind all that have waited
    wait_until(lambda: any(line["event"] == "metrics" for line in proxy.lines()), "the backlog is written", 3 * PATIENCE)
    proxy.relay(1)
    lines = proxy.stop()
    totals = [line for line in lines if line["event"] == "metrics"][-1]
    ended = sum(line["event"] == "connection" for line in lines)
    assert totals["downstream_cx_total"] == held + 2
    assert totals["log_lines_dropped_total"] > 0
    assert ended + totals["log_lines_dropped_total"] == held + 2
    assert_same(shipper.wait_for(len(lines)), lines)


def test_a_shipper_that_is_killed_and_comes_back_goes_on_with_the_file(
    shipper: Shipper, ship: Callable[..., Shipped], echoing: Exchange
) -> None:
    proxy = ship(by_file, echoing)
    proxy.relay(20)
    shipper.wait_for(21)
    shipper.signal(signal.SIGKILL)
    proxy.relay(20)
    shipper.start()
    proxy.relay(20)
    records, wanted = stopped(proxy, shipper)
    assert all(record in wanted for record in records)  # whole lines: some twice, where the position had not been saved
    assert all(line in records for line in wanted)


def stopped(proxy: Shipped, shipper: Shipper) -> Tuple[List[Line], List[Line]]:
    """What the shipper has written when it has the stop line, and what it should have."""
    lines = proxy.stop()
    last = ecs_of(lines[-1])
    wait_until(lambda: last in map(flat, shipper.records()), "the stop line", 3 * PATIENCE)
    return [flat(record) for record in shipper.records()], [ecs_of(line) for line in lines]


def test_a_shipper_that_is_killed_and_comes_back_gets_whole_lines_from_the_pipe(
    shipper: Shipper, ship: Callable[..., Shipped], echoing: Exchange
) -> None:
    proxy = ship(by_pipe, echoing)
    proxy.relay(20)
    shipper.wait_for(21)
    shipper.signal(signal.SIGKILL)
    with socket.create_connection(proxy.address, PATIENCE) as client:
        round_trips(client, 100)
    proxy.relay(20)
    shipper.start()
    proxy.relay(20)
    records, wanted = stopped(proxy, shipper)
    assert all(record in wanted for record in records)
    assert len([record for record in records if record["event.action"] == "connection"]) >= 40
    assert len(wanted) == 1 + 61 + 3


def test_a_file_that_is_rotated_under_way_goes_on_at_its_beginning(
    shipper: Shipper, ship: Callable[..., Shipped], echoing: Exchange
) -> None:
    rotate = shipper.directory / "logrotate.conf"
    rotate.write_text(generated("logrotate", shipper.directory))
    proxy = ship(by_file, echoing)
    proxy.relay(100)  # more than comes after: that the file is shorter is how a shipper sees that it was truncated
    first = len(shipper.wait_for(101))
    before = proxy.lines()
    command = [find("logrotate"), "--force", "--state", str(shipper.directory / "state"), str(rotate)]
    subprocess.run(command, env=environment(), check=True)
    (old,) = shipper.directory.glob("tsproxy.json.*")
    assert [json.loads(line) for line in old.read_text().splitlines()] == before
    proxy.relay(20)
    lines = proxy.stop()
    assert b"\0" not in shipper.lines_file.read_bytes()  # no hole: >> appends
    assert len(lines) == 23
    assert_same(shipper.wait_for(first + len(lines)), before + lines)


# Through the others, as far as each can be had


def sample(echoing: Exchange, start: Callable[..., Proxy]) -> List[Line]:
    """Lines of a real tsproxy, with and without null fields, and the same as those of routes."""
    proxies = [start(echoing), start(refused())]
    with proxies[0].connect() as client:
        round_trips(client, 10)
    proxies[1].expect_end()
    for proxy in proxies:
        proxy.line("connection")
        proxy.stop()
    return [line for proxy in proxies for line in proxy.lines] + shippers.as_routes(proxies[0].lines)


def vrl(transform: str, lines: List[str]) -> List[Line]:
    """The lines through that remap of the Vector configuration, by Vector's own VRL."""
    vrl_python = pytest.importorskip("vrl_python", reason="LOUD: no vrl-python: Vector's programs are NOT run here")
    source = yaml.safe_load(generated("vector"))["transforms"][transform]["source"]
    runtime = vrl_python.VRLRuntime()
    return [runtime.execute(source, {"message": line}).processed_event for line in lines]


def test_vector_makes_ecs(echoing: Exchange, start: Callable[..., Proxy]) -> None:
    lines = sample(echoing, start)
    records = vrl("tsproxy_ecs", [json.dumps(line) for line in lines])
    for record in records:  # a timestamp here, which the binding writes in its own way and Vector in RFC 3339
        record["@timestamp"] = record["@timestamp"].replace(" UTC", "Z").replace(" ", "T")
    assert_same(records, lines)
    (other,) = vrl("tsproxy_ecs", ["not JSON"])
    assert (other["event"]["kind"], other["message"]) == ("pipeline_error", "not JSON")


def otel_value(value: Dict[str, Any]) -> Any:
    """OTLP's JSON: 64-bit whole numbers are texts."""
    ((kind, inner),) = value.items()
    if kind == "arrayValue":
        return [otel_value(item) for item in inner["values"]]
    assert type(inner) is {"stringValue": str, "boolValue": bool, "intValue": str, "doubleValue": float}[kind]
    return int(inner) if kind == "intValue" else inner


def test_vector_makes_opentelemetry(echoing: Exchange, start: Callable[..., Proxy]) -> None:
    lines = sample(echoing, start)
    names = {field: standard.otel for field, standard in fields.STANDARD.items()}
    for line, made in zip(lines, vrl("tsproxy_otel", [json.dumps(line) for line in lines])):
        (resource,) = made["resourceLogs"]
        assert resource["resource"]["attributes"] == [{"key": "service.name", "value": {"stringValue": "tsproxy"}}]
        (record,) = resource["scopeLogs"][0]["logRecords"]
        got = {attribute["key"]: otel_value(attribute["value"]) for attribute in record["attributes"]}
        wanted: Line = {"network.transport": "tcp"} if line["event"] == "connection" else {}
        for field, value in line.items():
            for name in (names.get(field) or (f"tsproxy.{field}",)) if value is not None else ():
                wanted[name] = value
        own = {name: wanted.pop(name, None) for name in ("Timestamp", "SeverityText", "SeverityNumber", "EventName", "Body")}
        assert got == wanted
        assert {name: type(value) for name, value in got.items()} == {name: type(value) for name, value in wanted.items()}
        assert record["eventName"] == f"tsproxy.{own['EventName']}"
        assert (record["severityText"], record["severityNumber"]) == (
            line["level"],
            {"info": 9, "warning": 13, "error": 17}[line["level"]],
        )
        seconds, micros = divmod(int(record["timeUnixNano"]) // 1000, 1_000_000)
        assert time.strftime(f"%Y-%m-%dT%H:%M:%S.{micros:06d}Z", time.gmtime(seconds)) == own["Timestamp"]


def test_fluent_bit_makes_ecs(tmp_path: Path, echoing: Exchange, start: Callable[..., Proxy]) -> None:
    program, conf, out = find("fluent-bit", required=False), tmp_path / "tsproxy.yaml", tmp_path / "ecs.json"
    conf.write_text(generated("fluent-bit", tmp_path))
    subprocess.run([program, "--dry-run", "--config", conf], capture_output=True, check=True)
    lines = sample(echoing, start)
    (tmp_path / "tsproxy.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    running = subprocess.Popen([program, "--config", conf], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: out.exists() and out.read_bytes().count(b"\n") >= len(lines), "the lines come out")
    finally:
        running.terminate()
        running.wait()
    assert_same([json.loads(line) for line in out.read_text().splitlines()], lines)


STAND_IN = """
    const lines = require("fs").readFileSync(0, "utf8").split("\\n").filter(Boolean);
    const path = (tree, name, last) => { const parts = name.split("."), end = parts.pop();
        for (const part of parts) { if (!(part in tree)) tree[part] = {}; tree = tree[part]; } return last(tree, end); };
    for (const line of lines) {
        const tree = {message: line, tsproxy: JSON.parse(line)};
        process({Get: n => path(tree, n, (t, e) => e in t ? t[e] : null), Delete: n => path(tree, n, (t, e) => delete t[e]),
                 Put: (n, v) => path(tree, n, (t, e) => { t[e] = v; })});
        console.log(JSON.stringify(tree));
    }
"""


def test_filebeats_script_makes_ecs(echoing: Exchange, start: Callable[..., Proxy]) -> None:
    node = find("node", required=False)
    (input_,) = yaml.safe_load(generated("filebeat"))
    (script,) = [processor["script"]["source"] for processor in input_["processors"] if "script" in processor]
    lines = sample(echoing, start)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    run = subprocess.run([node, "-e", script + STAND_IN], input=text, capture_output=True, text=True, check=True)
    records = [json.loads(line) for line in run.stdout.splitlines()]
    for record in records:  # the timestamp processor's part
        record["@timestamp"] = record["tsproxy"].pop("timestamp")
    assert_same(records, lines)


def test_promtail_and_filebeat_and_vector_are_sound_yaml_that_reads_the_file() -> None:
    (job,) = yaml.safe_load(generated("promtail"))["scrape_configs"]
    (stages,) = [job["pipeline_stages"]]
    assert job["static_configs"][0]["labels"]["__path__"] == "/var/log/tsproxy/tsproxy.json"
    assert [next(iter(stage)) for stage in stages] == ["json", "timestamp", "labels"]
    assert stages[2]["labels"].keys() == {"level", "event", "route"}  # few values: each is a stream
    assert stages[0]["json"]["expressions"].keys() == {"timestamp", "level", "event", "route"}
    (input_,) = yaml.safe_load(generated("filebeat"))
    assert input_["paths"] == yaml.safe_load(generated("vector"))["sources"]["tsproxy_lines"]["include"]


def test_alloys_blocks_and_strings_are_closed_and_each_component_it_names_is_there() -> None:
    text = re.sub(r"^//.*$", "", generated("alloy"), flags=re.M)
    assert text.count("`") % 2 == 0
    bare = re.sub(r"`[^`]*`|\"[^\"]*\"", lambda quoted: "q" if quoted[0][0] == "`" else quoted[0], text)
    for opening, closing in ("{}", "[]", "()"):
        assert bare.count(opening) == bare.count(closing)
    made = {f"{kind}.{label}" for kind, label in re.findall(r'^([a-z_.]+) "(\w+)" \{$', bare, re.M)}
    used = set(re.findall(r"\[([a-z_.]+)\.(?:input|receiver)\]", bare))
    assert used < made
    assert made - used == {"loki.source.file.tsproxy"}


# The journal


def test_the_drop_in_is_a_sound_part_of_a_unit(tmp_path: Path) -> None:
    unit, drop_in = tmp_path / "tsproxy.service", tmp_path / "tsproxy.service.d"
    unit.write_text("[Service]\nExecStart=/bin/true\n")
    drop_in.mkdir()
    (drop_in / "journald.conf").write_text(generated("journald"))
    done = subprocess.run([find("systemd-analyze"), "verify", str(unit)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_journal_gives_the_lines_back_byte_for_byte(tmp_path: Path, echoing: Exchange, start: Callable[..., Proxy]) -> None:
    remote = find("systemd-journal-remote")
    messages = [json.dumps(line, separators=(",", ":")) for line in sample(echoing, start)]
    stamp = "__REALTIME_TIMESTAMP=1795357843399836\n__MONOTONIC_TIMESTAMP=1\n_BOOT_ID=00000000000000000000000000000001\n"
    exported = "".join(f"{stamp}SYSLOG_IDENTIFIER=tsproxy\nMESSAGE={message}\n\n" for message in messages)
    journal = tmp_path / "tsproxy.journal"
    write = [remote, "--output", str(journal), "-"]
    subprocess.run(write, env=environment(), input=exported, text=True, capture_output=True, check=True)
    look = [find("journalctl"), "--file", str(journal), "--output", "cat", "--identifier", "tsproxy"]
    assert subprocess.run(look, capture_output=True, text=True, check=True).stdout.splitlines() == messages
