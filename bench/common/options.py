"""The command line that all benchmarks share. A mistake costs one line on standard error and exit code 2."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import Callable, List, NoReturn, Optional, Sequence

CHECKOUT = Path(__file__).resolve().parent.parent.parent


class Parser(argparse.ArgumentParser):
    """argparse, without the usage text before its one line."""

    def error(self, message: str) -> NoReturn:
        """One line, exit 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(low: float, high: float) -> Callable[[str], float]:
    """A type for a number from `low` to `high`."""

    def parse(text: str) -> float:
        value = float(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not from {low:g} to {high:g}")
        return value

    parse.__name__ = "number"
    return parse


def whole(low: int, high: int) -> Callable[[str], int]:
    """A type for a whole number from `low` to `high`."""

    def parse(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return value

    parse.__name__ = "whole number"
    return parse


def wholes(low: int, high: int) -> Callable[[str], List[int]]:
    """A type for a comma-separated list of different whole numbers."""
    one = whole(low, high)

    def parse(text: str) -> List[int]:
        return list(dict.fromkeys(one(part) for part in text.split(",")))

    parse.__name__ = "list of whole numbers"
    return parse


def cpus(text: str) -> List[int]:
    """A type for CPUs that this process may use, in the order given."""
    usable = os.sched_getaffinity(0)
    found = wholes(0, 1 << 16)(text)
    if not usable.issuperset(found):
        raise argparse.ArgumentTypeError(f"{text!r} is not among the usable CPUs: {', '.join(map(str, sorted(usable)))}")
    return found


def _new_file(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"can't write {text!r}")
    return path


def program(text: str) -> Path:
    """A type for a program's file."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"no such file: {text!r}")
    return Path(text).resolve()


def _names(known: Sequence[str]) -> Callable[[str], List[str]]:
    def parse(text: str) -> List[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return names

    return parse


def parser(manual: Optional[str], names: Sequence[str], rounds: int, seconds: float) -> Parser:
    """What every benchmark takes. `names` is what --only may choose from."""
    made = Parser(description=manual, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    made.add_argument("--rounds", type=whole(1, 1000), default=rounds, help="how often each is measured (default: %(default)s)")
    made.add_argument(
        "--seconds", type=number(0.01, 3600), default=seconds, help="how long each measurement takes (default: %(default)s)"
    )
    made.add_argument("--only", type=_names(names), default=[], metavar="NAMES", help=f"comma-separated: {', '.join(names)}")
    made.add_argument("--json", action="store_true", help="JSON lines instead of tables")
    made.add_argument("--svg", type=_new_file, metavar="FILE", help="also write a picture")
    made.add_argument("--cpus", type=cpus, help="the first for load and far end, the rest for the relay, e.g. 2,3")
    return made


def with_relays(made: Parser) -> Parser:
    """What the benchmarks that start relays take besides."""
    made.add_argument(
        "--tsproxy", type=program, default=CHECKOUT / "tsproxy.py", metavar="PATH", help="test another, e.g. a bundle"
    )
    made.add_argument("--python", default=sys.executable, metavar="PY", help="what runs tsproxy (default: this Python)")
    made.add_argument(
        "--options", type=shlex.split, default=[], metavar="WORDS", help="more for tsproxy: --options='--buffer-size=256k'"
    )
    return made
