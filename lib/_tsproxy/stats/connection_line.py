"""The `connection` line of a record, by a template, which is faster than a dict and an encoder.

Knows the names and the order of the fields. Knows nothing of who writes the line. All texts in it are addresses or this
program's own words, so none needs an escape (RFC 8259, section 7), and a line is never longer than 1,500 bytes.
"""

from __future__ import annotations

from typing import Tuple

from _tsproxy.linux.addresses import ip_and_port
from _tsproxy.stats.endings import ENDING_FIELDS
from _tsproxy.stats.records import ConnectionRecord

NAMES = (
    "connection_id",
    "worker",
    "client_address",
    "client_port",
    "upstream_address",
    "upstream_port",
    "upstream_local_address",
    "upstream_local_port",
    "duration_us",
    "connect_us",
    "rx_bytes",
    "tx_bytes",
    "upstream_tx_bytes",
    "discarded_bytes",
    "unacknowledged_bytes",
    "client_timestamps",
    "client_syn_tsval",
    "upstream_timestamps",
    "upstream_rtt_us",
    "upstream_retransmits",
    "upstream_segments_sent",
    "upstream_segments_received",
    "reason",
    "termination_state",
    "witness",
    "route",
)
_HEAD = '{"timestamp":"%s","level":"%s","event":"connection","pid":%d,'
_TEXTS = frozenset({"reason", "termination_state", "witness", "route"})  # the addresses have their quotes, or are null
_TEMPLATE = _HEAD + ",".join(f'"{name}":"%s"' if name in _TEXTS else f'"{name}":%s' for name in NAMES) + "}\n"
_BOOLEANS = {None: "null", False: "false", True: "true"}
_NULLS = ("null", "null")


def encode(record: ConnectionRecord, timestamp: str, pid: int, witness: str, route: str) -> bytes:
    """The line with its newline; `witness` and `route` are the names of the record's."""
    (worker, _, connection_id, _, client, duration_us, ending, _, client_timestamps, client_syn_tsval, upstream, connect_us,
     upstream_timestamps, local, rtt_us, retransmits, segments_sent, segments_received,
     rx, tx, upstream_tx, discarded, unacknowledged) = record  # fmt: skip
    reason, termination_state, level = ENDING_FIELDS[ending]
    line = _TEMPLATE % (
        timestamp,
        level,
        pid,
        connection_id,
        worker,
        *_end(client),
        *(_end(upstream) if upstream else _NULLS),
        *(_end(local) if local else _NULLS),
        duration_us,
        "null" if connect_us is None else connect_us,
        rx,
        tx,
        upstream_tx,
        discarded,
        unacknowledged,
        _BOOLEANS[client_timestamps],
        "null" if client_syn_tsval is None else client_syn_tsval,
        _BOOLEANS[upstream_timestamps],
        "null" if rtt_us is None else rtt_us,
        "null" if retransmits is None else retransmits,
        "null" if segments_sent is None else segments_sent,
        "null" if segments_received is None else segments_received,
        reason,
        termination_state,
        witness,
        route,
    )
    return line.encode("ascii")


def _end(packed: bytes) -> Tuple[str, object]:
    """Address and port of one end, as JSON."""
    ip, port = ip_and_port(packed)
    return f'"{ip}"', port
