"""`generate vector`: the lines from a file or standard input, as ECS and as OpenTelemetry log records."""

from __future__ import annotations

import json
from typing import Dict, Iterator

from _tsproxy.tools.generate import fields
from _tsproxy.tools.generate.text import fill, fill_shipper

_CONF = """\
# tsproxy @VERSION@: its lines through Vector, in ECS or as OpenTelemetry. What is called what: tsproxy.py generate fields
#
# Make:   mkdir -p @DIR@
#         tsproxy.py generate vector > /etc/vector/tsproxy.yaml
# Try:    vector validate --no-environment /etc/vector/tsproxy.yaml
#         vector --config /etc/vector/tsproxy.yaml
# Look:   tail -f @ECS_FILE@
# Undo:   rm /etc/vector/tsproxy.yaml; systemctl restart vector
#
# In: a file (tsproxy ... >>@LINES_FILE@; tsproxy.py generate logrotate keeps it small), or a pipe
# (tsproxy ... | vector --config ...) with "type: stdin" alone as the source, or journald with "type: journald" and
# "include_units: [tsproxy.service]".
# Out: a file; an elasticsearch sink (mode: data_stream) may stand in its place with the input tsproxy_ecs, an
# opentelemetry sink with the input tsproxy_otel.
# A line that is not JSON comes out too, as event.kind pipeline_error with the message.
sources:
  tsproxy_lines:
    type: file
    include:
      - @LINES_FILE@

transforms:
  tsproxy_ecs:
    type: remap
    inputs: [tsproxy_lines]
    source: |
@ECS@

  tsproxy_otel:
    type: remap
    inputs: [tsproxy_lines]
    source: |
@OTEL@

sinks:
  tsproxy_out:
    type: file
    inputs: [tsproxy_ecs]
    path: @ECS_FILE@
    encoding:
      codec: json
"""

_ECS = """\
text = .message
. = @GROUPS@
line, problem = parse_json(text)
if problem == null && is_object(line) {
  line = object!(line)
  name = string!(line.event)
  .event.action = name
  .event.dataset = "tsproxy." + name
  .event.kind = "event"
  if name == "metrics" { .event.kind = "metric" }
  if name == "connection" {
    .event.category = ["network"]
    .event.type = ["connection", "end"]
    .network.transport = "tcp"
    .network.bytes = int!(line.rx_bytes) + int!(line.tx_bytes)
  }
  ."@timestamp" = parse_timestamp!(line.timestamp, "%+")
  del(line.event)
  del(line.timestamp)
@MOVES@
  .tsproxy = line
} else {
  .event.kind = "pipeline_error"
  .message = text
}
.ecs.version = "@ECS_VERSION@"
.event.module = "tsproxy"
.service.name = "tsproxy"
. = compact(., recursive: true, string: false, array: false, object: true)
"""

_OTEL = """\
record = {"severityText": "error", "severityNumber": @ERROR@, "body": {"stringValue": .message}}
attributes = {}
line, problem = parse_json(.message)
if problem == null && is_object(line) {
  line = compact(object!(line), recursive: false, string: false, array: false, object: false)
  numbers = @SEVERITIES@
  record = {
    "timeUnixNano": to_string(to_unix_timestamp(parse_timestamp!(line.timestamp, "%+"), unit: "nanoseconds")),
    "severityText": line.level,
    "severityNumber": get!(numbers, [line.level]),
    "eventName": "tsproxy." + string!(line.event),
  }
  if exists(line.message) { record.body = {"stringValue": line.message} }
  if line.event == "connection" { attributes."network.transport" = "tcp" }
  for_each(["timestamp", "level", "event", "message"]) -> |_index, name| { line = object!(remove!(line, [name])) }
@MOVES@
  for_each(line) -> |name, value| { attributes = set!(attributes, ["tsproxy." + name], value) }
}
list = []
for_each(attributes) -> |name, value| {
  typed = {"stringValue": value}
  if is_boolean(value) { typed = {"boolValue": value} }
  if is_integer(value) { typed = {"intValue": to_string!(value)} }
  if is_float(value) { typed = {"doubleValue": value} }
  if is_array(value) {
    typed = {"arrayValue": {"values": map_values(array!(value)) -> |item| { {"stringValue": item} }}}
  }
  list = push(list, {"key": name, "value": typed})
}
record.attributes = list
resource = {"attributes": [{"key": "service.name", "value": {"stringValue": "tsproxy"}}]}
. = {"resourceLogs": [{"resource": resource, "scopeLogs": [{"scope": {"name": "tsproxy"}, "logRecords": [record]}]}]}
"""


def text() -> str:
    """A configuration of its own, or a part of one."""
    return fill_shipper(
        _CONF,
        ECS=_indented(_ecs()),
        OTEL=_indented(_otel()),
    )


def _ecs() -> str:
    groups: Dict[str, Dict[str, str]] = {group: {} for group in ("ecs", "event", "network", "service")}
    groups.update((name.partition(".")[0], {}) for _, names in fields.ecs() for name in names.ecs if "." in name)
    moves = "\n".join(_ecs_moves())
    return fill_shipper(_ECS, GROUPS=json.dumps(groups), MOVES=moves)


def _otel() -> str:
    severities = json.dumps(fields.SEVERITIES)
    return fill(_OTEL, MOVES="\n".join(_otel_moves()), SEVERITIES=severities, ERROR=fields.SEVERITIES["error"])


def _ecs_moves() -> Iterator[str]:
    for field, names in fields.ecs():
        value = f"int!(line.{field}) * {names.scale}" if names.scale != 1 else f"line.{field}"
        sets = "; ".join(f".{name} = {value}" for name in names.ecs)
        yield f"  if exists(line.{field}) {{ {sets}; del(line.{field}) }}"


def _otel_moves() -> Iterator[str]:
    for field, names in fields.otel_attributes():
        sets = "; ".join(f'attributes."{name}" = line.{field}' for name in names)
        yield f"  if exists(line.{field}) {{ {sets}; del(line.{field}) }}"


def _indented(program: str) -> str:
    return "\n".join(f"      {line}" if line else "" for line in program.rstrip("\n").splitlines())
