"""What `audit` shows of clocks: the fields of `--json`, the words for people, the picture of `--svg`."""

from __future__ import annotations

import json
import random
import re
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence, Tuple

import pytest
from _tsproxy.tools.audit import observer, picture
from _tsproxy.tools.audit.flows import Flows
from _tsproxy.tools.audit.report import report
from _tsproxy.tools.audit.scope import Scope
from audit_captures import ACK, BEGIN, SECOND, SYN, Segment, flow, write
from harness import CHECKOUT
from hypothesis import given, settings
from hypothesis import strategies as st

SVG = "{http://www.w3.org/2000/svg}"
BOOT = BEGIN - 200_000 * SECOND


def clocked(source: str, port: int, to: str, hz: float, begin_s: float, boot: int = BOOT, count: int = 60) -> List[Segment]:
    """A flow of a host whose clock was 0 at `boot`, over twenty seconds from `begin_s` on."""
    rng = random.Random(f"{source} {port}")
    times = [BEGIN + round((begin_s + at) * SECOND) for at in sorted(rng.uniform(0, 20) for _ in range(count))]
    return [
        Segment(at + 50_000, (source, port), (to, 443), ACK if place else SYN, 100 + place, int((at - boot) * hz / 1e9) % 2**32)
        for place, at in enumerate(times)
    ]


HOSTS = [
    *clocked("10.0.0.1", 1, "192.0.2.1", 1000.4, 0),
    *clocked("10.0.0.1", 2, "192.0.2.2", 1000.4, 30),
    *clocked("10.0.0.2", 1, "192.0.2.1", 1_000_000, 5, BOOT - 77),
    *clocked("10.0.0.3", 1, "192.0.2.1", 250, 10, BOOT - 9_000_000 * SECOND),
    *flow(("10.0.0.4", 1), ("192.0.2.1", 443), tsvals=(7,) * 5),
    *flow(("10.0.0.5", 1), ("192.0.2.1", 443)),
    *flow(("10.0.0.6", 1), ("192.0.2.1", 443), tsvals=(5, 900)),
]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*CHECKOUT, "audit", *words], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("hosts") / "pcap", HOSTS)


@pytest.fixture(scope="module")
def drawn(hosts: Path) -> ElementTree.Element:
    run(str(hosts), f"--svg={hosts.parent / 'svg'}")
    return ElementTree.fromstring((hosts.parent / "svg").read_text())


# --json


def test_each_leaking_flow_has_its_clock_in_json(hosts: Path) -> None:
    done = run(str(hosts), "--json")
    flows = {
        (line["source"], line["source_port"]): line for line in map(json.loads, done.stdout.splitlines()) if "source" in line
    }
    one, two = flows["10.0.0.1", 1], flows["10.0.0.1", 2]
    assert one["clock_hz_low"] <= 1000.4 <= one["clock_hz_high"]
    assert (one["clock_class"], one["clock_group"]) == ("1000 Hz", two["clock_group"])
    assert abs(one["skew_ppm"] - 400) <= one["skew_ppm_error"] < 100
    assert flows["10.0.0.2", 1]["clock_class"] == "1 MHz"
    assert flows["10.0.0.3", 1]["clock_class"] == "250 Hz"
    assert len({flows[source, 1]["clock_group"] for source in ("10.0.0.1", "10.0.0.2", "10.0.0.3")}) == 3
    constant = flows["10.0.0.4", 1]
    assert (constant["verdict"], constant["clock_class"], constant["clock_group"]) == ("CONSTANT", "constant", None)
    for source in ("10.0.0.5", "10.0.0.6"):
        assert {flows[source, 1][name] for name in flows[source, 1] if "clock" in name or "skew" in name} == {None}


# For people


def paragraph(text: str, head: str) -> List[str]:
    """The lines of one clock, without the blanks that set them in."""
    lines = [line.strip() for line in text.splitlines()]
    start = next(place for place, line in enumerate(lines) if line.startswith(head))
    return [re.sub(" +", " ", line) for line in lines[start : start + 5]]


