"""The clock behind TSvals: rates, intervals that hold what they promise, classes, skews, and flows that share one."""

from __future__ import annotations

import math
import random
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import pytest
from _tsproxy.tools.audit.clock import Clock, Sample, groups, measure
from hypothesis import given, settings
from hypothesis import strategies as st

Delay = Callable[[random.Random], float]
DELAYS: Dict[str, Delay] = {
    "none": lambda rng: 0.0,
    "LAN": lambda rng: 20e-6 + rng.expovariate(1e5) + (rng.random() < 0.02) * rng.expovariate(500),
    "WAN": lambda rng: 5e-3 + rng.expovariate(1e3) + (rng.random() < 0.1) * rng.expovariate(50),
    "symmetric": lambda rng: max(0.0, rng.gauss(5e-3, 1e-3)),
}
SPACINGS: Dict[str, Callable[[random.Random, int, float], List[float]]] = {
    "each second": lambda rng, count, span: [place * span / count for place in range(count)],
    "at random": lambda rng, count, span: sorted(rng.uniform(0, span) for _ in range(count)),
    "in bursts": lambda rng, count, span: sorted(
        rng.randrange(6) * span / 6 + rng.uniform(0, span / 100) for _ in range(count)
    ),
    "first": lambda rng, count, span: sorted(span * rng.random() ** 4 for _ in range(count)),
}


def flow(
    hz: float,
    times: Sequence[float],
    offset: float = 0.0,
    delay: Delay = DELAYS["none"],
    rng: random.Random = random.Random(1),  # noqa: B008
    quantum: int = 1,
    begin: float = 1e9,
) -> List[Sample]:
    """What a capture has of a sender whose clock read `offset` at `begin`, ticks `hz` times a second, and sends at `times`."""
    tsvals = [math.floor((offset + hz * at) / quantum) * quantum % (1 << 32) for at in times]
    return sorted((round((begin + at + delay(rng)) * 1e9), tsval) for at, tsval in zip(times, tsvals))


def measured(samples: Sequence[Sample]) -> Clock:
    clock = measure(samples)
    assert clock
    return clock


# The interval


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("delay", DELAYS)
@pytest.mark.parametrize("hz", [100, 250, 1000, 1_000_000])
def test_the_interval_holds_the_true_rate_in_95_percent_of_the_runs(hz: int, delay: str, spacing: str) -> None:
    rng = random.Random(f"{hz} {delay} {spacing}")
    runs, held = 60, 0
    for _ in range(runs):
        count, span = rng.choice([(12, 30.0), (60, 60.0), (400, 60.0), (300, 900.0)])
        true = hz * (1 + rng.uniform(-100, 100) * 1e-6)
        times = SPACINGS[spacing](rng, count, span)
        clock = measure(flow(true, times, rng.uniform(0, 2**32), DELAYS[delay], rng))
        held += clock is not None and clock.hz_low <= true <= clock.hz_high
    assert held >= 0.95 * runs - 2 * math.sqrt(0.95 * 0.05 * runs)


def test_the_interval_holds_where_delays_come_and_go_in_queues() -> None:
    """Neighbours wait alike, so they tell less than as many that do not."""
    rng = random.Random("queues")
    runs, held = 60, 0
    for _ in range(runs):
        queue = [0.0]
        for _ in range(600):
            queue.append(0.995 * queue[-1] + rng.gauss(0, 4e-4))
        waits = iter([abs(wait) for wait in queue])
        true = 1e6 * (1 + rng.uniform(-100, 100) * 1e-6)
        clock = measure(flow(true, SPACINGS["at random"](rng, 600, 60.0), 7.0, lambda _, waits=waits: next(waits)))  # type: ignore[misc]
        held += clock is not None and clock.hz_low <= true <= clock.hz_high
    assert held >= 0.95 * runs - 2 * math.sqrt(0.95 * 0.05 * runs)


@pytest.mark.parametrize(
    ("delay", "hz", "most_ppm"), [("none", 1000, 6), ("LAN", 1000, 6), ("WAN", 1000, 12), ("LAN", 1_000_000, 0.1)]
)
def test_a_minute_with_a_thousand_segments_gives_the_skew_within_a_few_ppm(delay: str, hz: int, most_ppm: float) -> None:
    rng = random.Random(delay)
    clock = measured(flow(hz * 1.00004, SPACINGS["at random"](rng, 1000, 60), 12345.0, DELAYS[delay], rng))
    assert clock.skew_ppm == pytest.approx(40, abs=most_ppm)
    assert clock.skew_ppm_error is not None
    assert clock.skew_ppm_error < most_ppm


