"""Standard output that nobody reads, that is closed, or that is full: it costs lines, never a byte of relaying."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

from _tsproxy.linux import uapi
from harness import Exchange, Proxy, free_port, receive_exactly, wait_until


def relay_some(address: Any, count: int) -> None:
    for _ in range(count):
        with socket.create_connection(address, 20) as client:
            client.sendall(b"x" * 100)
            assert len(receive_exactly(client, 100)) == 100


def free_address() -> Any:
    """With a dead stdout nobody can tell which port was picked."""
    return "127.0.0.1", free_port()


def answers(address: Any) -> bool:
    try:
        socket.create_connection(address, 1).close()
    except OSError:
        return False
    return True


def relays_and_drains(proxy: Proxy, address: Any, *said: str) -> None:
    """It serves, and it ends well, though its lines go nowhere."""
    wait_until(lambda: answers(address))
    relay_some(address, 50)
    proxy.process.send_signal(signal.SIGTERM)
    assert proxy.process.wait(20) == 0
    assert proxy.process.stderr is None or re.sub(r"\d+$", "N", proxy.stderr(), flags=re.M).splitlines() == list(said)


def test_a_stalled_reader_costs_lines_and_nothing_else(start: Any, echoing: Exchange) -> None:
    """The pipe is stalled under load; relaying goes on; afterwards each line has come or was counted as dropped."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, uapi.F_SETPIPE_SZ, 4096)
    proxy = start(echoing, stdout=writer)
    os.close(writer)
    total = 4500  # more than the pipe and the backlog of 4,096 lines hold
    with os.fdopen(reader, "rb") as stream:
        first = json.loads(stream.readline())
        relay_some((first["listen_address"], first["listen_port"]), total)
        fcntl.fcntl(stream, uapi.F_SETPIPE_SZ, 1 << 20)  # else each five lines are a switch to the other process, and back
        proxy.process.send_signal(signal.SIGTERM)
        lines = [json.loads(line) for line in stream]
    assert proxy.process.wait(20) == 0
    (last,) = (line for line in lines if line["event"] == "metrics")
    came = sum(line["event"] == "connection" for line in lines)
    assert last["downstream_cx_total"] == total
    assert last["log_lines_dropped_total"] > 0
    assert came + last["log_lines_dropped_total"] == total


def test_a_closed_reader_is_said_once_and_does_not_matter(start: Any, echoing: Exchange) -> None:
    reader, writer = os.pipe()
    address = free_address()
    proxy = start(echoing, f"-p{address[1]}", stdout=writer)
    os.close(writer)
    os.close(reader)
    relays_and_drains(proxy, address, "tsproxy.py: standard output: Broken pipe; no line is written any more")


def test_a_full_device_does_not_matter(start: Any, echoing: Exchange) -> None:
    address = free_address()
    with Path("/dev/full").open("wb") as full:
        proxy = start(echoing, f"-p{address[1]}", stdout=full)
    said = "tsproxy.py: standard output: No space left on device; trying again every 1 s; 4,096 lines are kept"
    lost = "tsproxy.py: standard output: lines that it did not take within 1 s, and that are lost: N"
    relays_and_drains(proxy, address, said, lost)


def test_started_with_closed_descriptors_no_client_gets_our_lines(start: Any, echoing: Exchange) -> None:
    """With 1 closed, the next socket would become 1, and the JSON lines would go to a client."""
    address = free_address()
    streams = {"stdout": subprocess.DEVNULL, "stderr": None}
    proxy = start(echoing, f"-p{address[1]}", preexec_fn=lambda: os.closerange(0, 3), **streams)
    relays_and_drains(proxy, address)


def test_lines_are_whole_when_standard_output_is_a_file(start: Any, echoing: Exchange, tmp_path: Path) -> None:
    path = tmp_path / "lines"
    with path.open("wb") as file:
        proxy = start(echoing, stdout=file)
    first = json.loads(wait_until(lambda: path.read_text().splitlines())[0])
    relay_some((first["listen_address"], first["listen_port"]), 100)
    proxy.process.send_signal(signal.SIGTERM)
    assert proxy.process.wait(20) == 0
    events = [json.loads(line)["event"] for line in path.read_text().splitlines()]
    assert (events[0], events[-2:]) == ("start", ["metrics", "stop"])
    assert sorted(events[1:-2]) == [*["connection"] * 100, "drain"]  # the last client's end and the signal may cross


def test_a_storm_of_sigusr1_costs_neither_the_signal_behind_it_nor_the_last_lines(start: Any, echoing: Exchange) -> None:
    proxy = start(echoing)
    proxy.line("start")
    for _ in range(50_000):
        os.kill(proxy.process.pid, signal.SIGUSR1)
    assert proxy.stop() == 0
    assert [line["event"] for line in proxy.lines if line["event"] != "metrics"] == ["start", "drain", "stop"]
    assert [line["event"] for line in proxy.lines[-2:]] == ["metrics", "stop"]
    told = [line for line in proxy.lines if "uptime_s" in line]
    for name in ("timestamp", "uptime_s"):
        assert [line[name] for line in told] == sorted(line[name] for line in told)
    assert proxy.stderr() == ""


def test_the_connection_log_can_be_switched_off(start: Any, echoing: Exchange) -> None:
    quiet = start(echoing, "--connection-log=off")
    relay_some(quiet.address, 3)
    assert quiet.stop() == 0
    assert [line["event"] for line in quiet.lines] == ["start", "drain", "metrics", "stop"]


def test_the_log_level_chooses_the_lines(start: Any) -> None:
    address = free_address()
    proxy = start(f"127.0.0.1:{free_port()}", f"-p{address[1]}", "--log-level=warning")
    wait_until(lambda: answers(address))
    assert proxy.line("connection")["reason"] == "connect_refused"
    assert proxy.stop() == 0
    assert {line["level"] for line in proxy.lines} == {"warning"}


def test_metrics_come_at_their_interval(start: Any, echoing: Exchange) -> None:
    command = start(echoing).command
    ticking = Proxy([word for word in command if word != "--metrics-interval=0"], "--metrics-interval=0.05")
    try:
        for _ in range(3):
            ticking.line("metrics", after=len(ticking.lines))
    finally:
        ticking.close()
    # Not interval_s: one line that was late makes the next interval shorter by that.
    uptimes = [line["uptime_s"] for line in ticking.lines if line["event"] == "metrics"]
    assert all(uptime >= number * 0.05 - 0.001 for number, uptime in enumerate(uptimes, 1))
