"""`generate prometheus` and `grafana`: mtail makes of real lines what they say, alerts fire, the dashboard asks what exists."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import time
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Set, Tuple

import pytest
from _tsproxy.stats.encoder import Stamps
from _tsproxy.tools.generate import fields
from harness import Exchange, Line, Proxy, receive_exactly, reset, wait_until
from shippers import as_routes, find, generated

PROGRAM, RULES = "/etc/mtail/tsproxy.mtail", "/etc/prometheus/tsproxy.rules.yml"


@lru_cache
def files() -> Dict[str, str]:
    """Path -> text, by the headings."""
    parts = re.split(r"^# (/\S+)\n", generated("prometheus"), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2]))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The two files."""
    for path, text in files().items():
        (tmp_path / Path(path).name).write_text(text)
    return tmp_path


def test_the_way_to_install_that_the_heading_tells_puts_each_part_in_its_file(tmp_path: Path) -> None:
    printed = generated("prometheus")
    program = re.search(r"awk '(.*)'$", printed, re.M)
    assert program
    for path in files():
        (tmp_path / path[1:]).parent.mkdir(parents=True)
    into = program[1].replace("file = $2", f'file = "{tmp_path}" $2')
    subprocess.run(["awk", into], input=printed, text=True, check=True)
    assert {path: (tmp_path / path[1:]).read_text() for path in (PROGRAM, RULES)} == files()


def by_mtail(home: Path, lines: List[Line]) -> Dict[str, float]:
    """Each series that mtail exposes once it has read these lines, and its number."""
    log = home / "tsproxy.json"
    log.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))
    command = [find("mtail"), "--progs", home / "tsproxy.mtail", "--logs", log, "--one_shot", "--one_shot_format=prometheus"]
    more = ["--emit_prog_label=false", "--address=127.0.0.1", "--port=0", "--log_dir", home]
    done = subprocess.run([*map(str, command), *more], capture_output=True, text=True, check=True)
    return {series: float(value) for series, value in re.findall(r"^(tsproxy_\S+) (\S+)$", done.stdout.replace("{}", ""), re.M)}


@pytest.fixture
def lines(echoing: Exchange, start: Callable[..., Proxy]) -> List[Line]:
    """All lines of a tsproxy that relayed something, met a reset, and was stopped."""
    proxy = start(echoing)
    for end in (socket.socket.close, socket.socket.close, socket.socket.close, reset):
        client = proxy.connect()
        client.sendall(b"order")
        assert receive_exactly(client, 5) == b"order"
        end(client)
    proxy.wait_metrics(lambda line: line["downstream_cx_active"] == 0)
    proxy.stop()
    return proxy.lines


OF_PROCESS = {
    *("tsproxy_internal_errors_total", "tsproxy_log_lines_dropped_total", "tsproxy_worker_restarts_total"),
    *("tsproxy_downstream_cx_lost_with_worker_total", "tsproxy_loop_lag_seconds_bucket", "tsproxy_loop_lag_seconds_max"),
}


def series_of(field: str, route: str = "default") -> Optional[str]:
    """What a field of a metrics line is called in Prometheus; None for the route, and for what Prometheus computes."""
    if field.endswith(("_p50", "_p99", "_p999", "_per_s", "_time", "uptime_s", "interval_s", "route")):
        return None
    name, labels = f"tsproxy_{field}" + ("" if field.endswith(("_total", "_active", "_per_s_max")) else "_total"), []
    histogram = re.fullmatch(r"(\w+)_us_(?:le_(\d+)|(max|count))", field)
    if histogram:
        name = f"tsproxy_{histogram[1]}_seconds_{'max' if histogram[3] == 'max' else 'bucket'}"
        if histogram[3] != "max":
            labels.append(f'le="{"+Inf" if histogram[3] else f"{int(histogram[2]) / 1e6:.12g}"}"')
    labels += [] if name in OF_PROCESS else [f'route="{route}"']
    return name + (f"{{{','.join(labels)}}}" if labels else "")


def told(line: Line) -> Dict[str, float]:
    """The series of a metrics line, and their numbers."""
    found: Dict[str, float] = {}
    for field, value in line.items():
        name = series_of(field, line["route"])
        if name and value is not None and field not in fields.EVENTS["every line"]:
            found[name] = value / 1e6 if "_seconds_max" in name else value
    return found


def test_mtail_exposes_each_number_of_the_last_metrics_line(home: Path, lines: List[Line]) -> None:
    last = [line for line in lines if line["event"] == "metrics"][-1]
    assert last["downstream_cx_total"] == 4
    wanted = told(last)
    exposed = by_mtail(home, lines)
    assert {name: value for name, value in exposed.items() if name in wanted} == pytest.approx(wanted)
    others = {name.partition("{")[0] for name in exposed.keys() - wanted.keys()}
    own = {"start_timestamp_seconds", "metrics_timestamp_seconds", "timestamps_drift", "connections_ended_total"}
    assert others == {f"tsproxy_{name}" for name in own}


