"""Samples: records with every field, a pipe to write them to, a row of a histogram."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from typing import Iterable, Iterator, Tuple

from _tsproxy.linux.addresses import pack
from _tsproxy.stats.endings import Ending
from _tsproxy.stats.histogram import BUCKETS, bucket
from _tsproxy.stats.records import NOTICE_LEVELS, ConnectionRecord, Notice
from hypothesis import strategies as st

HERE = pack(socket.AF_INET, ("192.0.2.1", 443))
LOCAL = pack(socket.AF_INET, ("192.0.2.9", 40000))
THERE = pack(socket.AF_INET6, ("2001:db8::1", 50000, 0, 0))
FULL = ConnectionRecord(
    worker=3,
    route=0,
    connection_id=77,
    closed_at_ns=1_700_000_000_123_456_789,
    client=THERE,
    upstream=HERE,
    upstream_local=LOCAL,
    duration_us=1500,
    connect_us=120,
    rx_bytes=10,
    tx_bytes=20,
    upstream_tx_bytes=7,
    discarded_bytes=5,
    unacknowledged_bytes=1,
    client_timestamps=True,
    upstream_timestamps=False,
    client_syn_tsval=2**32 - 1,
    upstream_rtt_us=40,
    upstream_retransmits=1,
    upstream_segments_sent=9,
    upstream_segments_received=8,
    ending=Ending.SERVER_RESET,
    witness=1,
)


U32, I63, U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**63 - 1), st.integers(0, 2**64 - 1)


PACKED = st.builds(pack, st.just(socket.AF_INET), st.tuples(st.ip_addresses(v=4).map(str), st.integers(0, 65535)))
CONNECTIONS = st.builds(
    ConnectionRecord,
    worker=st.integers(0, 65535),
    route=st.integers(0, 65535),
    connection_id=U64,
    closed_at_ns=I63,
    client=PACKED,
    upstream=st.none() | PACKED,
    upstream_local=st.none() | PACKED,
    duration_us=I63,
    connect_us=st.none() | I63,
    rx_bytes=U64,
    tx_bytes=U64,
    upstream_tx_bytes=U64,
    discarded_bytes=U64,
    unacknowledged_bytes=U64,
    client_timestamps=st.none() | st.booleans(),
    upstream_timestamps=st.none() | st.booleans(),
    client_syn_tsval=st.none() | U32,
    upstream_rtt_us=st.none() | U32,
    upstream_retransmits=st.none() | U32,
    upstream_segments_sent=st.none() | I63,
    upstream_segments_received=st.none() | I63,
    ending=st.sampled_from(Ending),
    witness=st.integers(0, 255),
)


SOUND = st.text(st.characters(exclude_categories=["Cs"]), max_size=800)
ROUTES = st.none() | st.integers(0, 2**31 - 1)
NOTICES = st.builds(Notice, st.integers(0, 65535), st.integers(0, 2**63 - 1), st.sampled_from(NOTICE_LEVELS), SOUND, ROUTES)
RECORDS = st.lists(CONNECTIONS | NOTICES, max_size=6)


@contextlib.contextmanager
def pipe(size: int = 65536) -> Iterator[Tuple[int, int]]:
    """A pipe that would block whoever writes too much into it."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, 1031, size)  # F_SETPIPE_SZ
    try:
        yield reader, writer
    finally:
        for fd in (reader, writer):
            with contextlib.suppress(OSError):
                os.close(fd)


def row_of(times: Iterable[int]) -> memoryview:
    """The run of counts that a worker would have."""
    row = memoryview(bytearray(8 * BUCKETS)).cast("Q")
    for took in times:
        row[bucket(took)] += 1
    return row
