"""Each option's values: the good ones mean what the manual says, each bad one costs one line that a person can act on."""

from __future__ import annotations

import ast
import ipaddress
import math
import os
import socket
import subprocess
import sys
from decimal import Decimal
from fractions import Fraction
from typing import Any, Dict, FrozenSet, Optional

import pytest
from _tsproxy.cli import config
from _tsproxy.cli.config import Config, Target, UsageError, parse
from docopt import docopt
from harness import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st

MANUAL = ast.get_docstring(ast.parse((ROOT / "tsproxy.py").read_text()), clean=False) or ""
TARGET = "exchange.example:443"
CPU = min(os.sched_getaffinity(0))
NAMED = [*config.OPTIONS, *config.REPEATED]
unhurried = settings(deadline=None)


BARE = docopt(MANUAL, [f"--target={TARGET}"], default_help=False)


def options(**changes: Any) -> Dict[str, Any]:
    """docopt's dictionary of a command line with only --target, then changed."""
    return {**BARE, **changes}


def parsed(option: str, *values: str) -> Config:
    """The Config of a command line with that option, given as often as there are values, and with what it needs."""
    needed = {"--timestamps": "rewrite"} if option == "--static-timestamp" else {}
    return parse(options(**needed, **{option: list(values) if option in config.REPEATED else values[0]}))


def complaint(option: str, *values: str) -> str:
    """The line that such a command line costs."""
    with pytest.raises(UsageError) as caught:
        parsed(option, *values)
    return str(caught.value)


# What is taken

GOOD = [
    ("--port", "0", "port", 0),
    ("--port", "65535", "port", 65535),
    ("--port", "0080", "port", 80),
    ("--bind", "0.0.0.0", "bind", "0.0.0.0"),
    ("--bind", "[::1]", "bind", "::1"),
    ("--bind", "0:0:0:0:0:0:0:1", "bind", "::1"),
    ("--bind", "::ffff:127.0.0.1", "bind", "127.0.0.1"),
    ("--timestamps", "strip", "timestamps", "strip"),
    ("--timestamps", "preserve", "timestamps", "preserve"),
    ("--static-timestamp", "0", "static_timestamp", 0),
    ("--static-timestamp", "4294967295", "static_timestamp", 2**32 - 1),
    ("--max-connections", "1", "max_connections", 1),
    ("--max-connections", "1000000", "max_connections", 1_000_000),
    ("--max-connections-per-client", "0", "max_connections_per_client", 0),
    ("--max-connections-per-client", "1000000", "max_connections_per_client", 1_000_000),
    ("--on-full", "queue", "on_full", "queue"),
    ("--buffer-size", "1024", "buffer_size", 1024),
    ("--buffer-size", "64k", "buffer_size", 65536),
    ("--buffer-size", "16M", "buffer_size", 16 << 20),
    ("--workers", "256", "workers", 256),
    ("--zero-copy", "never", "zero_copy", "never"),
    ("--runtime", "threads", "runtime", "threads"),
    ("--cpus", str(CPU), "cpus", (CPU,)),
    ("--busy-poll", "50", "busy_poll_us", 50),
    ("--busy-poll", "5ms", "busy_poll_us", 5000),
    ("--busy-poll", "1.5", "busy_poll_us", 2),
    ("--connect-timeout", "250ms", "connect_timeout_s", 0.25),
    ("--connect-timeout", "1h", "connect_timeout_s", 3600.0),
    ("--idle-timeout", "0", "idle_timeout_s", 0.0),
    ("--idle-timeout", "0.0h", "idle_timeout_s", 0.0),
    ("--idle-timeout", "90m", "idle_timeout_s", 5400.0),
    ("--half-close-timeout", "1", "half_close_timeout_s", 1.0),
    ("--drain-timeout", "0", "drain_timeout_s", 0.0),
    ("--user-timeout", "0", "user_timeout_ms", 0),
    ("--user-timeout", "10s", "user_timeout_ms", 10_000),
    ("--user-timeout", "2147483647", "user_timeout_ms", 2**31 - 1),
    ("--keepalive", "0", "keepalive_s", 0),
    ("--keepalive", "1500ms", "keepalive_s", 2),
    ("--keepalive", "32767", "keepalive_s", 32767),
    ("--user", "nobody", "user", "nobody"),
    ("--user", "machine$", "user", "machine$"),
    ("--metrics-interval", "0", "metrics_interval_s", 0.0),
    ("--metrics-interval", "100ms", "metrics_interval_s", 0.1),
    ("--connection-log", "on", "connection_log", True),
    ("--connection-log", "off", "connection_log", False),
    ("--log-level", "debug", "log_level", "debug"),
    ("--target", "a:1", "targets", (Target("a", 1),)),
    ("--target", "a.b.:65535", "targets", (Target("a.b.", 65535),)),
    ("--target", "under_score:1", "targets", (Target("under_score", 1),)),
    ("--target", "9.example:1", "targets", (Target("9.example", 1),)),
    ("--target", "0xf.example:1", "targets", (Target("0xf.example", 1),)),
    ("--target", "192.0.2.1:00443", "targets", (Target("192.0.2.1", 443),)),
    ("--target", "[2001:DB8::1]:443", "targets", (Target("2001:db8::1", 443),)),
    ("--target", "[fe80::1%eth0.7]:443", "targets", (Target("fe80::1", 443, "eth0.7"),)),
    ("--target", "[::ffff:192.0.2.1]:443", "targets", (Target("192.0.2.1", 443),)),
    ("--target", f"{'a' * 63}:1", "targets", (Target("a" * 63, 1),)),
    ("--source", "192.0.2.7", "sources", ("192.0.2.7",)),
    ("--source", "[2001:db8::7]", "sources", ("2001:db8::7",)),
    ("--allow", "10.0.0.0/8", "allow", (ipaddress.ip_network("10.0.0.0/8"),)),
    ("--allow", "10.0.0.1", "allow", (ipaddress.ip_network("10.0.0.1/32"),)),
    ("--allow", "2001:db8::/32", "allow", (ipaddress.ip_network("2001:db8::/32"),)),
    ("--allow", "::/0", "allow", (ipaddress.ip_network("::/0"),)),
    ("--allow", "::ffff:10.0.0.0/104", "allow", (ipaddress.ip_network("10.0.0.0/8"),)),
]