def test_people_read_whose_clock_it_is_how_fast_how_far_off_and_for_how_long(hosts: Path) -> None:
    text = run(str(hosts)).stdout
    clock, source, rate, skew, uptime = paragraph(text, "clock 1: ")
    assert clock == "clock 1: 1000 Hz, 2 flows"
    assert source == "from 10.0.0.1"
    assert re.fullmatch(r"rate 1000\.[34]\d+ to 1000\.[45]\d+ Hz \(95 %\), over 19\.\d s", rate)
    assert re.fullmatch(r"skew \+[34]\d\d ppm, error \d+ ppm", skew)
    assert uptime == "uptime 2 d 7 h, or that and n times 49 d 16 h, if it counts from boot"
    assert max(map(len, text.splitlines())) <= 80


def test_long_addresses_do_not_make_a_line_of_more_than_80_columns(tmp_path: Path) -> None:
    sources = [f"2001:db8:1111:2222:3333:4444:5555:{place}" for place in range(4000, 4005)]
    segments = [segment for source in sources for segment in clocked(source, 1, "2001:db8:aaaa:bbbb:cccc:dddd:eeee:1", 1000, 0)]
    text = run(str(write(tmp_path / "pcap", segments))).stdout
    assert "and 2 more: they share one clock" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80


def test_an_uptime_is_told_only_where_one_offset_is_used_towards_two_hosts(hosts: Path) -> None:
    text = run(str(hosts)).stdout
    assert text.count("    uptime  ") == 1
    assert "it may be random, as Linux has it." in " ".join(text.split())


def test_addresses_that_share_a_clock_are_named_together(tmp_path: Path) -> None:
    segments = [*clocked("10.0.0.1", 1, "192.0.2.1", 1000, 0), *clocked("10.0.0.9", 1, "192.0.2.1", 1000, 3)]
    text = run(str(write(tmp_path / "pcap", segments))).stdout
    assert paragraph(text, "clock 1: ")[1] == "from 10.0.0.1, 10.0.0.9: they share one clock"
    assert "clock 2" not in text


def test_a_clean_capture_says_nothing_of_clocks(tmp_path: Path) -> None:
    text = run(str(write(tmp_path / "pcap", flow(("10.0.0.5", 1), ("192.0.2.1", 443))))).stdout
    assert "clock" not in text


# The picture


def flows_of(svg: ElementTree.Element) -> Dict[str, str]:
    """The source of each flow that is drawn, and its colour."""
    found = {}
    for group in svg.iter(f"{SVG}g"):
        for element in group:
            if element.get("class") == "flow":
                title = element.findtext(f"{SVG}title")
                assert title
                found[title.split(" to ")[0]] = group.get("class", "")
    return found


def test_each_flow_with_tsopt_is_drawn_in_the_colour_of_its_clock(drawn: ElementTree.Element) -> None:
    found = flows_of(drawn)
    assert set(found) == {"10.0.0.1:1", "10.0.0.1:2", "10.0.0.2:1", "10.0.0.3:1", "10.0.0.4:1", "10.0.0.6:1"}
    assert found["10.0.0.1:1"] == found["10.0.0.1:2"]
    assert len({found[name] for name in ("10.0.0.1:1", "10.0.0.2:1", "10.0.0.3:1", "10.0.0.4:1")}) == 4


def test_the_picture_has_the_verdict_a_legend_and_the_clocks_by_name(drawn: ElementTree.Element) -> None:
    text = " ".join("".join(element.itertext()) for element in drawn.iter(f"{SVG}text"))
    for words in (
        "LEAK",
        "6 of 7 flows",
        "A line: a flow",
        "clock 1",
        "1000 Hz",
        "2 flows from 10.0.0.1",
        "seconds since 2026-",
    ):
        assert words in text


def numbers(svg: ElementTree.Element) -> Iterator[Tuple[float, float]]:
    for element in svg.iter():
        for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", element.get("d", "")):
            yield float(x), float(y)


def test_nothing_is_drawn_beyond_the_picture(drawn: ElementTree.Element) -> None:
    width, height = float(drawn.get("width", 0)), float(drawn.get("height", 0))
    assert all(0 <= x <= width and 0 <= y <= height for x, y in numbers(drawn))


