"""`generate prometheus` and `grafana`: mtail makes of real lines what they say, alerts fire, the dashboard asks what exists."""

from __future__ import annotations

import json
import re
import socket
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Set, Tuple

import pytest
from _tsproxy.tools.generate import fields
from harness import Exchange, Line, Proxy, receive_exactly, reset
from shippers import find, generated

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


def series_of(field: str) -> Optional[str]:
    """What a field of a metrics line is called in Prometheus; None for the route, and for what Prometheus computes."""
    if field.endswith(("_p50", "_p99", "_p999", "_per_s", "_time", "uptime_s", "interval_s", "route")):
        return None
    histogram = re.fullmatch(r"(\w+)_us_(?:le_(\d+)|(max|count))", field)
    if histogram:
        edge = "+Inf" if histogram[3] else f"{int(histogram[2]) / 1e6:.12g}"
        return f"tsproxy_{histogram[1]}_seconds" + ("_max" if histogram[3] == "max" else f'_bucket{{le="{edge}"}}')
    return f"tsproxy_{field}" + ("" if field.endswith(("_total", "_active")) else "_total")


def test_mtail_exposes_each_number_of_the_last_metrics_line(home: Path, lines: List[Line]) -> None:
    last = [line for line in lines if line["event"] == "metrics"][-1]
    assert last["downstream_cx_total"] == 4
    wanted: Dict[str, float] = {}
    for field, value in last.items():
        name = series_of(field)
        if name and value is not None and field not in fields.EVENTS["every line"]:
            wanted[name] = value / 1e6 if name.endswith("_seconds_max") else value
    exposed = by_mtail(home, lines)
    assert {name: value for name, value in exposed.items() if name in wanted} == pytest.approx(wanted)
    others = {name.partition("{")[0] for name in exposed.keys() - wanted.keys()}
    own = {"start_timestamp_seconds", "metrics_timestamp_seconds", "timestamps_drift", "connections_ended_total"}
    assert others == {f"tsproxy_{name}" for name in own}


def test_mtail_counts_the_ends_of_connections_by_reason(home: Path, lines: List[Line]) -> None:
    assert {name: count for name, count in by_mtail(home, lines).items() if "connections" in name} == {
        'tsproxy_connections_ended_total{reason="closed",termination_state="--"}': 3,
        'tsproxy_connections_ended_total{reason="client_reset",termination_state="CD"}': 1,
    }


DRIFT = {"timestamp": "2026-11-22T14:30:43.399836Z", "level": "error", "event": "timestamps_drift", "pid": 1, "message": "x"}


@pytest.mark.parametrize(("levels", "drifting"), [(["error"], 1), (["error", "info"], 0), (["info", "error"], 1)])
def test_mtail_knows_whether_the_policy_holds(home: Path, levels: List[str], drifting: int) -> None:
    exposed = by_mtail(home, [{**DRIFT, "level": level} for level in levels])
    assert exposed["tsproxy_timestamps_drift"] == drifting


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


def after_12_minutes(fires: List[str], **unusual: str) -> Dict[str, object]:
    """A test for promtool: these alerts, and no other, fire for a tsproxy that is well but for these series."""
    usual = dict.fromkeys(re.findall(r"^(?:counter|gauge) (\w+)$", files()[PROGRAM], re.M), "0x30")
    series = {**usual, "tsproxy_metrics_timestamp_seconds": "0+60x30", **unusual}
    assert series.keys() == usual.keys()
    wanted = [{"labels": f'{{alertname="{alert}"}}', "value": 1} for alert in fires]
    look = {"expr": 'sum by (alertname) (ALERTS{alertstate="firing"})', "eval_time": "12m", "exp_samples": wanted}
    inputs = [{"series": f'{name}{{instance="h"}}', "values": values} for name, values in series.items()]
    return {"interval": "1m", "input_series": inputs, "promql_expr_test": [look]}


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
    made = set(re.findall(r"^(?:counter|gauge) (\w+)", files()[PROGRAM], re.M))
    asked = {name for query in queries() for name in re.findall(r"tsproxy_\w+", query)}
    assert asked <= made
    assert {name for name in made - asked if "timestamps_total" not in name} == {
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
