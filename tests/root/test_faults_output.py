"""Standard output that stalls, closes or is full: it costs no client, no CPU, no memory; and the lines come back with it.

What the writer does with each line is in test_line_writer.py, how much is dropped under load in test_stdout.py.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Iterator, List

import pytest
from faults import Stand, held, make_stand, sleeps
from harness import PATIENCE, Line, Proxy, wait_until

pytestmark = pytest.mark.root

F_SETPIPE_SZ = 1031
ASKED = 150


@pytest.fixture
def stand(bundle: Path) -> Iterator[Stand]:
    """One stand: the lines are the main process's affair, whatever the runtime."""
    yield from make_stand("processes from checkout", bundle)


@contextlib.contextmanager
def into_a_small_pipe(stand: Stand) -> Iterator[tuple[Proxy, int]]:
    """A proxy whose lines go into a pipe of one page; its `start` line has been read."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, F_SETPIPE_SZ, 4096)
    proxy = stand.start(stdout=writer)
    os.close(writer)
    proxy.lines.append(json.loads(os.read(reader, 4096)))
    try:
        yield proxy, reader
    finally:
        with contextlib.suppress(OSError):
            os.close(reader)


def serves_and_sleeps(stand: Stand, proxy: Proxy) -> None:
    """As if somebody read its lines."""
    for _ in range(8):
        stand.ask(proxy)
    wait_until(stand.is_quiet, "nothing is open")
    before = held(proxy)
    for _ in range(ASKED):
        stand.ask(proxy)
    wait_until(lambda: held(proxy)[:2] == before[:2], "as before")
    assert held(proxy).rss_kib - before.rss_kib < 1024
    sleeps(proxy)


def lines_of(data: bytes) -> List[Line]:
    assert data.endswith(b"\n")
    return [json.loads(line) for line in data.splitlines()]


def test_a_reader_that_stalls_costs_nothing_and_gets_all_lines_when_it_reads_again(stand: Stand) -> None:
    with into_a_small_pipe(stand) as (proxy, reader):
        serves_and_sleeps(stand, proxy)
        proxy.process.send_signal(signal.SIGTERM)
        lines = lines_of(b"".join(iter(lambda: os.read(reader, 65536), b"")))
        assert proxy.process.wait(PATIENCE) == 0
    assert sum(line["event"] == "connection" for line in lines) == ASKED + 8
    assert [line["event"] for line in lines[-2:]] == ["metrics", "stop"]
    assert lines[-2]["log_lines_dropped_total"] == 0


def test_a_reader_that_never_reads_again_does_not_hold_the_end_up(stand: Stand) -> None:
    with into_a_small_pipe(stand) as (proxy, _):
        serves_and_sleeps(stand, proxy)
        proxy.process.send_signal(signal.SIGTERM)
        assert proxy.process.wait(PATIENCE) == 0
        assert "lines that it did not take within 1 s, and that are lost: " in proxy.stderr()


def test_a_reader_that_is_gone_costs_nothing(stand: Stand) -> None:
    with into_a_small_pipe(stand) as (proxy, reader):
        stand.ask(proxy)
        os.close(reader)
        serves_and_sleeps(stand, proxy)
        assert proxy.stop() == 0
        assert proxy.stderr() == "tsproxy.py: standard output: Broken pipe; no line is written any more\n"


def test_a_disk_that_is_full_costs_nothing_and_gets_all_lines_when_it_has_room(stand: Stand, tmp_path: Path) -> None:
    command = f'mount -t tmpfs -o size=32k tmpfs {tmp_path} && exec "$@" >>{tmp_path}/lines'
    proxy = stand.start(wrap=("unshare", "--mount", "sh", "-c", command, "sh"), stdout=subprocess.DEVNULL)
    disk = Path(f"/proc/{proxy.process.pid}/root{tmp_path}")  # as its mount namespace has it
    log = disk / "lines"
    wait_until(lambda: log.exists() and log.read_bytes().endswith(b"\n"), "the start line is on the disk")
    proxy.lines.append(json.loads(log.read_bytes()))
    serves_and_sleeps(stand, proxy)
    assert os.statvfs(disk).f_bavail == 0
    subprocess.run(
        ["nsenter", f"--mount=/proc/{proxy.process.pid}/ns/mnt", "mount", "-o", "remount,size=4m", tmp_path], check=True
    )
    wait_until(lambda: log.read_bytes().count(b'"connection"') == ASKED + 8, "the lines that were kept are on the disk")
    stand.ask(proxy)
    wait_until(lambda: log.read_bytes().count(b'"connection"') == ASKED + 9, "new lines come, too")
    with log.open("rb") as file:  # the mount namespace goes with the process
        assert proxy.stop() == 0
        lines = lines_of(file.read())
    assert [line["event"] for line in lines[-2:]] == ["metrics", "stop"]
    assert lines[-2]["log_lines_dropped_total"] == 0
    said = set(proxy.stderr().splitlines())
    assert said == {"tsproxy.py: standard output: No space left on device; trying again every 1 s; 4,096 lines are kept"}
