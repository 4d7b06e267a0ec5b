"""`generate fields`: what each field of the lines is called in ECS and in OpenTelemetry.

The names are those of the Elastic Common Schema (the same in 8.11 and 9.4) and of OpenTelemetry's log data model and
semantic conventions (1.40 and 1.44). What one of them has no name for is called `tsproxy.` and its own name there.
"""

from __future__ import annotations

import json
from typing import Dict, Iterator, List, Mapping, NamedTuple, Tuple

from _tsproxy.stats.metrics import HISTOGRAMS

ECS_VERSION = "8.11.0"
SEVERITIES = {"debug": 5, "info": 9, "warning": 13, "error": 17}  # OpenTelemetry's SeverityNumber


class Names(NamedTuple):
    """What one field is called elsewhere; under `scale`, by what ECS has it multiplied."""

    ecs: Tuple[str, ...] = ()
    otel: Tuple[str, ...] = ()
    scale: int = 1


STANDARD: Mapping[str, Names] = {
    "timestamp": Names(("@timestamp",), ("Timestamp",)),
    "level": Names(("log.level",), ("SeverityText", "SeverityNumber")),
    "event": Names(("event.action",), ("EventName",)),
    "message": Names(("message",), ("Body",)),
    "pid": Names(("process.pid",), ("process.pid",)),
    "version": Names(("service.version",), ("service.version",)),
    "python": Names((), ("process.runtime.version",)),
    "listen_address": Names((), ("network.local.address",)),
    "listen_port": Names((), ("network.local.port",)),
    "client_address": Names(("source.ip", "client.ip"), ("client.address",)),
    "client_port": Names(("source.port", "client.port"), ("client.port",)),
    "upstream_address": Names(("destination.ip", "server.ip"), ("server.address", "network.peer.address")),
    "upstream_port": Names(("destination.port", "server.port"), ("server.port", "network.peer.port")),
    "duration_us": Names(("event.duration",), (), 1000),  # ECS wants nanoseconds
    "rx_bytes": Names(("source.bytes", "client.bytes"), ()),
    "tx_bytes": Names(("destination.bytes", "server.bytes"), ()),
    "reason": Names(("event.reason",), ()),
}
"""The fields that have a name of their own there."""


def _histograms() -> Iterator[str]:
    for name, (_, limits_us) in HISTOGRAMS.items():
        yield from (
            f"{name}_{part}" for part in ("p50", "p99", "p999", "max", *(f"le_{limit}" for limit in limits_us), "count")
        )


