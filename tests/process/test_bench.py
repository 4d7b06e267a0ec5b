"""The benchmarks in their smallest form: what they promise to print, and that they end well. No figure is judged."""

from __future__ import annotations

import functools
import itertools
import json
import os
import select
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
from pathlib import Path
from time import monotonic_ns
from typing import Any, Callable, Dict, Iterator, List
from xml.etree import ElementTree

import pytest
from harness import ROOT, Exchange, echo, wait_until
from program import command_file, slow_but

BENCH = ROOT / "bench"
SMALL = {
    "hotpath": ["--seconds=0.01"],
    "latency": ["--seconds=0.1", "--rate=500", "--connections=1,3"],
    "throughput": ["--seconds=0.1", "--sizes=64,65536"],
    "connections": ["--seconds=0.1", "--idle=20", "--clients=2"],
    "workers": ["--seconds=0.1", "--workers=1,2", "--connections=2"],
    "startup": ["--seconds=0.1", "--workers=1,2"],
    "fairness": [
        "--seconds=0.1",
        "--warm-up=0.1",
        "--flooders=2",
        "--senders=2",
        "--readers=2",
        "--workers=1",
        "--only=slow,both",
    ],
}
if shutil.which("cc"):
    SMALL["versus"] = ["--seconds=0.2", "--megabytes=10", "--only=direct,naked,tsproxy,pp1,bulk,burst"]
OTHERS = ("flood_per_s", "bulk_gbit_per_s")  # what those beside the orders got: in so short a time perhaps nothing
MAY_BE_ZERO = ("unanswered", "kib_per_connection", "cpu_s_per_gib", *OTHERS)  # processor time comes in ticks of 10 ms
WRONG = ["--rounds=0", "--seconds=soon", "--only=nothing", "--svg=/nonexistent/x.svg", "--fast", "more"]
PEERS = ("haproxy", "nginx", "socat")
COMPARED = [name for name in SMALL if name != "hotpath"]
EACH = slow_but(["hotpath", "connections"], SMALL)
QUICK = ["--rounds=1", "--seconds=0.1", "--only=direct,tsproxy,closed"]
FIGURE = {"benchmark", "event", "case", "figure", "value", "rounds", "statistic"}


