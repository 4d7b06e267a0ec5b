"""The line writer on a disk that is full: what the backlog holds is written later, what is beyond it is counted."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Iterator

import pytest
from line_station import BACKLOG, Station, appending, lines_of
from namespaces import require_root


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB of its own."""
    require_root()
    where = tmp_path / "disk"
    where.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(where)], check=True)
    try:
        yield where
    finally:
        subprocess.run(["umount", str(where)], check=True)


@pytest.mark.root
def test_a_full_disk_is_tried_again_by_the_clock_and_loses_nothing_that_the_backlog_holds(tiny_disk: Path) -> None:
    (tiny_disk / "ballast").write_bytes(b"x" * 40_000)
    log = tiny_disk / "log"
    with appending(log) as fd:
        station = Station(fd)
        station.say(*lines_of(0, 1000, 99))
        full = log.stat().st_size
        assert 0 < full < 99_000
        assert full % 99  # the last write was taken in part, in the middle of a line
        assert not station.outlet.awaits_pollout  # no spinning: only the clock brings the next try
        station.outlet.write()
        station.later()
        assert (log.stat().st_size, station.dropped) == (full, 0)
        assert station.complaints == ["No space left on device; trying again every 1 s; 4,096 lines are kept"]
        (tiny_disk / "ballast").unlink()
        station.later()
        assert log.stat().st_size > full
        subprocess.run(["mount", "-o", "remount,size=1m", str(tiny_disk)], check=True)
        station.later()
        assert station.outlet.is_empty
        assert log.read_bytes() == b"".join(lines_of(0, 1000, 99))
        assert station.dropped == 0
        assert len(station.complaints) == 2, "once for each time that it was full"


@pytest.mark.root
def test_a_disk_that_stays_full_costs_what_is_beyond_the_backlog(tiny_disk: Path) -> None:
    log = tiny_disk / "log"
    with appending(log) as fd:
        station = Station(fd)
        for number in range(3 * BACKLOG):
            station.say(*lines_of(number, 1, 99))
        station.outlet.discard_queue()
        whole = log.read_bytes().count(b"\n")
        assert whole + station.dropped == station.put
        assert log.read_bytes().startswith(b"".join(lines_of(0, whole, 99)))
