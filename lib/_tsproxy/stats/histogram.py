"""Latency histograms: 64-bit counts by bucket. Recording is one addition; percentiles are computed when they are read.

Buckets are 0.25 us wide up to 1.024 ms, where relay times are; above that there are 32 buckets for each doubling (3 %), up to
18 minutes. Times are recorded in nanoseconds and read in microseconds.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate, chain, compress
from typing import Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

STEP_NS = 250
LINEAR = 4096
LINEAR_NS = STEP_NS * LINEAR
_SUB_BITS = 5
_LINEAR_BITS = LINEAR.bit_length()
_DOUBLINGS = 20
BUCKETS = LINEAR + (_DOUBLINGS << _SUB_BITS)
_CHUNK = 64
_ZEROS = bytes(8 * _CHUNK)
LIMITS_US = tuple(2**power for power in range(21))  # 1 us to 1.05 s: the "le" fields of the metrics line
COARSE_US = LIMITS_US[::4]  # for the loop's lag: a line has at most 4,096 bytes


def bucket(duration_ns: int) -> int:
    """Index of the bucket for a time. Direction.readable() has the first case inline."""
    steps = max(duration_ns, 0) // STEP_NS
    if steps < LINEAR:
        return steps
    doubling = steps.bit_length() - _LINEAR_BITS
    sub = steps >> (steps.bit_length() - 1 - _SUB_BITS)  # the leading bit and the five after it
    return min(LINEAR + (doubling << _SUB_BITS) + sub - (1 << _SUB_BITS), BUCKETS - 1)


_EDGES = {limit: bucket(limit * 1000) for limit in LIMITS_US}  # each limit is the lower edge of a bucket


def upper_ns(index: int) -> int:
    """The upper edge of a bucket, exclusive."""
    if index < LINEAR:
        return (index + 1) * STEP_NS
    doubling, sub = divmod(index - LINEAR, 1 << _SUB_BITS)
    return STEP_NS * ((1 << _SUB_BITS) + sub + 1) << (doubling + _LINEAR_BITS - 1 - _SUB_BITS)


Counts = List[Tuple[int, int]]  # (bucket, count), ascending, counts above 0 only


def add(histograms: Iterable[memoryview]) -> Counts:
    """The sum of several workers' histograms, each BUCKETS words.

    Most buckets are 0, and this may run on a worker's CPU: chunks of zeros are skipped by comparing bytes.
    """
    total: Dict[int, int] = {}
    for words in histograms:
        for start in _nonzero_chunks(words.tobytes()):
            counts = words[start : start + _CHUNK].tolist()
            for index, count in compress(enumerate(counts, start), counts):
                total[index] = total.get(index, 0) + count
    return sorted(total.items())


def merged(several: Sequence[Counts]) -> Counts:
    """The sum of some histograms."""
    if len(several) == 1:
        return several[0]
    total: Dict[int, int] = {}
    for index, count in chain.from_iterable(several):
        total[index] = total.get(index, 0) + count
    return sorted(total.items())


def _nonzero_chunks(raw: bytes) -> Iterator[int]:
    """Index of the first bucket of each chunk that is not all zeros."""
    size = len(_ZEROS)
    return (at // 8 for at in range(0, len(raw), size) if raw[at : at + size] != _ZEROS)


def percentile(counts: Counts, quantile: float) -> Optional[float]:
    """The time in us that `quantile` of the times did not exceed (its bucket's upper edge); None if none was recorded."""
    return _quantile_us([index for index, _ in counts], _cumulative(counts), quantile)


def _cumulative(counts: Counts) -> List[int]:
    return list(accumulate(count for _, count in counts))


def _quantile_us(buckets: List[int], cumulative: List[int], quantile: float) -> Optional[float]:
    if not cumulative:
        return None
    part, whole = quantile.as_integer_ratio()  # integers: a float is not exact from 2**53 on
    return upper_ns(buckets[bisect_left(cumulative, -(-part * cumulative[-1] // whole))]) / 1000


def summary(name: str, counts: Counts, longest_ns: int, limits_us: Sequence[int] = LIMITS_US) -> Dict[str, object]:
    """The fields of one histogram in the metrics line: percentiles, maximum, and cumulative counts below each limit.

    A percentile is the upper edge of its bucket, but at most the maximum, which is exact.
    """
    buckets, cumulative = [index for index, _ in counts], [0, *_cumulative(counts)]
    fields: Dict[str, object] = {}
    longest_us = longest_ns / 1000 if counts else None
    for label, quantile in (("p50", 0.5), ("p99", 0.99), ("p999", 0.999)):
        edge_us = _quantile_us(buckets, cumulative[1:], quantile)
        fields[f"{name}_{label}"] = edge_us and longest_us and min(edge_us, longest_us)
    fields[f"{name}_max"] = longest_us
    for limit in limits_us:
        fields[f"{name}_le_{limit}"] = cumulative[bisect_left(buckets, _EDGES[limit])]
    fields[f"{name}_count"] = cumulative[-1]
    return fields
