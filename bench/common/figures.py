"""From samples to figures: the median of the rounds, and its ratio to no relay and to the best peer."""

from __future__ import annotations

import statistics
from typing import Any, Collection, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

DIRECT = "direct"
OURS = "tsproxy"
NAKED = "naked"  # a loop in C with nothing but the system calls: the limit, no peer
STATISTIC, BEST = "median of the rounds", "best of the rounds"

Samples = List[Dict[str, Any]]  # one for each round
Results = Dict[str, Dict[str, Samples]]  # case -> relay -> samples


class Figure(NamedTuple):
    """Something that a sample tells: its key there (with the unit), and how people read it."""

    key: str
    label: str
    higher_is_better: bool
    is_compared: bool = True  # False: it tells of the measurement, not of the relay
    takes_best: bool = False  # of the rounds, instead of their median

    def of(self, rounds: Sequence[float]) -> float:
        """What is shown of the rounds."""
        if self.takes_best:
            return max(rounds) if self.higher_is_better else min(rounds)
        return statistics.median(rounds)


class Row(NamedTuple):
    """One figure of one relay in one case."""

    case: str
    relay: str
    is_tsproxy: bool
    figure: Figure
    rounds: List[float]
    value: float
    ratio_to_direct: Optional[float]
    best_peer: Optional[str]
    ratio_to_best_peer: Optional[float]

    def fields(self) -> Dict[str, Any]:
        """Its JSON line."""
        statistic = BEST if self.figure.takes_best else STATISTIC
        better = {"higher_is_better": self.figure.higher_is_better, "statistic": statistic}
        return {"event": "figure", **self._asdict(), "figure": self.figure.key, **better}


def rows(results: Results, figures: Mapping[str, Sequence[Figure]], peers: Collection[str]) -> Iterator[Row]:
    """Every figure (by case) of every relay. What is neither direct nor naked nor among the peers is tsproxy."""
    for case, by_relay in results.items():
        for figure in figures[case]:
            rounds = {relay: _taken(samples, figure) for relay, samples in by_relay.items()}
            yield from _compared(case, figure, {relay: taken for relay, taken in rounds.items() if taken}, peers)


def _taken(samples: Samples, figure: Figure) -> List[float]:
    """Not every relay has every figure: direct has no process whose time could be taken."""
    return [sample[figure.key] for sample in samples if figure.key in sample]


def _compared(case: str, figure: Figure, rounds: Mapping[str, List[float]], peers: Collection[str]) -> Iterator[Row]:
    values = {relay: figure.of(taken) for relay, taken in rounds.items()}
    base = values if figure.is_compared else {}
    rivals = {relay: value for relay, value in base.items() if relay in peers}
    best = (max if figure.higher_is_better else min)(rivals, key=rivals.__getitem__, default=None)
    for relay, value in values.items():
        ours = relay != DIRECT and relay not in peers and not relay.startswith(NAKED)
        peer = best if relay != DIRECT else None
        to_direct, to_peer = _ratio(value, base.get(DIRECT)), _ratio(value, rivals.get(peer or ""))
        yield Row(case, relay, ours, figure, rounds[relay], value, to_direct, peer, to_peer)


def _ratio(value: float, base: Optional[float]) -> Optional[float]:
    return round(value / base, 4) if base else None


def curve(samples: Samples) -> List[Tuple[float, float]]:
    """The samples' curves as one: the median at each point that all rounds have."""
    points: Dict[float, List[float]] = {}
    for sample in samples:
        for x, y in sample["curve"]:
            points.setdefault(x, []).append(y)
    return [(x, statistics.median(ys)) for x, ys in sorted(points.items()) if len(ys) == len(samples)]
