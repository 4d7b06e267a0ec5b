"""`generate prometheus`: the fields of the metrics lines as Prometheus' metrics, by a program for mtail, and alerts on them.

Knows which field becomes which metric. Knows nothing of the alerts and the dashboard, which name some of them.
"""

from __future__ import annotations

from typing import Iterator, NamedTuple, Tuple

from _tsproxy.stats.metrics import HISTOGRAMS
from _tsproxy.tools.generate import fields, templates

_GAUGES = ("downstream_cx_active", "upstream_cx_active")
_COMPUTED = ("start_time", "uptime_s", "interval_s", "rx_bytes_per_s", "tx_bytes_per_s")  # by Prometheus itself


class Metric(NamedTuple):
    """Where a field goes: declared as "counter tsproxy_name by le", say, and set to `value`, $1 being what `number` finds."""

    field: str
    declared: str
    name: str
    number: str = r"\d+"
    value: str = "$1"


def text() -> str:
    """The program for mtail and the rules, each under a heading that names its file."""
    made = list(metrics())
    declared = "\n".join(dict.fromkeys(metric.declared for metric in made))
    program = templates.fill("tsproxy.mtail", METRICS=declared, READINGS="\n".join(map(_reading, made)))
    parts = {"/etc/mtail/tsproxy.mtail": program, "/etc/prometheus/tsproxy.rules.yml": templates.fill("prometheus-rules.yaml")}
    return templates.in_parts(templates.fill("prometheus.txt"), parts)


def metrics() -> Iterator[Metric]:
    """Each metric that comes from a field of the metrics lines."""
    made_of_histograms = tuple(f"{name}_" for name in HISTOGRAMS)
    for field in fields.EVENTS["metrics"]:
        if field in _GAUGES:
            yield Metric(field, f"gauge tsproxy_{field}", f"tsproxy_{field}")
        elif field not in (*_COMPUTED, "route") and not field.startswith(made_of_histograms):
            name = f"tsproxy_{field}" if field.endswith("_total") else f"tsproxy_{field}_total"
            yield Metric(field, f"counter {name}", name)
    for field, (_, limits_us) in HISTOGRAMS.items():
        yield from _histogram(field, limits_us)


def _histogram(field: str, limits_us: Tuple[int, ...]) -> Iterator[Metric]:
    """Cumulative buckets as they are in the line, and what was the most: not since the last look, but the start."""
    name = f"tsproxy_{field[: -len('_us')]}_seconds"
    edges = [(f"le_{limit}", repr(limit / 1e6)) for limit in limits_us]
    for part, edge in [*edges, ("count", "+Inf")]:
        yield Metric(f"{field}_{part}", f"counter {name}_bucket by le", f'{name}_bucket["{edge}"]')
    yield Metric(f"{field}_max", f"gauge {name}_max", f"{name}_max", r"\d+\.?\d*", "$1 / 1000000.0")


def _reading(metric: Metric) -> str:
    return f'/"{metric.field}":({metric.number})/ {{\n  {metric.name} = {metric.value}\n}}'
