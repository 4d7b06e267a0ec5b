"""The clock behind the TSvals of a sender: its rate with an interval, its class, its skew, and who else has the same one.

Theory. A TSval is the sender's clock, rounded down, as it was when the segment was built; the capture's time is later by
a delay that is never negative, is mostly the same, and is sometimes long. So the points (capture time, TSval) lie on or
below a line whose slope is the clock's rate (Moon, Skelly and Towsley, "Estimation and removal of clock skew from network
delay measurements", INFOCOM 1999; Kohno, Broido and Claffy, "Remote physical device fingerprinting", 2005).

- Unwrap: a TSval is modulo 2^32; the signed difference of neighbours also takes those that reordering put back.
- Filter: the span is cut into 24 windows; of each the point counts that was delayed least.
- Fit: the median of the slopes of all pairs of these points (Theil 1950, Sen 1968), which a few wild ones do not move.
- Interval: Sen's, from the variance of Kendall's S (P. K. Sen, "Estimates of the regression coefficient based on
  Kendall's tau", JASA 63, 1968), wider by what the delays of neighbouring windows have in common (Yue and Wang, 2004)
  and by what rounding can hide: where samples always meet the same phase of a tick, up to one tick over the span. That
  is a bound and no estimate, so where rounding is most of the noise the interval holds the rate in 98 to 100 of 100 runs.

It is the rate as the capture's clock sees it: a skew is that of two clocks, and a host that NTP disciplines has hardly
any (Polčák and Franková, "Clock-skew-based computer identification: traps and pitfalls", JUCS 21(9), 2015: the time that
is watched matters more than the number of segments, and in networks of a moderate size skews are not unique).

Knows samples: (nanoseconds, TSval). Knows nothing of packets, flows or files.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from statistics import median
from typing import Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

Sample = Tuple[int, int]  # capture time in ns, TSval
_Point = Tuple[float, float]  # seconds, ticks, both since the first sample

_MODULUS = 1 << 32
_WINDOWS = 24
_ROUGH = 16  # points for a first guess at the rate
_FEWEST = 5  # below it no interval of Sen's has 95 %
_Z95 = 1.959964
_SIGMA = 1.4826  # a normal distribution's standard deviation, in median absolute deviations
_CLASSES = {"100 Hz": 100, "250 Hz": 250, "1000 Hz": 1000, "1 MHz": 1_000_000}
_SKEW = 0.005  # the most by which a clock is off its class: ten times what adjtimex(2) lets NTP correct
_TELLING = 0.05  # of the rate: with a wider interval its class can't be told
_VAGUE = 0.5  # with a wider one there is no rate to speak of
_STRAY = 0.01  # of 2^32: further from a line no TSval is by a delay
_CONSTANT_S = 1.0
_CLOSE_S = 1000.0  # far less than a clock of 1 MHz needs for half of 2^32
_DELAY_S = 0.005  # by how much the least delays of two flows may differ
_DELAYED_S = 0.05  # by how much one segment may be later than another of a short flow
_CHANCE = 0.001  # the most by which a stranger's offset may happen to be near enough to one of all clocks


class Clock(NamedTuple):
    """What one sender's TSvals say. Rates in Hz, the interval is that of 95 %; None where the samples can't tell.

    The line goes through `value` (a TSval with fractions) at `at_ns`; `noise` is the spread around it, in ticks.
    """

    hz: float
    hz_low: float
    hz_high: float
    name: Optional[str]
    span_s: float
    at_ns: int
    value: float
    noise: float

    @property
    def skew_ppm(self) -> Optional[float]:
        """How much faster than its class it runs against the capture's clock, in millionths."""
        nominal = _CLASSES.get(self.name or "")
        return None if nominal is None else (self.hz / nominal - 1) * 1e6

    @property
    def skew_ppm_error(self) -> Optional[float]:
        """Half the interval of 95 %, in millionths of the class's rate."""
        nominal = _CLASSES.get(self.name or "")
        return None if nominal is None else (self.hz_high - self.hz_low) / 2 / nominal * 1e6


def measure(samples: Sequence[Sample]) -> Optional[Clock]:
    """The clock of one sender, from samples in any order. None if they are too few, too close, or no clock's.

    A TSval that did not move for a second or more is the class `constant`, at most one tick in that time.
    """
    ordered = sorted(samples)
    if len(ordered) < 2:
        return None
    span_s = (ordered[-1][0] - ordered[0][0]) / 1e9
    if len({tsval for _, tsval in ordered}) == 1:
        if span_s < _CONSTANT_S:
            return None
        return Clock(0.0, 0.0, 1 / span_s, "constant", span_s, ordered[0][0], ordered[0][1], 0.0)
    if len(ordered) < _FEWEST or not span_s:
        return None
    return _fit(ordered, span_s)


