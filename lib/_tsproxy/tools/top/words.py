"""Figures as people read them, in few characters. Knows numbers and units; None, which is "not known", reads as a dash."""

from __future__ import annotations

from typing import Optional

UNKNOWN = "-"
_PREFIXES = ("", "k", "M", "G", "T", "P", "E")


def significant(value: float) -> str:
    """Three digits: 1.23, 12.3, 123; a whole number has nothing behind its point."""
    if value >= 99.95 or value == int(value):
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def scaled(value: Optional[float], unit: str) -> str:
    """With a decimal prefix: "12.3 MB", "0 B/s", "1.2k" where there is no unit."""
    if value is None:
        return UNKNOWN
    step = 0
    while value >= 999.5 and step < len(_PREFIXES) - 1:
        value, step = value / 1000, step + 1
    figure = f"{value:.2f}" if step and value < 9.995 else significant(value)
    return f"{figure} {_PREFIXES[step]}{unit}" if unit else f"{figure}{_PREFIXES[step]}"


def count(value: Optional[float]) -> str:
    """How many: "12,345", and from a million on "1.23M"."""
    if value is None:
        return UNKNOWN
    return f"{value:,.0f}" if value < 999_999.5 else scaled(value, "")


def counted(number: int, noun: str) -> str:
    """So many of these: "1 route", "12 routes"."""
    return f"{count(number)} {noun}{'' if number == 1 else 's'}"


def few(value: Optional[float]) -> str:
    """How many, in six columns: "12,345", and from a hundred thousand on "123k"."""
    return count(value) if value is None or value < 99_999.5 else scaled(value, "")


def per_second(value: Optional[float]) -> str:
    """How often: "120 /s", "0.5 /s"."""
    return UNKNOWN if value is None else f"{significant(value)} /s" if value < 999.5 else f"{count(value)} /s"


def micros(value: Optional[float]) -> str:
    """A time in microseconds: "33.8 us", "5.32 ms", "1.2 s", "2m 3s"."""
    if value is None:
        return UNKNOWN
    if value < 999.5:
        return f"{significant(value)} us"
    if value < 999_500:
        return f"{significant(value / 1000)} ms"
    return f"{significant(value / 1e6)} s" if value < 59_950_000 else seconds(value / 1e6)


def at_most(value: Optional[float], mark: str, beyond: float) -> str:
    """A time that is an upper limit, as `mark` says; infinite: it is longer than `beyond`."""
    if value == float("inf"):
        return f">{micros(beyond)}"
    return UNKNOWN if value is None else f"{mark}{micros(value)}"


def seconds(value: float) -> str:
    """A long time, its two largest units: "0.2 s", "10 s", "6m 40s", "2h 14m", "3d 4h"."""
    whole = round(value)
    if whole < 60:
        return f"{value:.1f} s" if 0 < value < 1 else f"{whole} s"
    for size, unit, smaller, name in ((86400, "d", 3600, "h"), (3600, "h", 60, "m")):
        if whole >= size:
            return f"{whole // size:,}{unit} {whole % size // smaller}{name}"
    return f"{whole // 60}m {whole % 60}s"
