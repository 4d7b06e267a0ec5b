"""Each option's values: the good ones mean what the manual says, each bad one costs one line that a person can act on."""

from __future__ import annotations

import math
import os
import socket
from decimal import Decimal
from fractions import Fraction
from typing import Any, Dict, FrozenSet, Optional

import pytest
from _tsproxy.cli import config
from _tsproxy.cli.config import Config, Route, Target, UsageError, parse
from command_line import BAD, CPU, GOOD, NAMED, fields_of, options, parsed, route_of
from hypothesis import example, given, settings
from hypothesis import strategies as st

unhurried = settings(deadline=None)


def complaint(option: str, *values: str) -> str:
    """The line that such a command line costs."""
    with pytest.raises(UsageError) as caught:
        parsed(option, *values)
    return str(caught.value)


# What is taken


@pytest.mark.parametrize(("option", "text", "field", "value"), GOOD, ids=[f"{row[0]}={row[1]}" for row in GOOD])
def test_a_good_value_becomes_the_field_it_is_for(option: str, text: str, field: str, value: object) -> None:
    got = fields_of(parsed(option, text))[field]
    assert (got, type(got)) == (value, type(value))


def test_the_table_of_good_values_leaves_no_option_out() -> None:
    assert {row[0] for row in GOOD} == set(NAMED)


def test_repeated_options_keep_their_order() -> None:
    targets = route_of(parsed("--target", "b:2", "a:1", "[::1]:3")).targets
    assert [str(target) for target in targets] == ["b:2", "a:1", "[::1]:3"]
    assert route_of(parsed("--source", "192.0.2.9", "::2", "192.0.2.1")).sources == ("192.0.2.9", "::2", "192.0.2.1")
    assert [str(block) for block in route_of(parsed("--allow", "::1", "10.0.0.0/8")).allow] == ["::1/128", "10.0.0.0/8"]


def test_without_options_the_config_is_its_own_defaults_but_for_the_workers() -> None:
    bare = parse(options())
    assert bare == Config((Route((Target("exchange.example", 443),)),), workers=len(os.sched_getaffinity(0)))


@pytest.mark.parametrize("switch", ["--reuse-port", "--trust-host"])
def test_a_switch_is_off_until_it_is_given(switch: str) -> None:
    field = switch[2:].replace("-", "_")
    assert fields_of(parse(options()))[field] is False
    assert fields_of(parse(options(**{switch: True})))[field] is True


MEANT = [
    ({"--timestamps": "rewrite"}, "strip", 0),  # to rewrite to 0 is to strip
    ({"--timestamps": "rewrite", "--static-timestamp": "0"}, "strip", 0),
    ({"--timestamps": "rewrite", "--static-timestamp": "7"}, "rewrite", 7),
    ({"--spoof-timestamps": True}, "strip", 0),
    ({"--spoof-timestamps": True, "--static-timestamp": "7"}, "rewrite", 7),
    ({"--spoof-timestamps": True, "--timestamps": "rewrite", "--static-timestamp": "7"}, "rewrite", 7),
]


@pytest.mark.parametrize(("given_options", "mode", "tsval"), MEANT, ids=lambda value: str(value))
def test_rewriting_needs_a_value_to_rewrite_to(given_options: Dict[str, Any], mode: str, tsval: int) -> None:
    meant = parse(options(**given_options))
    assert (route_of(meant).timestamps, meant.static_timestamp) == (mode, tsval)


@pytest.mark.parametrize("mode", [None, "strip", "preserve"])
def test_a_value_to_rewrite_to_is_nothing_without_rewriting(mode: Optional[str]) -> None:
    with pytest.raises(UsageError, match=r"^--static-timestamp: given '7'; allowed: only with --timestamps=rewrite "):
        parse(options(**{"--timestamps": mode, "--static-timestamp": "7"}))


@pytest.mark.parametrize("mode", ["strip", "preserve"])
def test_spoofing_contradicts_any_other_mode(mode: str) -> None:
    with pytest.raises(UsageError, match=f"^--spoof-timestamps contradicts --timestamps={mode}: "):
        parse(options(**{"--spoof-timestamps": True, "--timestamps": mode}))


def test_it_is_known_which_of_the_listening_options_were_given() -> None:
    assert route_of(parse(options())).listen_options == ()
    assert route_of(parse(options(**{"--port": "8080"}))).listen_options == ("--port",)
    assert route_of(parse(options(**{"--port": "0", "--bind": "::1"}))).listen_options == ("--port", "--bind")


# What is refused

TABLE = [(option, value) for option, values in BAD for value in values]


@pytest.mark.parametrize(("option", "value"), TABLE, ids=[f"{option}={value!a:.40}" for option, value in TABLE])
def test_a_bad_value_costs_one_line_with_the_option_what_was_given_and_what_is_allowed(option: str, value: str) -> None:
    line = complaint(option, value)
    start = f"{option}: given {value!r}; allowed: "
    assert line.startswith(start)
    assert len(line) > len(start) + 5
    assert line.isprintable()  # no newline, no control character, no lone surrogate


def test_the_table_of_bad_values_leaves_no_option_out() -> None:
    assert list(dict.fromkeys(option for option, _ in BAD)) == NAMED
    assert len(TABLE) > 400


@pytest.mark.parametrize("option", list(config.REPEATED))
def test_one_bad_value_among_good_ones_is_the_one_that_is_named(option: str) -> None:
    good = {"--target": "a:1", "--source": "192.0.2.1", "--allow": "192.0.2.1"}[option]
    assert complaint(option, good, "bad value", good).startswith(f"{option}: given 'bad value'; ")


