"""`generate prometheus`: the fields of the metrics lines as Prometheus' metrics, by a program for mtail, and alerts on them.

Knows which field becomes which metric. Knows nothing of the alerts and the dashboard, which name some of them.
"""

from __future__ import annotations

from typing import Iterator, NamedTuple, Sequence, Tuple

from _tsproxy.stats.metrics import HISTOGRAMS
from _tsproxy.tools.generate import fields, templates

_GAUGES = ("downstream_cx_active", "upstream_cx_active", "upstream_segments_per_s_max")
_COMPUTED = ("_time", "uptime_s", "interval_s", "_per_s")  # how the names end of what Prometheus computes itself


class Metric(NamedTuple):
    """Where a field goes: declared as "counter tsproxy_name by route", say, and set to `value`; $1 is what `number` finds."""

    field: str
    declared: str
    name: str
    number: str = r"\d+"
    value: str = "$1"

    @property
    def reading(self) -> str:
        """The statement for mtail. A route's gauge would stay as it was when the route was removed."""
        forget = f"  del {self.name} after 15m\n" if self.declared.startswith("gauge") and "[" in self.name else ""
        return f'/"{self.field}":({self.number})/ {{\n  {self.name} = {self.value}\n{forget}}}'


def text() -> str:
    """The program for mtail and the rules, each under a heading that names its file."""
    of_process, of_route = (list(metrics(is_of_route)) for is_of_route in (False, True))
    declared = "\n".join(dict.fromkeys(metric.declared for metric in (*of_process, *of_route)))
    program = templates.fill("tsproxy.mtail", METRICS=declared, OF_PROCESS=_readings(of_process), OF_ROUTE=_readings(of_route))
    parts = {"/etc/mtail/tsproxy.mtail": program, "/etc/prometheus/tsproxy.rules.yml": templates.fill("prometheus-rules.yaml")}
    return templates.in_parts(templates.fill("prometheus.txt"), parts)


def metrics(is_of_route: bool) -> Iterator[Metric]:
    """Each metric that comes from a field of the metrics lines: those of a route, or those of the process."""
    by, at = (" by route", "[$route]") if is_of_route else ("", "")
    of_histograms = tuple(f"{name}_" for name in HISTOGRAMS)
    for field in fields.EVENTS["metrics"]:
        if field == "route" or field.endswith(_COMPUTED) or field.startswith(of_histograms):
            continue
        if is_of_route is (field in fields.OF_PROCESS):
            continue
        kind = "gauge" if field in _GAUGES else "counter"
        name = f"tsproxy_{field}" if field in _GAUGES or field.endswith("_total") else f"tsproxy_{field}_total"
        yield Metric(field, f"{kind} {name}{by}", f"{name}{at}")
    for field, (_, limits_us) in HISTOGRAMS.items():
        if is_of_route is (field not in fields.OF_PROCESS):
            yield from _histogram(field, limits_us, is_of_route)


def _histogram(field: str, limits_us: Tuple[int, ...], is_of_route: bool) -> Iterator[Metric]:
    """Cumulative buckets as they are in the line, and what was the most: not since the last look, but the start."""
    name = f"tsproxy_{field[: -len('_us')]}_seconds"
    by, at = ("route, le", "[$route]") if is_of_route else ("le", "")
    edges = [(f"le_{limit}", repr(limit / 1e6)) for limit in limits_us]
    for part, edge in [*edges, ("count", "+Inf")]:
        yield Metric(f"{field}_{part}", f"counter {name}_bucket by {by}", f'{name}_bucket{at}["{edge}"]')
    most = f"gauge {name}_max by route" if is_of_route else f"gauge {name}_max"
    yield Metric(f"{field}_max", most, f"{name}_max{at}", r"\d+\.?\d*", "$1 / 1000000.0")


def _readings(metrics: Sequence[Metric]) -> str:
    return "\n".join(metric.reading for metric in metrics)
