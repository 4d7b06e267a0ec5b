"""`generate alloy`: the lines from a file, as OpenTelemetry log records over OTLP."""

from __future__ import annotations

from typing import Iterator

from _tsproxy.tools.generate import fields
from _tsproxy.tools.generate.text import fill_shipper

_CONF = """\
// tsproxy @VERSION@: its lines through Grafana Alloy, as OpenTelemetry. What is called what: tsproxy.py generate fields
//
// Make:   tsproxy.py generate alloy > /etc/alloy/tsproxy.alloy        and set the address of the backend below
// Try:    alloy fmt /etc/alloy/tsproxy.alloy; alloy validate /etc/alloy/tsproxy.alloy; systemctl restart alloy
// Look:   http://127.0.0.1:12345/graph; in Loki, which takes OTLP: {service_name="tsproxy"} | severity_text="error"
// Undo:   rm /etc/alloy/tsproxy.alloy; systemctl restart alloy
//
// In: a file (tsproxy ... >>@LINES_FILE@; tsproxy.py generate logrotate keeps it small), or journald with
// loki.source.journal "tsproxy" { matches = "_SYSTEMD_UNIT=tsproxy.service" ... }.
// Out: OTLP over HTTP, by components that are generally available. ParseJSON() makes doubles of numbers; those with a
// standard name are made whole again. The body is the message where there is one, else the line.
loki.source.file "tsproxy" {
  targets    = [{__path__ = "@LINES_FILE@"}]
  forward_to = [otelcol.receiver.loki.tsproxy.receiver]
}

otelcol.receiver.loki "tsproxy" {
  output {
    logs = [otelcol.processor.transform.tsproxy.input]
  }
}

otelcol.processor.transform "tsproxy" {
  error_mode = "ignore"

  log_statements {
    context    = "resource"
    statements = [`set(attributes["service.name"], "tsproxy")`]
  }

  log_statements {
    context    = "log"
    conditions = [`IsMatch(body, "^\\\\{\\"timestamp\\":")`]
    statements = [
@STATEMENTS@
    ]
  }

  output {
    logs = [otelcol.processor.batch.tsproxy.input]
  }
}

otelcol.processor.batch "tsproxy" {
  output {
    logs = [otelcol.exporter.otlphttp.tsproxy.input]
  }
}

otelcol.exporter.otlphttp "tsproxy" {
  client {
    endpoint = "http://127.0.0.1:4318"
  }
}
"""


def text() -> str:
    """A file for /etc/alloy."""
    return fill_shipper(_CONF, STATEMENTS="\n".join(f"      `{line}`," for line in _statements()))


def _statements() -> Iterator[str]:
    """OTTL: the line into the cache, what has a name out of it, the rest under tsproxy."""
    yield 'merge_maps(cache, ParseJSON(body), "upsert")'
    yield 'set(time, Time(cache["timestamp"], "%Y-%m-%dT%H:%M:%S.%fZ"))'
    yield 'set(severity_text, cache["level"])'
    for level, number in fields.SEVERITIES.items():
        yield f'set(severity_number, {number}) where cache["level"] == "{level}"'
    yield 'set(event_name, Concat(["tsproxy", cache["event"]], "."))'
    yield 'set(attributes["network.transport"], "tcp") where cache["event"] == "connection"'
    yield 'set(body, cache["message"]) where cache["message"] != nil'
    for field, names in fields.otel_attributes():
        yield from (_move(field, name) for name in names)
    gone = ["timestamp", "level", "event", "message", *(field for field, _ in fields.otel_attributes())]
    yield from (f'delete_key(cache, "{field}")' for field in gone)
    yield 'flatten(cache, "tsproxy")'
    yield 'merge_maps(attributes, cache, "upsert")'


def _move(field: str, name: str) -> str:
    value = f'cache["{field}"]'
    whole = f"Int({value})" if field == "pid" or field.endswith("_port") else value
    return f'set(attributes["{name}"], {whole}) where {value} != nil'
