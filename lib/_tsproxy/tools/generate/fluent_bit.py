"""`generate fluent-bit`: the lines from a file, as ECS, by a filter in Lua."""

from __future__ import annotations

import os
from typing import Iterator

from _tsproxy.tools.generate import fields
from _tsproxy.tools.generate.text import ECS_FILE, fill_shipper

_CONF = """\
# tsproxy @VERSION@: its lines through Fluent Bit 3.2 or later, in ECS. What is called what: tsproxy.py generate fields
#
# Make:   mkdir -p @DIR@
#         tsproxy.py generate fluent-bit > /etc/fluent-bit/tsproxy.yaml
# Try:    fluent-bit --dry-run --config /etc/fluent-bit/tsproxy.yaml
#         fluent-bit --config /etc/fluent-bit/tsproxy.yaml
# Look:   tail -f @ECS_FILE@
# Undo:   rm /etc/fluent-bit/tsproxy.yaml; systemctl restart fluent-bit
#
# In: a file (tsproxy ... >>@LINES_FILE@; tsproxy.py generate logrotate keeps it small). Add "db: FILE" for a
# position that outlives a restart. Not its stdin input: tried with 5.1.1, nothing came out of some larger reads.
# Out: a file; es, opensearch, kafka or http may stand in its place. The record's time is that of the line.
# A line that is not JSON comes out too, as event.kind pipeline_error with the message.
# Lua's numbers are exact up to 2^53.
parsers:
  - name: tsproxy
    format: json
    time_key: timestamp
    time_format: "%Y-%m-%dT%H:%M:%S.%L%z"
    time_keep: true
pipeline:
  inputs:
    - name: tail
      path: @LINES_FILE@
      read_from_head: true
      tag: tsproxy
      parser: tsproxy
  filters:
    - name: lua
      match: tsproxy
      call: tsproxy
      time_as_table: true
      code: |
        local function put(out, group, name, value)
          out[group] = out[group] or {}
          out[group][name] = value
        end
        function tsproxy(tag, time, line)
          local out = {ecs = {version = "@ECS_VERSION@"}, service = {name = "tsproxy"}, event = {module = "tsproxy"}}
          local event = line.event
          if event == nil then
            out.event.kind = "pipeline_error"
            out.message = line.log
            return 1, time, out
          end
          out.event.kind = event == "metrics" and "metric" or "event"
          out.event.action = event
          out.event.dataset = "tsproxy." .. event
          if event == "connection" then
            out.event.category = {"network"}
            out.event.type = {"connection", "end"}
            out.network = {transport = "tcp", bytes = line.rx_bytes + line.tx_bytes}
          end
          out["@timestamp"] = line.timestamp
          line.timestamp, line.event = nil, nil
@MOVES@
          out.tsproxy = line
          return 1, time, out
        end
  outputs:
    - name: file
      match: tsproxy
      path: @DIR@
      file: @ECS_BASE@
      format: plain
"""


def text() -> str:
    """A configuration of its own, or a part of one."""
    return fill_shipper(
        _CONF,
        ECS_BASE=os.path.basename(ECS_FILE),
        MOVES="\n".join(f"          {move}" for move in _moves()),
    )


def _moves() -> Iterator[str]:
    """A field that is nil makes no group."""
    for field, names in fields.ecs():
        value = f"line.{field} * {names.scale}" if names.scale != 1 else f"line.{field}"
        sets = " ".join(_put(name, value) for name in names.ecs)
        yield f"if line.{field} ~= nil then {sets} end line.{field} = nil"


def _put(name: str, value: str) -> str:
    group, _, rest = name.partition(".")
    return f'put(out, "{group}", "{rest}", {value})' if rest else f"out.{name} = {value}"
