"""The verdict as JSON: one flat object a flow, and one at the end.

Knows the fields' names. Knows nothing of how they came about.
"""

from __future__ import annotations

from typing import Any, Dict, Optional

from _tsproxy.stats import encoder
from _tsproxy.tools.audit.flows import Direction
from _tsproxy.tools.audit.observer import Learned
from _tsproxy.tools.audit.report import Report

Fields = Dict[str, Any]


def of_flow(flow: Direction, verdict: str, clock: Optional[Learned]) -> Fields:
    """A judged flow; what its clock tells is null where nothing can be told."""
    return {
        "event": "flow",
        "source": flow.source,
        "source_port": flow.source_port,
        "destination": flow.destination,
        "destination_port": flow.destination_port,
        "segments": flow.segments,
        "segments_with_timestamps": flow.segments_with_timestamps,
        "segments_cut": flow.segments_cut,
        "syn_seen": flow.syn_seen,
        "syn_ack_seen": flow.syn_ack_seen,
        "first_leak_frame": flow.first_leak_frame,
        "first_leak_file": flow.first_leak_file,
        "verdict": verdict,
        "span_s": flow.span_ns / 1e9,
        **{name: getattr(clock, name, None) for name in CLOCK_FIELDS},
    }


CLOCK_FIELDS = ("clock_hz", "clock_hz_low", "clock_hz_high", "clock_class", "clock_group", "skew_ppm", "skew_ppm_error")


def of_end(report: Report) -> Fields:
    """All flows together."""
    judged = report.judged
    unparsed = report.unparsed
    return {
        "event": "audit",
        "verdict": report.verdict,
        "files": report.files,
        "frames": report.frames,
        "flows": len(judged),
        "senders": len(report.senders),
        "segments": sum(flow.segments for flow in judged),
        "segments_with_timestamps": sum(flow.segments_with_timestamps for flow in judged),
        "judged_from": list(report.scope.judged_from),
        "judged_to": list(report.scope.judged_to),
        "reported_drops": report.drops,
        "unparsed": sum(unparsed.values()),
        **{f"unparsed_{kind}": count for kind, count in sorted(unparsed.items())},
        **(report.agreement.counts if report.agreement else {}),
    }


def line(fields: Fields) -> bytes:
    """One line, not cut to a pipe's atomic write: who asked reads all of it."""
    encode = encoder.with_orjson if encoder.ENCODER == "orjson" else encoder.with_json
    return encode(fields) + b"\n"