def test_what_rounding_hides_is_in_the_interval_where_each_sample_meets_the_same_phase() -> None:
    """A heartbeat each second of a clock that is 30 ppm fast: for half a minute no TSval shows it."""
    samples = flow(1000.03, range(20), offset=0.1)
    assert {b[1] - a[1] for a, b in zip(samples, samples[1:])} == {1000}
    clock = measured(samples)
    assert clock.hz == 1000
    assert clock.hz_high >= 1000.03
    assert clock.hz_high < 1000.2


def test_a_timer_that_moves_ten_ticks_at_once_hides_more_than_one_that_moves_one() -> None:
    """Two milliseconds apart, at 1009 Hz, and each TSval a multiple of ten: as 1000 Hz would have it."""
    samples = flow(1009, [place * 0.002 for place in range(100)], offset=0.1, quantum=10)
    assert samples[-1][1] == 190
    clock = measured(samples)
    assert clock.hz == pytest.approx(1000, abs=1)
    assert clock.hz_high >= 1009


def test_a_few_segments_that_were_held_up_for_long_do_not_move_the_rate() -> None:
    rng = random.Random(3)
    samples = flow(1000, SPACINGS["at random"](rng, 500, 60), 5.0, DELAYS["LAN"], rng)
    late = [(at + (rng.random() < 0.1) * 5_000_000_000, tsval) for at, tsval in samples]
    assert measured(late).hz == pytest.approx(1000, rel=1e-4)


# Modulo 2^32, and out of order


@pytest.mark.parametrize("hz", [1000, 1_000_000])
def test_a_tsval_that_wraps_goes_on(hz: int) -> None:
    clock = measured(flow(hz, [place * 0.1 for place in range(100)], offset=2**32 - 5 * hz))
    assert clock.hz == pytest.approx(hz, rel=1e-3)


def test_a_clock_of_1_mhz_that_goes_round_unseen_during_a_pause_is_still_one() -> None:
    times = [*range(60), *range(9000, 9060)]  # two and a half hours: 2^32 us are 72 minutes
    clock = measured(flow(1_000_000, times, offset=77.0))
    assert (clock.name, clock.hz) == ("1 MHz", pytest.approx(1e6, rel=1e-6))


def test_reordered_segments_are_no_clock_that_goes_backwards() -> None:
    samples = flow(1000, [place * 0.01 for place in range(400)])
    times, tsvals = [at for at, _ in samples], [tsval for _, tsval in samples]
    for place in range(0, 400, 7):
        tsvals[place - 1], tsvals[place] = tsvals[place], tsvals[place - 1]
    clock = measured(list(zip(times, tsvals)))
    assert clock.name == "1000 Hz"
    assert clock.hz_low <= 1000 <= clock.hz_high


def test_the_order_of_the_samples_does_not_matter() -> None:
    samples = flow(250, [place * 0.3 for place in range(50)])
    assert measure(samples[::-1]) == measure(samples)


# Classes


@pytest.mark.parametrize(
    ("hz", "name"),
    [
        (100, "100 Hz"), (250, "250 Hz"), (1000, "1000 Hz"), (1_000_000, "1 MHz"), (1000.3, "1000 Hz"),
        (2, "other"), (300, "other"), (1024, "other"), (1020, "other"),
    ],
)  # fmt: skip
def test_each_class_by_its_name(hz: float, name: str) -> None:
    clock = measured(flow(hz, [place * 0.5 for place in range(240)]))
    assert clock.name == name
    assert (clock.skew_ppm is None) == (name == "other")


def test_a_tsval_that_stands_still_for_a_second_is_constant() -> None:
    clock = measured([(0, 7), (1_000_000_000, 7)])
    assert (clock.name, clock.hz, clock.hz_low, clock.hz_high) == ("constant", 0, 0, 1)
    assert (clock.skew_ppm, clock.skew_ppm_error) == (None, None)
    assert measure([(0, 7), (999_999_999, 7)]) is None


@pytest.mark.parametrize(
    "samples",
    [
        [],
        [(0, 1)],
        flow(1000, [0, 0.01, 0.02, 0.03]),
        flow(1000, [0, 0.0005, 0.001, 0.0015, 0.002, 0.0025]),
        [(5, tsval) for tsval in range(10)],
        [(second * 10**9, 1000 - second) for second in range(10)],
        [(second * 10**9, random.Random(second).randrange(1 << 32)) for second in range(50)],
    ],
    ids=["none", "one", "four", "2.5 ms", "one instant", "backwards", "random"],
)
def test_too_little_to_tell_is_no_clock(samples: List[Sample]) -> None:
    assert measure(samples) is None


def test_a_span_too_short_for_a_class_may_still_give_a_rate() -> None:
    clock = measured(flow(1000, [place * 0.001 for place in range(15)], offset=0.5))
    assert clock.name is None
    assert clock.hz_low <= 1000 <= clock.hz_high
    assert clock.skew_ppm is None