@pytest.mark.parametrize(("option", "text", "field", "value"), GOOD, ids=[f"{row[0]}={row[1]}" for row in GOOD])
def test_a_good_value_becomes_the_field_it_is_for(option: str, text: str, field: str, value: object) -> None:
    got = getattr(parsed(option, text), field)
    assert (got, type(got)) == (value, type(value))


def test_the_table_of_good_values_leaves_no_option_out() -> None:
    assert {row[0] for row in GOOD} == set(NAMED)


def test_repeated_options_keep_their_order() -> None:
    assert [str(target) for target in parsed("--target", "b:2", "a:1", "[::1]:3").targets] == ["b:2", "a:1", "[::1]:3"]
    assert parsed("--source", "192.0.2.9", "::2", "192.0.2.1").sources == ("192.0.2.9", "::2", "192.0.2.1")
    assert [str(block) for block in parsed("--allow", "::1", "10.0.0.0/8").allow] == ["::1/128", "10.0.0.0/8"]


def test_without_options_the_config_is_its_own_defaults_but_for_the_workers() -> None:
    bare = parse(options())
    assert bare == Config(targets=(Target("exchange.example", 443),), workers=len(os.sched_getaffinity(0)))


@pytest.mark.parametrize("switch", ["--reuse-port", "--trust-host"])
def test_a_switch_is_off_until_it_is_given(switch: str) -> None:
    field = switch[2:].replace("-", "_")
    assert getattr(parse(options()), field) is False
    assert getattr(parse(options(**{switch: True})), field) is True


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
    assert (meant.timestamps, meant.static_timestamp) == (mode, tsval)


@pytest.mark.parametrize("mode", [None, "strip", "preserve"])
def test_a_value_to_rewrite_to_is_nothing_without_rewriting(mode: Optional[str]) -> None:
    with pytest.raises(UsageError, match=r"^--static-timestamp: given '7'; allowed: only with --timestamps=rewrite "):
        parse(options(**{"--timestamps": mode, "--static-timestamp": "7"}))


