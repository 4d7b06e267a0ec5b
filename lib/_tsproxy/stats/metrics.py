"""The fields of the `metrics` line: the shared counters, named in Envoy's style. Reads only. Knows nothing of the interval."""

from __future__ import annotations

from typing import Dict, Iterable, NamedTuple, Sequence, Tuple

from _tsproxy.stats import counters, histogram
from _tsproxy.stats.counters import Counter, SharedCounters

_COUNTERS = {
    "downstream_cx_total": Counter.ACCEPTED,
    "downstream_cx_overflow": Counter.OVERFLOW,
    "downstream_cx_denied": Counter.DENIED,
    "downstream_client_cx_overflow": Counter.CLIENT_OVERFLOW,
    # Read acknowledged bytes before received ones: workers go on counting, and acknowledged must not exceed received.
    "downstream_cx_tx_bytes_total": Counter.ACKNOWLEDGED_DOWNSTREAM,
    "upstream_cx_tx_bytes_total": Counter.ACKNOWLEDGED_UPSTREAM,
    "downstream_cx_rx_bytes_total": Counter.RECEIVED_DOWNSTREAM,
    "upstream_cx_total": Counter.CONNECTS,
    "upstream_cx_rx_bytes_total": Counter.RECEIVED_UPSTREAM,
    "upstream_cx_connect_fail": Counter.CONNECT_FAIL,
    "upstream_cx_connect_timeout": Counter.CONNECT_TIMEOUT,
    "downstream_cx_timestamps_total": Counter.DOWNSTREAM_TIMESTAMPS,
    "upstream_cx_timestamps_total": Counter.UPSTREAM_TIMESTAMPS,
    "upstream_cx_policy_refused_total": Counter.POLICY_REFUSED,
    "upstream_cx_policy_ended_total": Counter.POLICY_ENDED,
    "downstream_flow_control_paused_reading_total": Counter.PAUSED_DOWNSTREAM,
    "upstream_flow_control_paused_reading_total": Counter.PAUSED_UPSTREAM,
    "cx_reset_by_peer_total": Counter.RESET_BY_PEER,
    "idle_timeout_total": Counter.IDLE_TIMEOUT,
    "internal_errors_total": Counter.BUGS,
    "log_lines_dropped_total": Counter.LINES_DROPPED,
    "worker_restarts_total": Counter.WORKER_RESTARTS,
    "downstream_cx_lost_with_worker_total": Counter.LOST_WITH_WORKER,
    "upstream_segments_sent": Counter.SEGMENTS_SENT,
    "upstream_segments_received": Counter.SEGMENTS_RECEIVED,
}

OF_PROCESS = frozenset({"log_lines_dropped_total", "worker_restarts_total"})
"""What is of no route."""

HISTOGRAMS = {
    "connect_us": (counters.CONNECT, histogram.LIMITS_US),
    "relay_us": (counters.RELAY, histogram.LIMITS_US),
    "loop_lag_us": (counters.LOOP_LAG, histogram.COARSE_US),
}
"""Index of each histogram in a worker's row, and the limits of its `le` fields."""


OF_ROUTE = ("connect_us", "relay_us")
"""The histograms of a route; a loop serves many."""


def totals(shared_counters: SharedCounters) -> Dict[str, int]:
    """Each counter since the start, and the two gauges, which are differences of counters."""
    total = shared_counters.total
    fields = {name: total(counter) for name, counter in _COUNTERS.items()}
    fields["downstream_cx_active"] = active(shared_counters)
    ended = total(Counter.CONNECTS_ENDED)  # read before CONNECTS, or the gauge could be negative
    fields["upstream_cx_active"] = total(Counter.CONNECTS) - ended
    return fields


class Reading(NamedTuple):
    """What some counters have counted, read once, so that a sum over routes is that of their lines."""

    totals: Dict[str, int]
    histograms: Dict[str, Tuple[histogram.Counts, int]]  # and the longest time in nanoseconds


def read(shared_counters: SharedCounters) -> Reading:
    """All that is in them. Of a histogram the counts before the maximum: a worker writes that first."""
    found = {
        name: (shared_counters.histogram(start), shared_counters.longest_ns(start)) for name, (start, _) in HISTOGRAMS.items()
    }
    return Reading(totals(shared_counters), found)


def added(several: Sequence[Reading]) -> Reading:
    """The sum of some readings, by name."""
    return Reading(
        {name: sum([reading.totals[name] for reading in several]) for name in several[0].totals},
        {name: _merged([reading.histograms[name] for reading in several]) for name in HISTOGRAMS},
    )


def _merged(several: Sequence[Tuple[histogram.Counts, int]]) -> Tuple[histogram.Counts, int]:
    return histogram.merged([counts for counts, _ in several]), max(longest_ns for _, longest_ns in several)


def without_process(fields: Dict[str, int]) -> Dict[str, int]:
    """Those that a route has."""
    return {name: value for name, value in fields.items() if name not in OF_PROCESS}


def active(shared_counters: SharedCounters) -> int:
    """Client connections that are open."""
    ended = shared_counters.total(Counter.ENDED)
    return shared_counters.total(Counter.ACCEPTED) - ended


def latencies(reading: Reading, names: Iterable[str] = tuple(HISTOGRAMS)) -> Dict[str, object]:
    """The fields of these histograms."""
    fields: Dict[str, object] = {}
    for name in names:
        fields.update(histogram.summary(name, *reading.histograms[name], HISTOGRAMS[name][1]))
    return fields