@settings(deadline=None)  # a machine that tests share
@given(st.lists(st.tuples(st.integers(0, 1 << 63), st.integers(0, (1 << 32) - 1)), max_size=40))
def test_any_samples_give_a_clock_or_none(samples: List[Sample]) -> None:
    clock = measure(samples)
    assert clock is None or 0 <= clock.hz_low <= clock.hz <= clock.hz_high
    assert len(groups([(samples, clock), (samples, clock)])) == 2


# Who shares one


def sender(hz: float, begin: float, boot: float, rng: random.Random, count: int = 60, span: float = 20.0) -> List[Sample]:
    """A flow from `begin` on, of a host whose clock was 0 at `boot`."""
    times = SPACINGS["at random"](rng, count, span)
    return flow(hz, times, hz * (begin - boot), DELAYS["LAN"], rng, begin=begin)


def numbers(flows: Sequence[List[Sample]]) -> List[Optional[int]]:
    return groups([(samples, measure(samples)) for samples in flows])


@pytest.mark.parametrize("hz", [1000, 1_000_000])
@pytest.mark.parametrize(("count", "span"), [(60, 20.0), (4, 0.05)], ids=["long", "too short for a rate"])
def test_flows_of_one_host_share_a_clock_and_those_of_others_do_not(hz: int, count: int, span: float) -> None:
    rng = random.Random(f"{hz} {count}")
    hosts = [(hz * (1 + rng.uniform(-60, 60) * 1e-6), rng.uniform(0, 4000)) for _ in range(10)]
    begins = sorted(rng.uniform(10_000, 10_060) for _ in range(80))
    owners = [rng.randrange(10) for _ in begins]
    found = numbers([sender(hosts[owner][0], begin, hosts[owner][1], rng, count, span) for owner, begin in zip(owners, begins)])
    pairs = set(zip(owners, found))
    assert len(pairs) == len(set(owners)) == len(set(found))
    assert None not in found


def test_numbers_count_from_1_in_the_order_of_the_flows() -> None:
    rng = random.Random(4)
    flows = [sender(1000, 10_000.0 + place, boot, rng) for place, boot in enumerate((5.0, 900.0, 5.0, 1700.0))]
    assert numbers(flows) == [1, 2, 1, 3]


def test_a_shared_clock_is_found_across_the_wrap_and_over_hours() -> None:
    rng = random.Random(6)
    boot = 10_000 - 2**32 / 1000 + 1800  # 2^32 is reached within half an hour
    flows = [sender(1000.05, 10_000.0 + 60 * minute, boot, rng, 40, 10) for minute in (0, 29, 31, 120, 240)]
    assert numbers(flows) == [1] * 5


def test_hosts_that_booted_a_second_apart_are_two() -> None:
    rng = random.Random(7)
    flows = [sender(1000, 10_000.0 + 10 * place, 5000.0 + place % 2, rng, 60, 60) for place in range(6)]
    assert numbers(flows) == [1, 2] * 3


def test_of_two_clocks_that_are_near_the_nearer_one_is_meant() -> None:
    rng = random.Random(10)
    boots = (5000.0, 4999.988, 4999.9935)  # the third is 6.5 ms from the first, and 5.5 ms from the second
    flows = [sender(1000, 10_000.0 + 5 * place, boot, rng, 400, 120 / 2**place) for place, boot in enumerate(boots)]
    assert numbers(flows) == [1, 2, 2]
    assert numbers([flows[0], flows[2]]) == [1, 1]


def test_a_constant_has_no_clock_and_a_lone_short_flow_none_that_could_be_told() -> None:
    rng = random.Random(8)
    constant = [(place * 10**9, 7) for place in range(5)]
    assert numbers([constant, constant, sender(1000, 50.0, 0.0, rng, 3, 0.01)]) == [None, None, None]


def test_thousands_of_flows_are_numbered_without_comparing_each_to_each(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(9)
    boots = [rng.uniform(0, 4e6) for _ in range(500)]
    owners = [rng.randrange(500) for _ in range(2000)]
    flows = [sender(1000, 1e7 + rng.uniform(0, 600), boots[owner], rng, 5, 0.1) for owner in owners]
    compared: List[Tuple[Any, Any]] = []
    from _tsproxy.tools.audit import clock

    honest = clock._meeting
    monkeypatch.setattr(clock, "_meeting", lambda one, other: (compared.append((one, other)), honest(one, other))[1])
    found = groups([(samples, None) for samples in flows])
    told = {(owner, number) for owner, number in zip(owners, found) if number}
    assert len(told) == len({number for _, number in told}) > 400
    assert len(compared) < 100 * len(flows)
