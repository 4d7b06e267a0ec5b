"""Latency histograms as plain runs of 64-bit counts: one addition to record, percentiles and buckets to read.

A quarter of a microsecond a bucket up to 1.024 ms, where relays live; above that 32 buckets for each
doubling (3 %), up to 18 minutes. Times are nanoseconds on the way in, microseconds on the way out.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate, compress
from typing import Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

STEP_NS = 250
LINEAR = 4096
LINEAR_NS = STEP_NS * LINEAR
_SUB_BITS = 5
_LINEAR_BITS = LINEAR.bit_length()
_DOUBLINGS = 20
SLOTS = LINEAR + (_DOUBLINGS << _SUB_BITS)
_STRETCH = 64
_NOTHING = bytes(8 * _STRETCH)
LIMITS_US = tuple(2**power for power in range(21))  # 1 us to 1.05 s: the "le" fields of the metrics line
COARSE_US = LIMITS_US[::4]  # for what is no latency of the wire: a line has 4,096 bytes in all


def slot(took_ns: int) -> int:
    """Which count a time belongs to. The relay's hot path writes the first case out by hand."""
    steps = max(took_ns, 0) // STEP_NS
    if steps < LINEAR:
        return steps
    doubling = steps.bit_length() - _LINEAR_BITS
    sub = steps >> (steps.bit_length() - 1 - _SUB_BITS)  # the leading bit and the five below it
    return min(LINEAR + (doubling << _SUB_BITS) + sub - (1 << _SUB_BITS), SLOTS - 1)


_EDGES = {limit: slot(limit * 1000) for limit in LIMITS_US}  # each limit is the lower edge of a slot


def upper_ns(index: int) -> int:
    """The smallest time that is too long for this slot."""
    if index < LINEAR:
        return (index + 1) * STEP_NS
    doubling, sub = divmod(index - LINEAR, 1 << _SUB_BITS)
    return STEP_NS * ((1 << _SUB_BITS) + sub + 1) << (doubling + _LINEAR_BITS - 1 - _SUB_BITS)


Counts = List[Tuple[int, int]]  # (slot, count), ascending, counts above 0 only


def add(histograms: Iterable[memoryview]) -> Counts:
    """The sum of several workers' histograms, each SLOTS words.

    Most slots are 0, and this runs beside the relays, on their CPU perhaps: stretches of zeros are passed over as bytes.
    """
    total: Dict[int, int] = {}
    for words in histograms:
        for start in _filled(words.tobytes()):
            counts = words[start : start + _STRETCH].tolist()
            for index, count in compress(enumerate(counts, start), counts):
                total[index] = total.get(index, 0) + count
    return sorted(total.items())


def _filled(raw: bytes) -> Iterator[int]:
    """Where a stretch of slots begins that are not all 0."""
    size = len(_NOTHING)
    return (at // 8 for at in range(0, len(raw), size) if raw[at : at + size] != _NOTHING)


def percentile(counts: Counts, share: float) -> Optional[float]:
    """The time in us that `share` of the recorded ones did not exceed (its slot's upper edge); None if none was recorded."""
    return _reached([index for index, _ in counts], _running(counts), share)


def _running(counts: Counts) -> List[int]:
    return list(accumulate(count for _, count in counts))


def _reached(slots: List[int], running: List[int], share: float) -> Optional[float]:
    if not running:
        return None
    part, whole = share.as_integer_ratio()  # whole numbers: a float would lose the last ones of 2**53 and more
    return upper_ns(slots[bisect_left(running, -(-part * running[-1] // whole))]) / 1000


def summary(name: str, counts: Counts, longest_ns: int, limits_us: Sequence[int] = LIMITS_US) -> Dict[str, object]:
    """The fields of one histogram in the metrics line: percentiles, maximum, and cumulative counts below each limit.

    A percentile is the upper edge of its slot, but never more than the maximum, which is what was measured.
    """
    slots, running = [index for index, _ in counts], [0, *_running(counts)]
    fields: Dict[str, object] = {}
    longest_us = longest_ns / 1000 if counts else None
    for label, share in (("p50", 0.5), ("p99", 0.99), ("p999", 0.999)):
        edge_us = _reached(slots, running[1:], share)
        fields[f"{name}_{label}"] = edge_us and longest_us and min(edge_us, longest_us)
    fields[f"{name}_max"] = longest_us
    for limit in limits_us:
        fields[f"{name}_le_{limit}"] = running[bisect_left(slots, _EDGES[limit])]
    fields[f"{name}_count"] = running[-1]
    return fields
