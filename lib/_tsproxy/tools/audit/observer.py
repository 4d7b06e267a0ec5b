"""What an observer learns from the timestamps that were let out: for each flow its clock, for each clock whose it is.

It says what can be seen and no more (Kohno, Broido and Claffy 2005; Polčák and Franková 2015): that flows share a clock,
how that runs against the capture's own, and how long a host is up only where its offset can't be random. A skew names no
host: NTP takes it away, and hosts have the same one by chance.

Knows flows and clocks. Knows nothing of verdicts or of how segments were read.
"""

from __future__ import annotations

import math
from typing import Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Sequence

from _tsproxy.tools import terminal
from _tsproxy.tools.audit.clock import Clock, groups, measure
from _tsproxy.tools.audit.flows import Direction

_MOST_CLOCKS = 6
_MOST_ADDRESSES = 3
_DAY_S = 86_400


class Learned(NamedTuple):
    """What one flow's TSvals tell, under the names of `--json`; None where they can't. `clock` is the line through them."""

    clock: Optional[Clock]
    clock_group: Optional[int]

    @property
    def clock_hz(self) -> Optional[float]:
        """TSval ticks a second of the capture's clock."""
        return self.clock and self.clock.hz

    @property
    def clock_hz_low(self) -> Optional[float]:
        """The lower end of the interval of 95 %."""
        return self.clock and self.clock.hz_low

    @property
    def clock_hz_high(self) -> Optional[float]:
        """Its upper end."""
        return self.clock and self.clock.hz_high

    @property
    def clock_class(self) -> Optional[str]:
        """`100 Hz`, `250 Hz`, `1000 Hz`, `1 MHz`, `constant`, `other`."""
        return self.clock and self.clock.name

    @property
    def skew_ppm(self) -> Optional[float]:
        """Against the class."""
        return self.clock and self.clock.skew_ppm

    @property
    def skew_ppm_error(self) -> Optional[float]:
        """Half the interval of 95 %."""
        return self.clock and self.clock.skew_ppm_error


def learn(flows: Iterable[Direction]) -> Dict[Direction, Learned]:
    """For each of the flows that has TSvals."""
    stamped = [(flow, flow.samples) for flow in flows if flow.segments_with_timestamps]
    clocks = [(samples, measure(samples)) for _, samples in stamped]
    numbers = groups(clocks)
    return {flow: Learned(clock, number) for (flow, _), (_, clock), number in zip(stamped, clocks, numbers)}


# For people


def words(learned: Mapping[Direction, Learned]) -> List[str]:
    """A few lines for each clock, those with the most flows first, at most 80 columns wide; none if nothing was learned."""
    by_number: Dict[int, List[Direction]] = {}
    for flow, what in learned.items():
        if what.clock_group:
            by_number.setdefault(what.clock_group, []).append(flow)
    if not by_number:
        return []
    lines = ["What an observer learns from these timestamps"]
    numbers = sorted(by_number, key=lambda number: (-len(by_number[number]), number))
    for number in numbers[:_MOST_CLOCKS]:
        lines += _of_clock(number, by_number[number], learned)
    if len(numbers) > _MOST_CLOCKS:
        lines.append(f"  and {len(numbers) - _MOST_CLOCKS} more clocks")
    return [*lines, *(f"  {line}" for line in terminal.wrapped(_CAVEAT, terminal.WIDTH - 2))]


_CAVEAT = (
    "Rates and skews are those of two clocks, the sender's and the capture's. A sender that NTP disciplines shows hardly any"
    " skew, and a skew names no host. An uptime is told only where one offset is used towards two hosts: otherwise it may be"
    " random, as Linux has it."
)


def _of_clock(number: int, flows: Sequence[Direction], learned: Mapping[Direction, Learned]) -> Iterator[str]:
    clocks = [clock for clock in (learned[flow].clock for flow in flows) if clock and clock.name]
    count = f"{len(flows):,} flow{'s' * (len(flows) > 1)}"
    best = min(clocks, key=lambda clock: clock.hz_high - clock.hz_low, default=None)
    if best is None:
        yield f"  clock {number}: {count}, each too short to tell its rate"
    else:
        yield f"  clock {number}: {best.name}, {count}"
    yield from _row("from", _addresses(flow.source for flow in flows))
    if best is None:
        return
    yield from _row("rate", f"{_interval(best)} Hz (95 %), over {_duration(best.span_s)}")
    if skew(best):
        yield from _row("skew", skew(best))
    if len({flow.destination for flow in flows}) > 1:
        yield from _row("uptime", _uptime(best, flows))


def _row(name: str, text: str) -> Iterator[str]:
    first, *more = terminal.wrapped(text, terminal.WIDTH - 12)
    yield f"    {name:<8}{first}"
    yield from (f"{'':<12}{line}" for line in more)


def skew(clock: Clock) -> str:
    """In a few words, as sure as it is; "" without a class."""
    ppm, error = clock.skew_ppm, clock.skew_ppm_error
    if ppm is None or error is None:
        return ""
    digits = min(3, max(0, 1 - math.floor(math.log10(error)))) if error else 3
    if abs(ppm) <= error:
        return f"none to be seen within {abs(ppm) + error:,.{digits}f} ppm"
    return f"{ppm:+,.{digits}f} ppm, error {error:,.{digits}f} ppm"


def _addresses(given: Iterable[str]) -> str:
    found = list(dict.fromkeys(given))
    shown = ", ".join(found[:_MOST_ADDRESSES])
    if len(found) == 1:
        return shown
    more = f" and {len(found) - _MOST_ADDRESSES} more" if len(found) > _MOST_ADDRESSES else ""
    return f"{shown}{more}: they share one clock"


def _interval(clock: Clock) -> str:
    width = clock.hz_high - clock.hz_low
    digits = min(9, max(0, 1 - math.floor(math.log10(width)))) if width > 0 else 9
    return f"{clock.hz_low:.{digits}f} to {clock.hz_high:.{digits}f}"


def _uptime(clock: Clock, flows: Sequence[Direction]) -> str:
    """For an offset that is used towards two hosts: Linux draws one for each pair of hosts, or for each connection."""
    last_ns = max(flow.last_ns for flow in flows)
    ticks = (clock.value + clock.hz * (last_ns - clock.at_ns) / 1e9) % (1 << 32)
    turn = _duration((1 << 32) / clock.hz)
    return f"{_duration(ticks / clock.hz)}, or that and n times {turn}, if it counts from boot"


def _duration(seconds: float) -> str:
    """Two units at most: 3 d 4 h, 71 min 34 s, 0.25 s."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    if seconds < 2 * _DAY_S:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"
    return f"{int(seconds // _DAY_S)} d {int(seconds % _DAY_S // 3600)} h"