def test_a_range_is_written_in_figures_that_can_be_given() -> None:
    for option in config.OPTIONS:
        assert "e+" not in complaint(option, "no value of it"), option
    assert "from 1 to 2147483647, or 0 for off" in complaint("--user-timeout", "-1")
    assert "from 0.001 to 2592000, or 0 for off" in complaint("--idle-timeout", "-1")


def test_host_bits_that_are_set_are_what_the_line_speaks_of() -> None:
    assert "with host bits 0" in complaint("--allow", "10.0.0.1/8")
    assert "with host bits 0" not in complaint("--allow", "10.0.0.0/33")


def test_workers_that_contradict_the_cpus_are_refused() -> None:
    with pytest.raises(UsageError, match=rf"--workers=7 contradicts --cpus={CPU}.*\(1\)"):
        parse(options(**{"--workers": "7", "--cpus": str(CPU)}))
    assert parse(options(**{"--workers": "1", "--cpus": str(CPU)})).workers == 1


def test_cpus_decide_how_many_workers_there_are() -> None:
    usable = os.sched_getaffinity(0)
    wanted = parsed("--cpus", config.compact(usable))
    assert (set(wanted.cpus), wanted.workers) == (usable, len(usable))


@pytest.mark.parametrize(
    ("target", "source", "kind"), [("192.0.2.1:1", "::1", "IPv4"), ("[2001:db8::1]:1", "192.0.2.7", "IPv6")]
)
def test_a_target_that_no_source_can_reach_is_refused(target: str, source: str, kind: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(options(**{"--target": [target], "--source": [source]}))
    assert str(caught.value).startswith(f"--source: given {source}; allowed: at least one {kind} address")
    assert target in str(caught.value)


def test_sources_of_both_families_reach_any_target() -> None:
    both = {"--target": ["192.0.2.1:1", "[::1]:1", "a:1"], "--source": ["::1", "192.0.2.7"]}
    assert len(route_of(parse(options(**both))).targets) == 3
    assert route_of(parse(options(**{"--target": ["a:1"], "--source": ["::1"]}))).sources == (
        "::1",
    )  # a name may have any family


# Any text at all

TEXT = st.text() | st.text(st.sampled_from("0123456789.:-%[]/,_ abcsumhkx\n\0\u0663\udcff"), max_size=24)


@pytest.mark.parametrize("option", NAMED)
@unhurried
@given(text=TEXT)
def test_any_text_is_taken_or_costs_one_printable_line(option: str, text: str) -> None:
    try:
        parsed(option, text)
    except UsageError as problem:
        assert str(problem).startswith(f"{option}: given ")
        assert str(problem).isprintable()


@unhurried
@given(
    figure=st.decimals(0, 10**6, places=3),
    unit=st.sampled_from(["us", "ms", "s", "m", "h", ""]),
    of=st.sampled_from(["us", "ms", "s"]),
)
@example(figure=Decimal("1000"), unit="s", of="us")
@example(figure=Decimal("0.001"), unit="us", of="s")
def test_a_duration_is_the_same_time_in_the_units_of_the_option(figure: Decimal, unit: str, of: str) -> None:
    size = {"us": 1, "ms": 1000, "s": 10**6, "m": 60 * 10**6, "h": 3600 * 10**6}
    exact = Fraction(figure) * size[unit or of] / size[of]
    read = config.duration(0, 1e16, of)
    assert abs(Fraction(read("--x", f"{figure}{unit}")) - exact) <= exact / 2**52
    assert config.rounded(read)("--x", f"{figure}{unit}") == math.ceil(exact)


@given(st.integers(0, 4096), st.sampled_from(["", "k", "K", "m", "M", "g", "G"]))
def test_a_size_is_its_figure_times_its_unit(figure: int, unit: str) -> None:
    factor = {"": 0, "k": 10, "m": 20, "g": 30}[unit.lower()]
    assert config.size(0, 1 << 62)("--x", f"{figure}{unit}") == figure << factor


LABEL = st.from_regex(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?", fullmatch=True)
NAMES = st.lists(LABEL, max_size=3).map(lambda labels: ".".join([*labels, "example"]))
PLAIN = st.ip_addresses().map(lambda host: getattr(host, "ipv4_mapped", None) or host)
UNICAST = PLAIN.filter(lambda host: not host.is_multicast and str(host) != "255.255.255.255")
HOSTS = NAMES | UNICAST.map(lambda host: f"[{host}]" if host.version == 6 else str(host))


@unhurried
@given(HOSTS, st.integers(1, 65535))
def test_a_target_is_written_as_it_was_understood(host: str, port: int) -> None:
    found = config.target("--target", f"{host}:{port}")
    assert found.port == port
    assert found.is_literal is not host.endswith("example")
    assert config.target("--target", str(found)) == found


@unhurried
@given(st.from_regex(r"(0x)?[0-9a-fA-Fx]{1,10}(\.(0x)?[0-9]{1,4}){0,4}", fullmatch=True))
@example("0x7f000001")
@example("127.0x1")
def test_a_name_that_the_resolver_takes_for_a_number_is_no_name(text: str) -> None:
    try:
        socket.getaddrinfo(text, 1, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:
        return
    assert not config.host_name(text)


@given(st.frozensets(st.integers(0, 300)))
def test_compact_lists_say_all_numbers_and_no_other(numbers: FrozenSet[int]) -> None:
    said = [part.partition("-") for part in config.compact(numbers).split(",") if part]
    assert [n for low, _, high in said for n in range(int(low), int(high or low) + 1)] == sorted(numbers)


# The real command