def test_mtail_counts_the_ends_of_connections_by_reason(home: Path, lines: List[Line]) -> None:
    assert {name: count for name, count in by_mtail(home, lines).items() if "connections" in name} == {
        'tsproxy_connections_ended_total{reason="closed",route="default",termination_state="--"}': 3,
        'tsproxy_connections_ended_total{reason="client_reset",route="default",termination_state="CD"}': 1,
    }


def test_mtail_labels_by_route_and_no_sum_counts_the_line_of_the_process_too(home: Path, lines: List[Line]) -> None:
    shared = as_routes(lines)
    exposed = by_mtail(home, shared)
    (whole,) = [told(line) for line in shared if line["event"] == "metrics" and line["route"] is None]
    totals = {name: value for name, value in whole.items() if name.partition("{")[0] not in OF_PROCESS}
    assert not any('route="None"' in name or 'route="null"' in name for name in exposed)
    assert not any('route="default"' in name for name in exposed)
    for name, total in totals.items():
        if "_seconds_max" not in name:
            parts = [exposed[name.replace('"None"', f'"{route}"')] for route in ("oe-primary", "md.a")]
            assert sum(parts) == total, name
    own = {name: value for name, value in whole.items() if name.partition("{")[0] in OF_PROCESS}
    assert {name: exposed[name] for name in own} == pytest.approx(own)
    ends = {name: count for name, count in exposed.items() if "connections_ended" in name}
    assert sum(ends.values()) == 4 and len(ends) == 3
    assert {name: value for name, value in exposed.items() if "drift" in name} == {
        f'tsproxy_timestamps_drift{{route="{route}"}}': 0 for route in ("oe-primary", "md.a")
    }


DRIFT = {
    "timestamp": "2026-11-22T14:30:43.399836Z",
    "level": "error",
    "event": "timestamps_drift",
    "pid": 1,
    "message": 'refused: "route":"no"',
    "route": "oe",
}


@pytest.mark.parametrize(("levels", "drifting"), [(["error"], 1), (["error", "info"], 0), (["info", "error"], 1)])
def test_mtail_knows_whether_the_policy_holds(home: Path, levels: List[str], drifting: int) -> None:
    others = [{**DRIFT, "route": "md", "level": level} for level in ("info", "error")]
    exposed = by_mtail(home, [others[1], *({**DRIFT, "level": level} for level in levels), others[0]])
    assert {name: value for name, value in exposed.items() if "drift" in name} == {
        'tsproxy_timestamps_drift{route="oe"}': drifting,
        'tsproxy_timestamps_drift{route="md"}': 0,
    }


def test_mtail_knows_that_the_policy_holds_again_by_the_line_that_begins_a_route_or_a_process(home: Path) -> None:
    head = {"timestamp": DRIFT["timestamp"], "level": "info"}
    begun = {**head, "event": "route", "pid": 1, "route": "oe"}
    old, routed = ({**head, "event": "start", "pid": 2, **more} for more in ({}, {"routes": 2}))
    drifting = [DRIFT, {**DRIFT, "route": "md"}, {**DRIFT, "route": "default"}]
    for lines, route, value in ((begun, "oe", 0), (begun, "md", 1), (old, "default", 0), (routed, "default", 1)):
        exposed = by_mtail(home, [*drifting, lines])
        assert exposed[f'tsproxy_timestamps_drift{{route="{route}"}}'] == value


def exposed_at(path: Path) -> str:
    """What a running mtail serves on a socket of that path; nothing before it listens there."""
    with socket.socket(socket.AF_UNIX) as client:
        if client.connect_ex(str(path)):
            return ""
        client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        return b"".join(iter(lambda: client.recv(1 << 16), b"")).decode()


def test_mtail_forgets_a_removed_route_after_a_day_and_no_refusal_while_its_lines_come(home: Path) -> None:
    def ago(seconds: float, event: str, route: str) -> Line:
        at = Stamps().rfc3339(time.time_ns() - int(seconds * 1e9))
        return {"timestamp": at, "level": "error", "event": event, "route": route, "downstream_cx_active": 3}

    lines = [
        ago(100_000 if event == "timestamps_drift" else last, event, route)
        for route, last in (("gone", 90_000), ("stays", 5))
        for event in ("timestamps_drift", "metrics")
    ]
    log, at = home / "tsproxy.json", home / "socket"
    log.write_text("")
    command = [find("mtail"), "--progs", home / "tsproxy.mtail", "--logs", log, "--unix_socket", at, "--log_dir", home]
    with subprocess.Popen([*map(str, command), "--expired_metrics_gc_interval=100ms"], stderr=subprocess.DEVNULL) as running:
        try:
            wait_until(lambda: "lines_total" in exposed_at(at), "mtail serves")
            log.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))
            wait_until(lambda: re.search(r'_drift\{.*route="stays".*\} 1', exposed_at(at)), "the last line is read")
            wait_until(lambda: 'route="gone"' not in exposed_at(at), "a removed route is forgotten")
            assert re.search(r'_drift\{.*route="stays".*\} 1', exposed_at(at))
        finally:
            running.terminate()