def bench(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / f"{name}.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)


def json_of(done: subprocess.CompletedProcess[str]) -> List[Dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


class Both:
    """One benchmark, run for a program and for people."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name, self.svg = name, directory / f"{name}.svg"
        self.lines = json_of(bench(name, "--rounds=2", *SMALL[name], "--json", f"--svg={self.svg}"))
        self.setup, self.figures = self.lines[0], [line for line in self.lines if line["event"] == "figure"]
        done = bench(name, "--rounds=1", *SMALL[name])
        assert done.returncode == 0, done.stderr
        self.table = done.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Both]:
    """Each benchmark is run once, when a test first asks for it."""
    directory = tmp_path_factory.mktemp("bench")
    return functools.lru_cache(maxsize=None)(lambda name: Both(name, directory))


Runs = Callable[[str], Both]


@pytest.mark.parametrize("name", EACH)
def test_json_lines_tell_the_setup_first_and_then_figures_above_zero(name: str, runs: Runs) -> None:
    ran = runs(name)
    assert ran.setup["event"] == "setup"
    assert {"kernel", "python", "layout", "rounds", "seconds", "statistic", "warnings"} <= set(ran.setup)
    assert ran.figures
    for line in ran.lines:
        assert line["benchmark"] == ran.name
    for line in ran.figures:
        assert set(line) >= FIGURE
        assert 1 <= len(line["rounds"]) <= 2  # a round in which the machine stood still, and nothing came back, has no figure
        assert min(line["rounds"]) <= line["value"] <= max(line["rounds"])
        may_be_zero = line["figure"] in MAY_BE_ZERO or line["case"].startswith("pieces")
        assert line["value"] > 0 or (may_be_zero and line["value"] == 0), line


def test_hotpath_figures_stand_beside_the_naked_system_calls(runs: Runs) -> None:
    for line in runs("hotpath").figures:
        assert line["baseline"].startswith("naked")
        assert line["ratio_to_baseline"] >= 0
        assert line["ratio_to_baseline"] == 1 or line["figure"] != line["baseline"]


@pytest.mark.parametrize("name", EACH[1:])
def test_every_compared_figure_stands_beside_direct_and_the_best_peer(name: str, runs: Runs) -> None:
    figures = runs(name).figures
    by_key = {(line["case"], line["figure"], line["relay"]): line for line in figures}
    for (case, figure, _), line in by_key.items():
        direct = by_key.get((case, figure, "direct"))
        if line["ratio_to_direct"] is not None:
            assert line["ratio_to_direct"] == pytest.approx(line["value"] / direct["value"], abs=1e-4)
        if line["best_peer"]:
            peers = [
                by_key[key]["value"] for key in by_key if key[:2] == (case, figure) and key[2] in ("haproxy", "nginx", "socat")
            ]
            best = (max if line["higher_is_better"] else min)(peers)
            assert by_key[case, figure, line["best_peer"]]["value"] == best
    assert any(line["is_tsproxy"] for line in figures)


@pytest.mark.slow
def test_latency_percentiles_rise_and_nothing_is_lost(runs: Runs) -> None:
    values = {(line["case"], line["relay"], line["figure"]): line["value"] for line in runs("latency").figures}
    assert {case for case, _, _ in values} == {"closed-1", "open-1", "closed-3", "open-3"}
    for case, relay, _ in values:
        curve = [values[case, relay, name] for name in ("p50_us", "p90_us", "p99_us", "p99_9_us", "max_us")]
        assert curve == sorted(curve)
        assert values.get((case, relay, "unanswered"), 0) == 0


@pytest.mark.slow
def test_startup_tells_what_routes_cost() -> None:
    words = ["--rounds=1", "--seconds=0.1", "--workers=1", "--only=tsproxy", "--routes=1,3", "--json"]
    told = {(line["case"], line["figure"]): line["value"] for line in json_of(bench("startup", *words))[1:]}
    for case in ("routes-1", "routes-3"):
        assert told[case, "pss_mib"] > told["workers-1", "pss_mib"] / 2
        assert told[case, "start_ms"] > 0
        assert told[case, "wakeups_per_s"] >= 0


@pytest.mark.slow
def test_fairness_tells_what_those_beside_the_orders_got(runs: Runs) -> None:
    figures = {(line["case"], line["figure"]) for line in runs("fairness").figures if line["relay"] == "tsproxy"}
    percentiles = {"p50_us", "p99_us", "p99_9_us", "max_us"}
    assert figures == {("slow-1", name) for name in percentiles} | {("both-1", name) for name in (*percentiles, *OTHERS)}


@pytest.mark.slow
def test_fairness_takes_orders_at_a_fixed_rate_too() -> None:
    words = [*SMALL["fairness"], "--only=quiet,direct,tsproxy", "--rate=200", "--rounds=1", "--workers=1,2", "--json"]
    values = {(line["case"], line["relay"], line["figure"]) for line in json_of(bench("fairness", *words))[1:]}
    assert {(case, relay, "p99_us") for case in ("quiet-1", "quiet-2") for relay in ("direct", "tsproxy")} <= values


@pytest.mark.usefixtures("room")
def test_the_relay_has_a_cpu_for_each_worker_and_the_loads_only_if_there_are_too_few() -> None:
    from common import layout

    assert layout.beside(frozenset([0]), [0, 1, 2, 3], 2) == {1, 2}
    assert layout.beside(frozenset([0]), [0, 1], 1) == {1}
    assert layout.beside(frozenset([0]), [0, 1], 2) == {0, 1}


@pytest.mark.parametrize("name", EACH)
def test_a_table_has_a_line_for_each_relay(name: str, runs: Runs) -> None:
    ran = runs(name)
    names = {line["relay"] if "relay" in line else line["figure"] for line in ran.figures}
    starts = [line.strip() for line in ran.table.splitlines()]
    for relay in names:
        assert any(line.startswith(relay) for line in starts), f"{relay} in {ran.table}"
    assert "Python" in ran.table
    assert "x" in ran.table.split("\n\n", 1)[1], "ratios"


@pytest.mark.parametrize("name", EACH)
def test_the_picture_is_well_formed_and_names_every_relay(name: str, runs: Runs) -> None:
    ran = runs(name)
    tree = ElementTree.parse(ran.svg).getroot()
    assert tree.tag == "{http://www.w3.org/2000/svg}svg"
    words = {element.text for element in tree.iter("{http://www.w3.org/2000/svg}text")}
    assert {line["relay"] if "relay" in line else line["figure"] for line in ran.figures} <= words
    drawn = {element.tag.split("}")[1] for element in tree.iter()}
    assert {"polyline", "line"} <= drawn or "rect" in drawn


@pytest.mark.slow
def test_a_runtime_that_the_version_lacks_is_named_so(runs: Runs) -> None:
    ran = runs("workers")
    seen = {line["relay"] for line in ran.figures}
    absent = {line["relay"]: line for line in ran.lines if line["event"] == "absent"}
    assert {"threads", "interpreters", "processes"} <= seen | set(absent)
    assert not seen & set(absent)
    for runtime, line in absent.items():
        assert line["reason"] == "not in this version"
        assert any(text.split() == [runtime, "not", "in", "this", "version"] for text in ran.table.splitlines())


@pytest.mark.slow
def test_a_runtime_that_is_taken_for_another_is_not_in_this_version(tmp_path: Path) -> None:
    always_threads = tmp_path / "always-threads"
    always_threads.write_text(
        "import signal, sys\n"
        "if '--version' in sys.argv: sys.exit()\n"
        """print('{"event":"start","runtime":"threads","listen_port":1}', flush=True)\n"""
        "signal.pause()\n"
    )
    done = bench("workers", *SMALL["workers"], "--rounds=1", f"--tsproxy={always_threads}", "--only=processes", "--json")
    assert done.returncode == 1, "nothing was measured"
    absent = json.loads(done.stdout.splitlines()[-1])
    assert (absent["event"], absent["relay"], absent["detail"]) == ("absent", "processes", "it takes threads instead")


@pytest.mark.slow
def test_pieces_are_the_relays_alone_and_leave_the_peers_out(tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    program = tmp_path / "tsproxy"
    program.write_text(
        f"import os, sys\nopen({str(asked)!r}, 'a').write(' '.join(sys.argv[1:]) + chr(10))\n"
        f"os.execv(sys.executable, [sys.executable, {str(ROOT / 'tsproxy.py')!r}, *sys.argv[1:]])\n"
    )
    words = [*SMALL["workers"], "--rounds=1", "--size=4096", "--pieces=1024", f"--tsproxy={program}"]
    done = bench("workers", *words, "--only=direct,threads,haproxy,nginx", "--json")
    assert done.returncode == 0, done.stderr
    figures = [line for line in map(json.loads, done.stdout.splitlines()) if line["event"] == "figure"]
    assert {line["relay"] for line in figures} == {"direct", "threads"}
    assert all(line["value"] > 0 for line in figures)
    started = [words for words in asked.read_text().splitlines() if "--workers" in words]
    assert [words.endswith("--buffer-size=1024 --zero-copy=never") for words in started] == [False, True, True], "a probe first"


@pytest.mark.usefixtures("room")
def test_a_far_end_that_wakes_for_whole_messages_answers_them_in_one_piece() -> None:
    from common import far_end

    cpus = frozenset(os.sched_getaffinity(0))
    with far_end.running(far_end.echo, cpus, wake_at=1000) as port, socket.create_connection(("127.0.0.1", port), 20) as client:
        client.sendall(bytes(999))
        assert not select.select([client], [], [], 0.05)[0]
        client.sendall(b"x")
        assert len(client.recv(4096)) == 1000


@pytest.mark.parametrize("name", [*SMALL, "audit"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_argument_costs_one_line_and_exit_2(name: str, wrong: str) -> None:
    done = bench(name, wrong)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{name}.py: error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", [*SMALL, "audit"])
def test_help_tells_how_to_read_the_result(name: str) -> None:
    done = bench(name, "--help")
    assert done.returncode == 0
    assert "How to read it:" in done.stdout


@pytest.fixture
def bare_python(tmp_path: Path) -> str:
    """A Python without any third-party package."""
    return command_file(tmp_path / "bare-python", sys.executable, "-I", "-S")


def test_versus_without_a_compiler_says_so_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH / "versus.py"), "--rounds=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100, env={"PATH": str(tmp_path)})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("versus: needs a C compiler")
    assert done.stderr.count("\n") == 1
    if "versus" not in SMALL:
        pytest.skip("LOUD: no C compiler, cc, here: bench/versus.py is NOT tested")


@pytest.mark.slow
@pytest.mark.skipif("versus" not in SMALL, reason="LOUD: no C compiler, cc, here: bench/versus.py is NOT tested")
def test_versus_shows_the_best_round_and_takes_other_relays_and_workers() -> None:
    other = f"twice={sys.executable} {ROOT / 'tsproxy.py'} -p {{port}} -t {{target}} --timestamps=preserve --workers=1"
    words = ["--rounds=2", "--seconds=0.2", "--workers=2", "--only=direct,tsproxy,pp1,mem", f"--proxy={other}", "--json"]
    setup, *figures = json_of(bench("versus", *words))
    assert "share CPU" in setup["layout"]
    assert {line["relay"] for line in figures} == {"direct", "tsproxy", "twice"}
    assert {(line["case"], line["figure"]) for line in figures} == {
        *(("pp1", name) for name in ("p50_us", "p99_9_us")),
        *(("mem", name) for name in ("kib_per_connection", "pss_mib")),
    }
    for line in figures:
        best = min(line["rounds"]) if line["figure"] == "p50_us" else statistics.median(line["rounds"])
        assert line["value"] == pytest.approx(best)
        assert line["statistic"].startswith("best" if line["figure"] == "p50_us" else "median")


@pytest.mark.parametrize("given", ["x", "x=echo {target}", "=echo {port}"])
def test_versus_refuses_a_proxy_that_is_no_command(given: str) -> None:
    done = bench("versus", f"--proxy={given}", "--rounds=1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(("versus: --proxy: given ", "versus: needs a C compiler"))


@pytest.mark.parametrize("name", COMPARED)
def test_without_docopt_it_says_how_to_make_a_bundle(name: str, bare_python: str) -> None:
    done = bench(name, f"--python={bare_python}")
    assert (done.returncode, done.stdout) == (2, "")
    assert "docopt-ng" in done.stderr
    assert "bundle OUT" in done.stderr
    assert "--tsproxy OUT" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_bundle_is_tested_on_a_bare_python(bundle: Path, bare_python: str) -> None:
    lines = json_of(bench("latency", *QUICK, "--json", f"--tsproxy={bundle}", f"--python={bare_python}"))
    assert {line["relay"] for line in lines[1:]} == {"direct", "tsproxy"}


def test_a_tsproxy_that_does_not_start_is_told_once_and_ends_with_1() -> None:
    done = bench("latency", *QUICK, "--rounds=2", "--options=--no-such-option")
    assert done.returncode == 1
    assert done.stderr.count("--no-such-option") == 1
    assert "direct" in done.stdout


@pytest.mark.slow
def test_audit_is_measured_beside_tshark_where_there_is_one(tmp_path: Path) -> None:
    words = ["--rounds=2", "--segments=200"]
    setup, *figures = json_of(bench("audit", *words, "--only=vxlan", "--json"))
    assert (setup["benchmark"], setup["event"], setup["segments"]) == ("audit", "setup", 200)
    tools = ["audit", "tshark"] if shutil.which("tshark") else ["audit"]
    wanted = {(tool, figure) for tool in tools for figure in ("seconds", "us_per_segment", "peak_mib")}
    assert {(line["tool"], line["figure"]) for line in figures} == wanted
    assert all(line.keys() >= FIGURE and line["value"] > 0 and len(line["rounds"]) == 2 for line in figures)
    ratios = {line["ratio_to_tshark"] is not None for line in figures if (line["tool"], line["figure"]) == ("audit", "seconds")}
    assert ratios == {len(tools) == 2}
    table = bench("audit", *words)
    assert table.returncode == 0, table.stderr
    assert all(f"{case}: audit" in table.stdout for case in ("stamped", "clean", "vxlan"))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["stamped", "clean", "vxlan"])
def test_the_captures_that_audit_is_measured_with_are_read_whole(case: str, tmp_path: Path) -> None:
    import audit

    audit.write(tmp_path / "x", case, 1000)
    command = [sys.executable, str(ROOT / "tsproxy.py"), "audit", str(tmp_path / "x"), "--json"]
    end = json.loads(subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()[-1])
    assert (end["segments"], end["flows"], end["segments_with_timestamps"]) == (1000, 40, 0 if case == "clean" else 1000)
    assert (end["verdict"], end["unparsed"]) == ("CLEAN" if case == "clean" else "LEAK", 0)


def test_fuzz_without_atheris_says_so_in_one_line() -> None:
    command = [sys.executable, "-I", "-S", str(BENCH / "fuzz.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "pip install atheris" in done.stderr


def test_hotpath_without_the_checkout_says_so_in_one_line(tmp_path: Path) -> None:
    shutil.copytree(BENCH, tmp_path / "bench", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-E", "-S", str(tmp_path / "bench/hotpath.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    assert (done.returncode, done.stdout) == (2, "")
    assert "lib/_tsproxy" in done.stderr
    assert done.stderr.count("\n") == 1


def test_without_a_private_namespace_it_measures_the_hosts_network_and_says_so() -> None:
    shell = 'echo 0 > /proc/sys/user/max_net_namespaces && exec "$@"'
    wrapped = ["unshare", "-r", "sh", "-c", shell, "sh"]
    if not _works([*wrapped, "true"]):
        pytest.skip("needs unshare(1) and user namespaces")
    command = [*wrapped, sys.executable, str(BENCH / "latency.py"), *QUICK, "--json"]
    setup, *figures = json_of(subprocess.run(command, capture_output=True, text=True, check=False, timeout=100))
    assert "no private namespace" in setup["network"]
    assert f"--timestamps={setup['timestamps']}" in setup["network"]
    assert figures


def _works(command: List[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_with_everything_it_started(number: int, code: int) -> None:
    command = [sys.executable, str(BENCH / "latency.py"), "--rounds=1000", "--seconds=60", "--only=tsproxy,closed"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        wait_until(lambda: len(_children(running.pid)) == 3, "far end, relay and load are there")
        started = _children(running.pid)
        os.killpg(running.pid, number) if number == signal.SIGINT else running.send_signal(number)
        out, err = running.communicate(timeout=20)
    finally:
        running.kill()
        running.communicate()
    assert (running.returncode, out) == (code, "")
    assert "Traceback" not in err
    assert not [pid for pid in started if Path(f"/proc/{pid}").exists()]


def _children(parent: int) -> List[int]:
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path("/proc", entry, "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.append(int(entry))
    return found


# What the figures rest on


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """bench/'s own modules can be imported."""
    monkeypatch.syspath_prepend(str(BENCH))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "common"]:
        del sys.modules[name]


@pytest.mark.usefixtures("room")
def test_the_load_has_the_first_cpu_and_the_relay_another() -> None:
    from common import layout

    assert layout.pair([3, 4, 5]) == ({3}, {4, 5})
    assert layout.pair([2]) == ({2}, {2})
    assert layout.halves([0, 1, 2, 3, 4]) == ({0, 1}, {2, 3, 4})
    assert layout.halves([6, 7]) == ({6, 7}, {6, 7})
    usable = os.sched_getaffinity(0)
    found = layout.pair(None)
    assert found.load | found.relay <= usable
    assert (found.load != found.relay) == (len(usable) > 1)


@pytest.mark.usefixtures("room")
def test_a_percentile_is_the_smallest_value_that_enough_are_not_above() -> None:
    from common.load import percentile

    values = list(range(1, 101))
    assert [percentile(values, share) for share in (0.5, 0.9, 0.99, 0.999, 1.0)] == [50, 90, 99, 100, 100]
    assert percentile([7], 0.5) == 7


@pytest.mark.usefixtures("room")
def test_an_open_loop_makes_every_message_pay_for_the_stall_it_was_due_in() -> None:
    from common import open_loop

    stalled = threading.Event()

    def stall_once(client: Any) -> None:
        if not stalled.is_set():
            client.recv(1)
            stalled.set()
            threading.Event().wait(0.3)  # the stall itself
            client.send(b"x")
        echo(client)

    far = Exchange(stall_once)
    try:
        sample = open_loop.fixed_rate(far.port, 1, 1, 1000, 0.5)
    finally:
        far.close()
    assert stalled.is_set()
    assert sample["unanswered"] == 0
    # Message i was due i ms after the first: of 500, the 51st slowest waited at least 250 of the 300 ms.
    assert sample["p90_us"] >= 249_000


@pytest.mark.usefixtures("room")
def test_an_open_loop_counts_what_never_comes_back_with_the_time_it_waited() -> None:
    from common import open_loop

    def answer_one(client: Any) -> None:
        client.send(client.recv(1))
        while client.recv(4096):
            pass

    far = Exchange(answer_one)
    try:
        sample = open_loop.fixed_rate(far.port, 1, 1, 100, 0.1)
    finally:
        far.close()
    assert sample["unanswered"] == 9
    assert sample["p50_us"] >= 1_900_000, "the wait for the last answers is counted"


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize("connections", [1, 3])
def test_a_closed_loop_sends_nothing_before_the_whole_message_has_come_back(connections: int) -> None:
    from common import load

    too_soon = []

    def in_halves(client: Any) -> None:
        while data := client.recv(1 << 16):
            client.sendall(data[: len(data) // 2])
            came = select.select([client], [], [], 0.01)[0]
            too_soon.append(bool(came and client.recv(1, socket.MSG_PEEK)))  # at the end of its time the load closes
            client.sendall(data[len(data) // 2 :])

    far = Exchange(in_halves)
    try:
        sample = load.ping_pong(far.port, 1000, connections, load.Span.lasting(0.1))
    finally:
        far.close()
    assert sample["round_trips_per_s"] > 0
    assert not any(too_soon)


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize("connections", [1, 3])
def test_an_answer_of_which_a_part_is_there_already_is_waited_for(connections: int) -> None:
    from common import load

    def ahead(client: Any) -> None:
        """With each answer comes half of the next one, whose other half comes alone, when the load waits for it."""
        sizes = itertools.cycle((1500, 500))
        while client.recv(1 << 16):
            select.select([], [], [], 0.01)
            client.sendall(bytes(next(sizes)))

    far = Exchange(ahead)
    try:
        assert load.ping_pong(far.port, 1000, connections, load.Span.lasting(0.1))["round_trips_per_s"] > 0
    finally:
        far.close()


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize("connections", [1, 3])
def test_an_answer_that_is_awaited_for_the_whole_span_counts(connections: int) -> None:
    from common import load

    def late(client: Any) -> None:
        while data := client.recv(1 << 16):
            select.select([], [], [], 0.4)  # the stall itself
            client.sendall(data)

    far = Exchange(late)
    try:
        begin = monotonic_ns() + 100_000_000
        sample = load.ping_pong(far.port, 100, connections, load.Span(begin, begin + 100_000_000))
    finally:
        far.close()
    assert sample["p50_us"] >= 400_000


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize("connections", [1, 3])
def test_a_relay_that_stands_still_is_a_failed_measurement(connections: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from common import load, trouble

    monkeypatch.setattr(load, "_STALLED_S", 1)
    far = Exchange(lambda client: client.recv(1 << 16) and client.recv(1))
    try:
        with pytest.raises(trouble.Failed, match="no byte came for 1 s"):
            load.ping_pong(far.port, 100, connections, load.Span.lasting(0.5))
    finally:
        far.close()


@pytest.mark.usefixtures("room")
def test_an_answer_that_is_cut_short_is_a_failed_measurement() -> None:
    from common import load, trouble

    far = Exchange(lambda client: client.sendall(client.recv(1 << 16)[:60]))
    try:
        with pytest.raises(trouble.Failed, match="after 60 of 100 bytes"):
            load.ping_pong(far.port, 100, 1, load.Span.lasting(0.5))
    finally:
        far.close()


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize("connections", [1, 3])
def test_a_relay_that_hangs_up_is_a_failed_measurement(connections: int) -> None:
    from common import load, trouble

    far = Exchange(lambda client: client.recv(1))
    try:
        with pytest.raises((trouble.Failed, ConnectionError)):
            load.ping_pong(far.port, 1, connections, load.Span.lasting(0.5))
    finally:
        far.close()


@pytest.mark.usefixtures("room")
def test_the_median_of_the_rounds_is_compared_with_direct_and_the_best_peer() -> None:
    from common import figures

    rate = figures.Figure("rate", "rate", True)
    samples = {"direct": [10, 30, 20], "tsproxy": [9, 8, 1], "haproxy": [5, 5, 5], "nginx": [4, 4, 4]}
    results = {"case": {relay: [{"rate": value} for value in values] for relay, values in samples.items()}}
    by_relay = {row.relay: row for row in figures.rows(results, {"case": [rate]}, {"haproxy", "nginx"})}
    assert by_relay["tsproxy"].value == 8
    assert by_relay["tsproxy"].ratio_to_direct == 0.4
    assert (by_relay["tsproxy"].best_peer, by_relay["tsproxy"].ratio_to_best_peer) == ("haproxy", 1.6)
    assert (by_relay["direct"].best_peer, by_relay["direct"].ratio_to_direct) == (None, 1.0)
    assert [row.is_tsproxy for row in by_relay.values()] == [False, True, False, False]


@pytest.mark.usefixtures("room")
def test_the_naked_loop_is_neither_tsproxy_nor_a_peer() -> None:
    from common import figures

    rate = figures.Figure("rate", "rate", True, takes_best=True)
    results = {"case": {name: [{"rate": 3}, {"rate": 9}] for name in ("naked-spin", "tsproxy", "nginx")}}
    rows = list(figures.rows(results, {"case": [rate]}, {"nginx"}))
    assert [(row.relay, row.is_tsproxy, row.best_peer) for row in rows] == [
        ("naked-spin", False, "nginx"),
        ("tsproxy", True, "nginx"),
        ("nginx", False, "nginx"),
    ]
    assert {row.value for row in rows} == {9}


@pytest.mark.usefixtures("room")
def test_an_axis_covers_its_values_with_round_numbers() -> None:
    from common.charts import nice_steps

    assert nice_steps(3, 97, is_log=False) == [0, 20, 40, 60, 80, 100]
    assert nice_steps(30, 700, is_log=True) == [20, 50, 100, 200, 500, 1000]
