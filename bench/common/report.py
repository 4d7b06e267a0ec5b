"""Figures for people (tables) and for programs (JSON lines)."""

from __future__ import annotations

import json
import sys
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

from common.figures import DIRECT, Row

Table = List[List[str]]  # rows of cells; the first row is the heading
Cells = Mapping[Tuple[str, str], Row]  # (relay, column) -> row


def say(text: str) -> None:
    """Progress, notes and warnings: standard error, so that standard output is the result alone."""
    print(text, file=sys.stderr, flush=True)


def json_line(benchmark: str, fields: Mapping[str, Any]) -> None:
    """One flat object, one line."""
    print(json.dumps({"benchmark": benchmark, **fields}), flush=True)


def plain(value: float) -> str:
    """Three or four digits, whatever the size."""
    if value >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def tables_of_cases(rows: Sequence[Row], titles: Mapping[str, str]) -> Iterator[Tuple[str, Table]]:
    """A table for each case, a column for each figure."""
    for case, title in titles.items():
        chosen = [row for row in rows if row.case == case]
        if chosen:
            yield title, comparison(chosen, lambda row: row.figure.label)


def comparison(rows: Sequence[Row], column_of: Callable[[Row], str]) -> Table:
    """A line for each relay, with each value's ratio to direct; then tsproxy's ratios to the best peer."""
    cells = {(row.relay, column_of(row)): row for row in rows}
    columns = list(dict.fromkeys(column for _, column in cells))
    relays = list(dict.fromkeys(relay for relay, _ in cells))
    ours = [relay for relay in relays if any(row.is_tsproxy and row.best_peer for row in rows if row.relay == relay)]
    lines = [["", *columns]]
    lines += [[relay, *(_cell(cells.get((relay, column))) for column in columns)] for relay in relays]
    lines += [["best peer", *(_best_peer(rows, column, column_of) for column in columns)]] if ours else []
    lines += [[f"{relay} : best peer", *(_to_peer(cells.get((relay, column))) for column in columns)] for relay in ours]
    return lines


def _cell(row: Optional[Row]) -> str:
    if row is None:
        return "-"
    return f"{plain(row.value)} {_ratio('' if row.relay == DIRECT else row.ratio_to_direct):>6}"


def beside_peer(row: Optional[Row]) -> str:
    """A cell with the ratio to the best peer."""
    return "-" if row is None else f"{plain(row.value)} {_ratio(row.ratio_to_best_peer):>6}"


def _best_peer(rows: Sequence[Row], column: str, column_of: Callable[[Row], str]) -> str:
    return next((row.best_peer for row in rows if column_of(row) == column and row.best_peer), "")


def _to_peer(row: Optional[Row]) -> str:
    return _ratio(row.ratio_to_best_peer) if row else ""


def _ratio(value: Any) -> str:
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}x" if isinstance(value, float) else ""


def show(title: str, table: Table) -> None:
    """Print a table: the first column to the left, the others to the right."""
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    print(f"\n{title}")
    for first, *others in table:
        print("  ".join(["", first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:]))]).rstrip())


def progress(text: str, settled: bool) -> None:
    """Where a long run stands: in place on a terminal; elsewhere only what is `settled`."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif settled:
        say(text)


def clear_progress() -> None:
    """What follows begins on a clean line."""
    progress("", settled=False)


def heading(facts: Dict[str, Any], ratio: str) -> None:
    """What was measured, where and how, in a few lines."""
    load = f"load generator {_loader(facts)}; Python {facts['python']}"
    print(f"{facts['benchmark']}: {facts['tested']}; Linux {facts['kernel']}; {load}")
    print(f"{facts['layout']}; {facts['network']}")
    how = f"{facts['statistic']} ({facts['rounds']} of {facts['seconds']:g} s, interleaved)"
    print(f"{how}; 1.23x: ratio to {ratio}")
    print(f"the load generator and far end {_loader(facts)} cost the same in every row: that is why the ratios are there")


def _loader(facts: Dict[str, Any]) -> str:
    """What it is written in."""
    return str(facts.get("load_generator", "in Python"))