@pytest.mark.parametrize("mode", ["strip", "preserve"])
def test_spoofing_contradicts_any_other_mode(mode: str) -> None:
    with pytest.raises(UsageError, match=f"^--spoof-timestamps contradicts --timestamps={mode}: "):
        parse(options(**{"--spoof-timestamps": True, "--timestamps": mode}))


def test_it_is_known_which_of_the_listening_options_were_given() -> None:
    assert parse(options()).listen_options == ()
    assert parse(options(**{"--port": "8080"})).listen_options == ("--port",)
    assert parse(options(**{"--port": "0", "--bind": "::1"})).listen_options == ("--port", "--bind")


# What is refused

LONG_NAME = ".".join(["a" * 63] * 4)  # 255 characters; RFC 1035 has room for 253
LONE = os.fsdecode(b"\xff")  # how a byte that is no UTF-8 comes in from the command line
NO_NUMBERS = ["", " ", "1 ", " 1", "1\n", "\t1", "+5", "-1", "1_000", "1e3", "0x10", "1,000", "nan"]
NO_NUMBERS += ["\u0663", "\uff11", "\u00b2", "\u00bd"]  # three in Arabic, a full-width one, a superscript, a half
NO_NUMBERS += ["1\0", "1\x1b[0m", f"1{LONE}", "9" * 400, "one", "1-2", "1=1", "--port=1"]
BAD = [
    ("--port", [*NO_NUMBERS, "65536", "-0", "80.0", "http"]),
    ("--bind", ["", " ", "localhost", "127.1", "127.0.0.1:80", "1.2.3.256", "01.2.3.4", "12\u0667.0.0.1", "0", "*", ":::"]),
    ("--bind", ["[127.0.0.1", "::1]", "[[::1]]", "fe80::1%lo", "::1%", "::1%a\nb", "127.0.0.1/8", "127.0.0.1\n", f"::1{LONE}"]),
    ("--timestamps", ["", "Strip", "strip ", "str", "spoof", "on", "strip\n", "strip\0", "strip,preserve", LONE]),
    ("--static-timestamp", [*NO_NUMBERS, "4294967296", "random"]),
    ("--max-connections", [*NO_NUMBERS, "0", "1000001", "1k"]),
    ("--max-connections-per-client", [*NO_NUMBERS, "1000001", "-1", "1k", "5/64"]),
    ("--on-full", ["", "REJECT", "drop", "queue\r\n"]),
    ("--buffer-size", [*NO_NUMBERS, "1023", "0", "16777217", "17m", "1g", "64kb", "64KiB", "64 k", "64\u212a", "k", "-64k"]),
    ("--zero-copy", ["", "Auto", "always", "on", "never "]),
    ("--workers", [*NO_NUMBERS, "0", "257"]),
    ("--runtime", ["", "auto\n", "fibers", "thread", "Threads"]),
    ("--cpus", ["", ",", "-", f"{CPU},", f"{CPU},{CPU}", f"{CPU}-{CPU},{CPU}", f"{CPU + 1}-{CPU}", f"{CPU}-", f"{CPU}\n"]),
    ("--cpus", ["9999", "0-9999", "99999", "a", "-1", "0x0", "\u0660", f"{CPU} ", "1e0", "all"]),
    ("--busy-poll", [*NO_NUMBERS, "0.5", "1001s", "1us2", "1 us", "1US", "5\u03bcs"]),
    ("--connect-timeout", [*NO_NUMBERS, "0", "0.0009", "3601", "61m", "1.", ".5", "1.5.5", "5d", "1h30m", "inf", "5 s"]),
    ("--idle-timeout", [*NO_NUMBERS, "0.0001us", "0.5ms", "721h", "off"]),
    ("--half-close-timeout", [*NO_NUMBERS, "0.0005", "999999999999h"]),
    ("--drain-timeout", [*NO_NUMBERS, "25h", "-0"]),
    ("--user-timeout", [*NO_NUMBERS, "0.5", "2147483648", "999us"]),
    ("--keepalive", [*NO_NUMBERS, "0.5", "32768", "32767.1"]),
    ("--user", ["", " ", "a b", "-root", "a\nb", "a\0b", "\u00fc", "a/b", "a:b", "x" * 64, "$", LONE]),
    ("--metrics-interval", [*NO_NUMBERS, "0.001", "1441m", "never"]),
    ("--connection-log", ["", "yes", "ON", "1", "on\n"]),
    ("--log-level", ["", "warn", "INFO", "trace", "info\0"]),
    ("--target", ["", ":", ":443", "a", "a:", "a:0", "a:65536", "a:-1", "a:+1", "a:1 ", "a:1\n", "a:1e2", "a:1_0", "a:000443"]),
    ("--target", ["a:\u0663", "a:http", "http://a:1", "a:443/x", "a:1:2", " a:1", "a :1", "a\nb:1", "a\0:1", "a\x1b:1"]),
    (
        "--target",
        ["999.1.1.1:1", "1.2.3:1", "1.2.3.4.5:1", "1:1", "127.1:1", "0x7f000001:1", "127.0X1:1", "0x:1", "01.2.3.4:1"],
    ),
    ("--target", ["::1:443", "[::1]", "[::1:443", "::1]:443", "[]:443", "[1.2.3.4]:443", "[a]:443", "[::g]:1", "[[::1]]:1"]),
    ("--target", ["[::1]]:1", "[::1%]:1", "[::1%a b]:1", "[::1%a%b]:1", "[::1%\n]:1", "[fe80::1%interface-too-long]:1"]),
    ("--target", ["fe80::1%lo:1", "a%lo:1", "-a:1", "a-:1", "a..b:1", ".a:1", "a..:1", ".:1", "a,b:1", "*:1", "@:1"]),
    ("--target", [f"{'a' * 64}:1", f"{LONG_NAME}:1", "b\u00fccher:1", f"{LONE}:1", "\u0663.example:1"]),
    ("--source", ["", "eth0", "192.0.2.1:0", "fe80::1%eth0", "192.0.2", "192.0.2.1,192.0.2.2", "192.0.2.1\n", LONE]),
    ("--allow", ["", "/", "10.0.0.1/8", "2001:db8::1/32", "::ffff:10.0.0.1/104", "10.0.0.0/33", "::/129", "10.0.0.0/", "10/8"]),
    ("--allow", ["10.0.0.0/8 ", "10.0.0.0/ 8", "10.0.0.0/+8", "10.0.0.0/-1", "10.0.0.0/8/8", "10.0.0.0/8\n", "10.0.0.0/8\0"]),
    ("--allow", ["10.0.0.0/255.0.0.0", "10.0.0.0/0.255.255.255", "any", "localhost", "[::]/0", "10.0.0.0/\u0668", "1", LONE]),
    ("--allow", ["fe80::%lo/64", "fe80::%a\nb/64"]),
]
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
    assert len(parse(options(**both)).targets) == 3
    assert len(parse(options(**{"--target": ["a:1"], "--source": ["::1"]})).targets) == 1  # a name may have any family


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
HOSTS = NAMES | st.ip_addresses(v=4).map(str) | st.ip_addresses(v=6).map("[{}]".format)


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