def _fit(ordered: Sequence[Sample], span_s: float) -> Optional[Clock]:
    points = _unwrapped(ordered)
    quantum, rough = _quantum(points), median(_slopes(_thinned(points, _ROUGH)))
    windows = _windows(points)
    fit = [max(window, key=lambda point: point[1] - rough * point[0]) for window in windows]
    slopes = _slopes(fit)
    hz = median(slopes)
    level = median(y - hz * t for t, y in fit)
    residuals = [y - hz * t - level for t, y in fit]
    noise = _SIGMA * median(map(abs, residuals))
    hidden = quantum * _gap(windows, rough / quantum) * _undithered(noise / quantum) / (fit[-1][0] - fit[0][0])
    low, high = _sen(slopes, residuals)
    low, high = low - hidden, high + hidden
    if low <= 0 or high - low > 2 * _VAGUE * hz or noise > _MODULUS * _STRAY:
        return None
    at = (fit[0][0] + fit[-1][0]) / 2
    value = (ordered[0][1] + level + hz * at) % _MODULUS
    return Clock(hz, low, high, _class(low, high), span_s, ordered[0][0] + round(at * 1e9), value, noise + quantum)


def _class(low: float, high: float) -> Optional[str]:
    if high - low > _TELLING * (high + low):
        return None
    fits = [name for name, hz in _CLASSES.items() if low <= hz * (1 + _SKEW) and high >= hz * (1 - _SKEW)]
    return fits[0] if fits else "other"


# From samples to the points of a line


def _unwrapped(ordered: Sequence[Sample]) -> List[_Point]:
    """Seconds and ticks since the first sample, without the wraps.

    Neighbours are nearer than half of 2^32, or the rate between those that surely are tells how often it went round: at
    1 MHz 2^31 ticks are 36 minutes, at 1000 Hz 25 days.
    """
    steps = [((later[0] - sooner[0]) / 1e9, _signed(later[1] - sooner[1])) for sooner, later in zip(ordered, ordered[1:])]
    close = [(seconds, ticks) for seconds, ticks in steps if seconds < _CLOSE_S]
    watched_s = sum(seconds for seconds, _ in close)
    rate = sum(ticks for _, ticks in close) / watched_s if watched_s > 1 else 0.0
    at, value = 0.0, 0.0
    points = [(at, value)]
    for seconds, ticks in steps:
        at += seconds
        value += ticks + (_MODULUS * round((rate * seconds - ticks) / _MODULUS) if seconds >= _CLOSE_S else 0)
        points.append((at, value))
    return points


def _signed(difference: float) -> float:
    """Modulo 2^32, from -2^31 on."""
    if -_MODULUS / 2 <= difference < _MODULUS / 2:
        return difference
    return (difference + _MODULUS / 2) % _MODULUS - _MODULUS / 2


def _quantum(points: Sequence[_Point]) -> float:
    """By how many ticks at once a TSval moves: more than 1 if all are such multiples, though the samples are closer.

    A kernel whose timer runs at 100 Hz may count milliseconds, ten at a time.
    """
    common = math.gcd(*(int(value) for _, value in points))
    gaps = [later[0] - sooner[0] for sooner, later in zip(points, points[1:])]
    rate = points[-1][1] / points[-1][0]
    return float(common) if common > 1 and rate * median(gaps) < common / 2 else 1.0