# Alerts

STEPS = "0x9 1x20"  # promtool's notation: 0 up to minute 9, 1 from then on
ALERTS = {
    "TsproxyTimestampsDrift": ("tsproxy_timestamps_drift", STEPS),
    "TsproxyConnectionsRefusedByPolicy": ("tsproxy_upstream_cx_policy_refused_total", STEPS),
    "TsproxySilent": ("tsproxy_metrics_timestamp_seconds", "0+60x9 540x20"),
    "TsproxyInternalErrors": ("tsproxy_internal_errors_total", STEPS),
    "TsproxyWorkersRestarted": ("tsproxy_worker_restarts_total", STEPS),
    "TsproxyExchangeUnreachable": ("tsproxy_upstream_cx_connect_timeout_total", STEPS),
    "TsproxyClientsTurnedAway": ("tsproxy_downstream_cx_overflow_total", STEPS),
    "TsproxyLinesDropped": ("tsproxy_log_lines_dropped_total", STEPS),
}


ROUTED = {"": "", " by route": ',route="oe"'}


def after_12_minutes(fires: List[str], **unusual: str) -> Dict[str, object]:
    """A test for promtool: these alerts, and no other, fire for a tsproxy that is well but for these series."""
    declared = dict(re.findall(r"^(?:counter|gauge) (\w+)(| by route)$", files()[PROGRAM], re.M))
    usual = dict.fromkeys(declared, "0x30")
    series = {**usual, "tsproxy_metrics_timestamp_seconds": "0+60x30", **unusual}
    assert series.keys() == usual.keys()
    wanted = [{"labels": f'{{alertname="{alert}"{ROUTED[declared[ALERTS[alert][0]]]}}}', "value": 1} for alert in fires]
    look = {"expr": 'sum by (alertname, route) (ALERTS{alertstate="firing"})', "eval_time": "12m", "exp_samples": wanted}
    inputs = [{"series": f'{name}{{instance="h"{ROUTED[declared[name]]}}}', "values": how} for name, how in series.items()]
    others = [
        {"series": f'{name}{{instance="h",route="quiet"}}', "values": how} for name, how in usual.items() if declared[name]
    ]
    return {"interval": "1m", "input_series": [*inputs, *others], "promql_expr_test": [look]}


def test_each_alert_fires_by_what_it_is_for_and_none_while_all_is_well(home: Path) -> None:
    groups = [after_12_minutes([]), *(after_12_minutes([alert], **{name: how}) for alert, (name, how) in ALERTS.items())]
    tests = {"rule_files": [Path(RULES).name], "evaluation_interval": "1m", "tests": groups}
    (home / "tests.yml").write_text(json.dumps(tests))
    done = subprocess.run([find("promtool"), "test", "rules", home / "tests.yml"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"- alert: (\w+)", files()[RULES]) == list(ALERTS)


# The dashboard


def panels() -> List[Dict[str, Any]]:
    found: List[Dict[str, Any]] = json.loads(generated("grafana"))["panels"]
    return found


def queries() -> List[str]:
    return [target["expr"] for panel in panels() for target in panel["targets"]]


def test_each_query_of_the_dashboard_is_sound_and_asks_for_metrics_that_mtail_makes(tmp_path: Path) -> None:
    made = dict(re.findall(r"^(?:counter|gauge) (\w+)(?: by (route))?", files()[PROGRAM], re.M))
    for query in queries():
        for name, selector in re.findall(r"(tsproxy_\w+)\{([^}]*)\}", query):
            wanted = 'instance=~"$instance"' + (',route=~"$route"' if made[name] else "")
            assert selector == wanted, query
    asked = {name for query in queries() for name in re.findall(r"tsproxy_\w+", query)}
    assert asked <= made.keys()
    assert {name for name in made.keys() - asked if "timestamps_total" not in name} == {
        *(f"tsproxy_{time}_seconds_max" for time in ("connect", "relay", "loop_lag")),  # since the start: p99.9 is shown
        "tsproxy_start_timestamp_seconds",
        "tsproxy_upstream_cx_total",
    }
    filled = [re.sub(r"\$__\w+", "5m", query) for query in queries()]
    rules = [{"record": f"query:{number}", "expr": query} for number, query in enumerate(filled)]
    (tmp_path / "rules.yml").write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    done = subprocess.run(
        [find("promtool"), "check", "rules", tmp_path / "rules.yml"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, f"{len(rules)} rules found" in done.stdout) == (0, True), done


def test_the_panels_of_the_dashboard_lie_beside_one_another() -> None:
    taken: Set[Tuple[int, int]] = set()
    for place in (panel["gridPos"] for panel in panels()):
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & taken
        assert max(x for x, _ in cells) < 24  # the columns of Grafana's grid
        taken |= cells
    assert len({panel["id"] for panel in panels()}) == len(panels())