EVENTS: Mapping[str, Tuple[str, ...]] = {
    "every line": ("timestamp", "level", "event", "pid"),
    "start": (
        *("routes", "version", "listen_address", "listen_port", "listeners", "targets", "upstream_addresses", "timestamps"),
        *("static_timestamp", "witness", "workers", "runtime", "python", "json_encoder", "knobs", "limits"),
    ),
    "route": (
        *("route", "listen_address", "listen_port", "listeners", "targets", "upstream_addresses", "timestamps"),
        *("static_timestamp", "witness", "knobs", "limits"),
    ),
    "reload": ("added", "removed", "changed", "unchanged", "message"),
    "connection": (
        *("connection_id", "worker", "client_address", "client_port", "upstream_address", "upstream_port"),
        *("upstream_local_address", "upstream_local_port", "duration_us", "connect_us", "rx_bytes", "tx_bytes"),
        *("upstream_tx_bytes", "discarded_bytes", "unacknowledged_bytes", "client_timestamps"),
        *("client_syn_tsval", "upstream_timestamps", "upstream_rtt_us", "upstream_retransmits"),
        *("upstream_segments_sent", "upstream_segments_received", "reason", "termination_state", "witness", "route"),
    ),
    "metrics": (
        *("route", "start_time", "uptime_s", "interval_s", "downstream_cx_total", "downstream_cx_overflow"),
        *("downstream_client_cx_overflow", "downstream_cx_denied", "downstream_cx_rx_bytes_total"),
        *("upstream_cx_total", "upstream_cx_rx_bytes_total"),
        *("upstream_cx_connect_fail", "upstream_cx_connect_timeout", "downstream_cx_timestamps_total"),
        *("upstream_cx_timestamps_total", "upstream_cx_policy_refused_total", "upstream_cx_policy_ended_total"),
        *("downstream_flow_control_paused_reading_total", "upstream_flow_control_paused_reading_total"),
        *("cx_reset_by_peer_total", "idle_timeout_total", "internal_errors_total", "log_lines_dropped_total"),
        *("worker_restarts_total", "downstream_cx_lost_with_worker_total"),
        *("downstream_cx_tx_bytes_total", "upstream_cx_tx_bytes_total"),
        *("upstream_segments_sent", "upstream_segments_received"),
        *("downstream_cx_active", "upstream_cx_active", "rx_bytes_per_s", "tx_bytes_per_s"),
        *("upstream_segments_per_s", "upstream_segments_per_s_max"),
        *_histograms(),
    ),
    "warning": ("message", "worker", "route"),
    "error": ("message", "worker", "route"),
    "timestamps_drift": ("message", "route"),
    "resolve": ("message", "route"),
    "drain": ("active_connections", "drain_timeout_s"),
    "stop": ("reason", "drained", "killed_connections", "uptime_s"),
}
"""The fields of each line. `routes`, `route` and `reload` lines, and metrics lines whose `route` is null, are of --routes."""

OF_PROCESS = (
    *("internal_errors_total", "log_lines_dropped_total", "worker_restarts_total"),
    *("downstream_cx_lost_with_worker_total", "loop_lag_us"),
)
"""What is asked of the process and of no route: it is of a worker, a loop or the reporter, though a route may know its part."""

ADDED: Mapping[str, Mapping[str, object]] = {
    "every line": {
        "ecs.version": ECS_VERSION,
        "service.name": "tsproxy",
        "event.module": "tsproxy",
        "event.dataset": "tsproxy. and the event",
        "event.kind": "metric for metrics, else event",
    },
    "connection": {
        "event.category": ["network"],
        "event.type": ["connection", "end"],
        "network.transport": "tcp",
        "network.bytes": "rx_bytes + tx_bytes",
    },
}
"""What ECS wants besides; OpenTelemetry has service.name (of the resource) and network.transport of these."""


def ecs() -> Iterator[Tuple[str, Names]]:
    """The fields that have names in ECS, apart from those that each shipper has a way of its own for."""
    own = ("timestamp", "event")
    return ((field, names) for field, names in STANDARD.items() if names.ecs and field not in own)


def otel_attributes() -> Iterator[Tuple[str, Tuple[str, ...]]]:
    """The fields that become attributes of an OpenTelemetry log record under standard names."""
    return ((field, names.otel) for field, names in STANDARD.items() if names.otel and names.otel[0].islower())


def text() -> str:
    """The map as one JSON object, a field a line: for eyes, for jq, for an index template."""
    rows = ",\n".join(f"    {json.dumps(row)}" for row in _rows())
    added = json.dumps(ADDED)
    return f'{{\n  "ecs_version": "{ECS_VERSION}",\n  "fields": [\n{rows}\n  ],\n  "ecs_added": {added}\n}}\n'


def _rows() -> Iterator[Dict[str, object]]:
    events: Dict[str, List[str]] = {}
    for event, names in EVENTS.items():
        for name in names:
            events.setdefault(name, []).append(event)
    for field, where in events.items():
        known, custom = STANDARD.get(field, Names()), (f"tsproxy.{field}",)
        row: Dict[str, object] = {"field": field, "lines": where, "ecs": known.ecs or custom, "otel": known.otel or custom}
        yield row if known.scale == 1 else {**row, "ecs_scale": known.scale}