SAMPLE = [
    ("--port", "65536"),
    ("--port", "1\n2"),
    ("--port", "\u0663"),
    ("--bind", "::1%a\nb"),
    ("--bind", "localhost"),
    ("--timestamps", "rewritten"),
    ("--static-timestamp", "4294967296"),
    ("--buffer-size", "64\u212a"),
    ("--cpus", "9999"),
    ("--idle-timeout", "0.5ms"),
    ("--user", LONE),
    ("--user", "\x1b[31m"),
    ("--target", "999.1.1.1:1"),
    ("--target", "b\u00fccher:1"),
    ("--target", ""),
    ("--target", "--port=1"),
    ("--source", "eth0"),
    ("--allow", "10.0.0.1/8"),
    ("--allow", "x" * 5000),
]


@pytest.mark.parametrize(("option", "value"), SAMPLE, ids=[f"{option}={value!a:.40}" for option, value in SAMPLE])
def test_the_command_ends_with_2_and_that_one_line(option: str, value: str) -> None:
    command = [sys.executable, str(ROOT / "tsproxy.py"), "-t", TARGET, option, value]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False, env={**os.environ, "LC_ALL": "C.UTF-8"})
    assert (done.returncode, done.stdout) == (2, b"")
    line = done.stderr.decode()
    assert line.startswith(f"tsproxy: {option}: given {value!r}; allowed: ")
    assert line.count("\n") == 1
    assert line.endswith("\n")