def luminance(colour: str) -> float:
    """https://www.w3.org/TR/WCAG21/#dfn-relative-luminance."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_each_colour_stands_out_from_the_ground(drawn: ElementTree.Element, scheme: str) -> None:
    style = drawn.findtext(f"{SVG}style")
    assert style
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    colours = dict(re.findall(r"\.(\w+)\{(?:fill|stroke):(#\w{6})\}", light if scheme == "light" else dark))
    ground = luminance(colours.pop("ground"))
    colours.pop("rule")
    assert len(colours) > 15
    for name, colour in colours.items():
        brighter, darker = sorted((luminance(colour), ground), reverse=True)
        assert (brighter + 0.05) / (darker + 0.05) >= 4.5, name


def test_more_clocks_than_lanes_are_drawn_all_the_same(tmp_path: Path) -> None:
    segments = [
        segment
        for host in range(30)
        for segment in clocked(f"10.0.1.{host}", 1, "192.0.2.1", 1000, host, BEGIN - host * 10_000 * SECOND, 20)
    ]
    text = run(str(write(tmp_path / "pcap", segments)), f"--svg={tmp_path / 'svg'}").stdout
    svg = ElementTree.fromstring((tmp_path / "svg").read_text())
    assert len(flows_of(svg)) == 30
    assert "  and 24 more clocks\n" in text
    assert "22 more clocks" in " ".join(svg.itertext())
    assert float(svg.get("height", 0)) < 1500


@pytest.mark.parametrize("tsvals", [(), (None, None), (5,), (5, 5), (2**32 - 1, 0)])
def test_a_capture_with_hardly_anything_in_it_is_a_picture_too(tmp_path: Path, tsvals: Sequence[Any]) -> None:
    capture = write(tmp_path / "pcap", flow(("fd00::1", 1), ("fd00::2", 443), tsvals=tsvals))
    run(str(capture), f"--svg={tmp_path / 'svg'}")
    svg = ElementTree.fromstring((tmp_path / "svg").read_text())
    assert len(flows_of(svg)) == any(tsval is not None for tsval in tsvals)
    assert "There is no TSval to be drawn." in " ".join(svg.itertext()) or any(tsvals)


def test_the_picture_stays_small_where_there_are_many_segments() -> None:
    kept = picture._few([(place, place) for place in range(5000, 0, -1)], 100)
    assert len(kept) == 100
    assert (kept[0], kept[-1]) == ((1, 1), (5000, 5000))
    assert kept == sorted(kept)


TIMES = st.integers(0, 2**62)
TSVALS = st.none() | st.integers(0, 2**32 - 1)


@settings(deadline=None)  # a machine that tests share
@given(
    st.lists(st.tuples(st.sampled_from(["10.0.0.1", "10.0.0.2", "fd00::1"]), TIMES, TSVALS), max_size=40), st.integers(1, 2**40)
)
def test_any_flows_make_a_whole_picture_and_words_that_fit(given_: List[Tuple[str, int, Any]], shrink: int) -> None:
    flows = Flows(lambda _: True)
    to = {"fd00::1": "fd00::2"}
    segments = [Segment(at // shrink, (ip, 1), (to.get(ip, "192.0.2.1"), 443), tsval=tsval) for ip, at, tsval in given_]
    frames = [(segment.at, segment.frame()) for segment in segments]
    flows.read(((at, 1, frame, len(frame)) for at, frame in frames), "")
    found = report(flows, Scope(), 1, 0, [])
    svg = ElementTree.fromstring(picture.svg(found))
    assert len(list(flows_of(svg))) == sum(flow.segments_with_timestamps > 0 for flow in found.judged)
    assert all(0 <= x <= float(svg.get("width", 0)) and 0 <= y <= float(svg.get("height", 0)) for x, y in numbers(svg))
    assert all(len(line) <= 80 for line in observer.words(found.clocks))


@pytest.mark.parametrize("case", ["directory", "no such directory", "standard output"])
def test_a_place_where_no_picture_can_be_is_one_line_and_exit_2_before_anything_is_read(tmp_path: Path, case: str) -> None:
    place = {"directory": str(tmp_path), "no such directory": str(tmp_path / "none" / "svg")}.get(case, "-")
    done = run(str(write(tmp_path / "pcap", HOSTS)), f"--svg={place}")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"tsproxy.py: --svg: given {place!r}: ")
    assert done.stderr.count("\n") == 1


def test_a_picture_replaces_an_older_one_and_comes_with_json_too(tmp_path: Path, hosts: Path) -> None:
    place = tmp_path / "svg"
    place.write_text("old" * 100_000)
    done = run(str(hosts), "--json", f"--svg={place}")
    assert all(json.loads(line) for line in done.stdout.splitlines())
    assert ElementTree.fromstring(place.read_text()).tag == f"{SVG}svg"