def _thinned(points: Sequence[_Point], most: int) -> Sequence[_Point]:
    """At most that many, evenly over their order, the first and the last among them."""
    if len(points) <= most:
        return points
    return [points[place * (len(points) - 1) // (most - 1)] for place in range(most)]


def _windows(points: Sequence[_Point]) -> List[Sequence[_Point]]:
    """The points in windows of equal length, with equally many each, so that no window's least delay is the smaller for it.

    Points that keep together in a few bursts are cut by their number instead.
    """
    width = (points[-1][0] or 1.0) / _WINDOWS
    by_time: Dict[int, List[_Point]] = {}
    for point in points:
        by_time.setdefault(min(int(point[0] / width), _WINDOWS - 1), []).append(point)
    sizes = sorted(map(len, by_time.values()))
    if len(sizes) >= _WINDOWS // 3:
        size = sizes[len(sizes) // 4]
        return [_thinned(window, size) if size > 1 else window[:1] for window in by_time.values() if len(window) >= size]
    size = max(1, len(points) // _WINDOWS)
    return [points[start : start + size] for start in range(0, len(points) - size + 1, size)]


# The line and how sure it is


def _slopes(points: Sequence[_Point]) -> List[float]:
    """In order; of each pair that is apart in time."""
    slopes: List[float] = []
    for place, (t, y) in enumerate(points):
        slopes += [(later_y - y) / (later_t - t) for later_t, later_y in points[place + 1 :] if later_t > t]
    return sorted(slopes)


def _sen(slopes: Sequence[float], residuals: Sequence[float]) -> Tuple[float, float]:
    """The interval of 95 % around their median: so many ranks to each side as Kendall's S has spread."""
    count = len(residuals)
    variance = count * (count - 1) * (2 * count + 5) / 18 * _in_common(residuals)
    ranks = _Z95 * math.sqrt(variance)
    low = math.floor((len(slopes) - ranks) / 2) - 1
    return slopes[max(0, low)], slopes[min(len(slopes) - 1, len(slopes) - 1 - low)]


def _in_common(residuals: Sequence[float]) -> float:
    """By how much the variance grows since neighbours are alike (S. Yue and C. Wang, Water Resources Management 18, 2004).

    A short series shows less of that than there is: some (1 + 3 * correlation) / length (M. G. Kendall, 1954).
    """
    count, squares = len(residuals), sum(residual * residual for residual in residuals)
    alike = sum(a * b for a, b in zip(residuals, residuals[1:])) / squares if squares else 0.0
    if alike <= 0:
        return 1.0
    alike = min(0.9, (count * alike + 1) / (count - 3))
    return (1 + alike) / (1 - alike)


def _gap(windows: Sequence[Sequence[_Point]], rate: float) -> float:
    """How much of a tick rounding can hide: the widest gap between the phases at which a window's samples, on average."""
    gaps = []
    for window in windows:
        phases = sorted(rate * point[0] % 1 for point in window)
        gaps.append(max(later - sooner for sooner, later in zip(phases, [*phases[1:], phases[0] + 1])))
    return sum(gaps) / len(gaps)


def _undithered(noise: float) -> float:
    """What is left of it where delays spread the samples over a tick by themselves (in ticks).

    The first harmonic of rounding, after normal noise. Of the spread, a sawtooth's own part is rounding itself.
    """
    return math.exp(-2 * math.pi**2 * max(0.0, noise * noise - (_SIGMA / 4) ** 2))


# Who has the same clock


def groups(senders: Sequence[Tuple[Sequence[Sample], Optional[Clock]]]) -> List[Optional[int]]:
    """For each sender's samples, and what measure() made of them, the number of its clock, from 1: the same, the same clock.

    None for a constant, and for a flow too short to tell that no other one shares a clock with.
    """
    shared, found = _SharedClocks(), [0] * len(senders)
    for place in sorted(range(len(senders)), key=lambda place: _vagueness(senders[place][1])):
        found[place] = shared.add(*senders[place])
    numbers: Dict[int, int] = {}
    named = [bool(clock and clock.name) for _, clock in senders]
    shown = [number > 0 and (own or shared.size(number) > 1) for number, own in zip(found, named)]
    return [numbers.setdefault(number, len(numbers) + 1) if show else None for number, show in zip(found, shown)]


def _vagueness(clock: Optional[Clock]) -> float:
    return (clock.hz_high - clock.hz_low) / clock.hz if clock and clock.hz else math.inf


class _SharedClocks:
    """Numbers clocks as they are added, best known first: the same number for those whose lines meet, modulo 2^32.

    Two lines meet if one leads to the other at a rate that both intervals allow: within their noise, what the delays of two
    paths may differ by, and what that rate is unsure of over the time between. From there on they are one line, and its
    rate is known the better. Nothing is joined where the allowance is so wide that chance could do it. A flow too short for
    a rate of its own may join any clock, or another such flow.
    """

    def __init__(self) -> None:
        self._lines: Dict[Tuple[int, str], Clock] = {}  # by number and class: a number has several until a second flow tells
        self._places: Dict[str, List[Tuple[float, int]]] = {}  # by class: a line's place at time 0, number
        self._sizes = [0]  # how many flows have each number, from 1
        self._times: List[int] = []  # the first and the last of all, in ns

    def add(self, samples: Sequence[Sample], clock: Optional[Clock]) -> int:
        """The number of this clock: that of the nearest line which meets it, or a new one. 0 if it is no clock.

        `clock` is what measure() made of the samples.
        """
        if not samples or (clock and clock.name == "constant"):
            return 0
        guesses = [_widened(clock)] if clock and clock.name else list(_guesses(sorted(samples)))
        return self._add(guesses) if guesses else 0

    def size(self, number: int) -> int:
        """How many flows have this clock."""
        return self._sizes[number]

    def _add(self, guesses: Sequence[Clock]) -> int:
        times = [*self._times, *(guess.at_ns for guess in guesses)]
        self._times = [min(times), max(times)]
        nearest = min((near for guess in guesses for near in self._near(guess)), default=None)
        if nearest is None:
            return self._begin(guesses)
        _, number, name = nearest
        guess = next(guess for guess in guesses if guess.name == name)
        joined = _joined(self._lines[number, name], guess)
        for other in _CLASSES:
            self._lines.pop((number, other), None)
        self._lines[number, name] = joined
        self._sizes[number] += 1
        return number

    def _begin(self, guesses: Sequence[Clock]) -> int:
        number = len(self._sizes)
        self._sizes.append(1)
        for guess in guesses:
            name = str(guess.name)
            self._lines[number, name] = guess
            insort(self._places.setdefault(name, []), (_place(guess), number))
        return number

    def _near(self, clock: Clock) -> Iterator[Tuple[float, int, str]]:
        """(distance as a share of what is allowed, number, class) of each line that meets this one."""
        widest, name = _CHANCE * _MODULUS / len(self._sizes), str(clock.name)
        for number in self._candidates(clock, widest):
            line = self._lines.get((number, name))
            distance, allowed = _meeting(clock, line) if line else (1.0, 0.0)
            if distance <= allowed <= widest:
                yield distance / allowed, number, name

    def _candidates(self, clock: Clock, widest: float) -> Iterator[int]:
        """Those of its class whose place at time 0 its rate allows: few of many, since most clocks are far apart."""
        places, nominal, place = self._places.get(str(clock.name), []), _nominal(clock), _place(clock)
        off = max(clock.hz_high - nominal, nominal - clock.hz_low) * (self._times[1] - self._times[0]) / 1e9
        reach = min(off + widest, _MODULUS / 2)
        for turn in (-_MODULUS, 0, _MODULUS):
            first, last = (bisect_left(places, (place + turn + way * reach,)) for way in (-1, 1))
            yield from (number for _, number in places[first:last])


def _nominal(clock: Clock) -> float:
    """The rate of its class; the class `other` has none."""
    return float(_CLASSES.get(clock.name or "", 0))


def _place(clock: Clock) -> float:
    return (clock.value - _nominal(clock) * clock.at_ns / 1e9) % _MODULUS


def _widened(clock: Clock) -> Clock:
    """Its rate within three standard deviations instead of two: of many flows one in twenty is beyond the latter."""
    more = (clock.hz_high - clock.hz_low) / 4
    return clock._replace(hz_low=clock.hz_low - more, hz_high=clock.hz_high + more)


def _allowed(one: Clock, other: Clock, rate: float) -> float:
    return one.noise + other.noise + rate * _DELAY_S


def _meeting(one: Clock, other: Clock) -> Tuple[float, float]:
    """How far the lines pass each other, and how far they may, in ticks. No rate in common: they may not."""
    low, high = max(one.hz_low, other.hz_low), min(one.hz_high, other.hz_high)
    if low > high:
        return 1.0, 0.0
    rate, between_s = (low + high) / 2, (one.at_ns - other.at_ns) / 1e9
    distance = abs(_signed(one.value - other.value - rate * between_s))
    return distance, _allowed(one, other, rate) + (high - low) / 2 * abs(between_s)


def _joined(line: Clock, other: Clock) -> Clock:
    """The line, with the rate that both allow and that leads from one to the other."""
    low, high = max(line.hz_low, other.hz_low), min(line.hz_high, other.hz_high)
    rate, between_s = (low + high) / 2, (other.at_ns - line.at_ns) / 1e9
    if between_s:
        leads = rate + _signed(other.value - line.value - rate * between_s) / between_s
        unsure = _allowed(line, other, rate) / abs(between_s)
        low, high = max(low, min(high, leads - unsure)), min(high, max(low, leads + unsure))
    return line._replace(hz=(low + high) / 2, hz_low=low, hz_high=high)


def _guesses(ordered: Sequence[Sample]) -> Iterator[Clock]:
    """What the samples would be as a clock of each class, if they can be: through the one that was delayed least."""
    (first_ns, first), (last_ns, last) = ordered[0], ordered[-1]
    span_s = (last_ns - first_ns) / 1e9
    delayed_s = min(_DELAYED_S, span_s / 2 + _DELAY_S)

    def lead(sample: Sample) -> float:
        return _signed(sample[1] - first - hz * (sample[0] - first_ns) / 1e9)

    for name, hz in _CLASSES.items():
        if abs(_signed(last - first - hz * span_s)) <= hz * (_SKEW * span_s + delayed_s) + 1:
            at_ns, value = max(ordered, key=lead)
            yield Clock(hz, hz * (1 - _SKEW), hz * (1 + _SKEW), name, span_s, at_ns, value, 1.0)
