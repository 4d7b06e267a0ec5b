"""Command lines: what each option takes and what it refuses, and a run of main() whose commands only note the call."""

from __future__ import annotations

import ast
import contextlib
import io
import ipaddress
import os
from types import SimpleNamespace
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import pytest
from _tsproxy import tools
from _tsproxy.cli import config, parser
from _tsproxy.cli.config import Config, Route, Target, parse
from _tsproxy.tools import main
from docopt import docopt
from harness import ROOT

MANUAL = ast.get_docstring(ast.parse((ROOT / "tsproxy.py").read_text()), clean=False) or ""
TARGET = "exchange.example:443"
CPU = min(os.sched_getaffinity(0))
NAMED = [*config.OPTIONS, *config.REPEATED]
BARE = docopt(MANUAL, [f"--target={TARGET}"], default_help=False)


def options(**changes: Any) -> Dict[str, Any]:
    """docopt's dictionary of a command line with only --target, then changed."""
    return {**BARE, **changes}


def parsed(option: str, *values: str) -> Config:
    """The Config of a command line with that option, given as often as there are values, and with what it needs."""
    needed = {"--timestamps": "rewrite"} if option == "--static-timestamp" else {}
    return parse(options(**needed, **{option: list(values) if option in config.REPEATED else values[0]}))


def route_of(meant: Config) -> Route:
    """The route of a command line."""
    (route,) = meant.routes
    return route


def fields_of(meant: Config) -> Dict[str, Any]:
    """The fields of the process, and those of its route."""
    return {**meant._asdict(), **route_of(meant)._asdict()}


GOOD = [
    ("--port", "0", "port", 0),
    ("--port", "65535", "port", 65535),
    ("--port", "0080", "port", 80),
    ("--bind", "0.0.0.0", "bind", "0.0.0.0"),
    ("--bind", "[::1]", "bind", "::1"),
    ("--bind", "0:0:0:0:0:0:0:1", "bind", "::1"),
    ("--bind", "::ffff:127.0.0.1", "bind", "127.0.0.1"),
    ("--interface", "eth1", "interface", "eth1"),
    ("--interface", "bond0.100", "interface", "bond0.100"),
    ("--interface", "a-name_of_15.ch", "interface", "a-name_of_15.ch"),
    ("--dscp", "0", "dscp", 0),
    ("--dscp", "63", "dscp", 63),
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
    ("--segments-warning", "0", "segments_warning", 0),
    ("--segments-warning", "1000000000", "segments_warning", 1_000_000_000),
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


LONG_NAME = ".".join(["a" * 63] * 4)  # 255 characters; RFC 1035 has room for 253
LONE = os.fsdecode(b"\xff")  # how a byte that is no UTF-8 comes in from the command line
NO_NUMBERS = ["", " ", "1 ", " 1", "1\n", "\t1", "+5", "-1", "1_000", "1e3", "0x10", "1,000", "nan"]
NO_NUMBERS += ["\u0663", "\uff11", "\u00b2", "\u00bd"]  # three in Arabic, a full-width one, a superscript, a half
NO_NUMBERS += ["1\0", "1\x1b[0m", f"1{LONE}", "9" * 400, "one", "1-2", "1=1", "--port=1"]


BAD = [
    ("--port", [*NO_NUMBERS, "65536", "-0", "80.0", "http"]),
    ("--bind", ["224.0.0.1", "255.255.255.255", "ff02::1", "[ff00::]"]),
    ("--bind", ["", " ", "localhost", "127.1", "127.0.0.1:80", "1.2.3.256", "01.2.3.4", "12\u0667.0.0.1", "0", "*", ":::"]),
    ("--bind", ["[127.0.0.1", "::1]", "[[::1]]", "fe80::1%lo", "::1%", "::1%a\nb", "127.0.0.1/8", "127.0.0.1\n", f"::1{LONE}"]),
    (
        "--interface",
        ["", ".", "..", "eth1 ", "eth 1", "eth1:0", "eth1@if2", "a/b", "eth1\n", "\0", "x" * 16, "\u00e9", LONE],
    ),
    ("--dscp", [*NO_NUMBERS, "64", "0x2e", "ef", "EF", "cs1"]),
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
    ("--segments-warning", [*NO_NUMBERS, "1000000001", "-1", "1k", "500/s"]),
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
    (
        "--target",
        ["224.0.0.1:80", "239.255.255.255:1", "255.255.255.255:1", "[ff02::1]:80", "[::ffff:224.0.0.1]:1"],
    ),
    ("--source", ["224.0.0.1", "255.255.255.255", "[ff02::1]", "::ffff:239.0.0.1"]),
    ("--source", ["", "eth0", "192.0.2.1:0", "fe80::1%eth0", "192.0.2", "192.0.2.1,192.0.2.2", "192.0.2.1\n", LONE]),
    ("--allow", ["", "/", "10.0.0.1/8", "2001:db8::1/32", "::ffff:10.0.0.1/104", "10.0.0.0/33", "::/129", "10.0.0.0/", "10/8"]),
    ("--allow", ["10.0.0.0/8 ", "10.0.0.0/ 8", "10.0.0.0/+8", "10.0.0.0/-1", "10.0.0.0/8/8", "10.0.0.0/8\n", "10.0.0.0/8\0"]),
    ("--allow", ["10.0.0.0/255.0.0.0", "10.0.0.0/0.255.255.255", "any", "localhost", "[::]/0", "10.0.0.0/\u0668", "1", LONE]),
    ("--allow", ["fe80::%lo/64", "fe80::%a\nb/64"]),
]


KNOWN = {known.name: known for known in parser.options_of(MANUAL).values()}


class Ran(NamedTuple):
    """How a run of the command line ended."""

    code: int
    out: str
    err: str
    asked: Optional[Tuple[str, Any]]  # the command that would have been done, and with what


def run(words: List[str]) -> Ran:
    """main.run() with commands that only note that they were asked for."""
    asked: List[Tuple[str, Any]] = []

    def note(name: str) -> Any:
        return lambda *given, **named: asked.append((name, (*given, *named.items()))) or 0

    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr("_tsproxy.supervisor.serve.serve", note("serve"))
        for name in parser.commands_of(MANUAL):
            patch.setattr(tools, name, SimpleNamespace(run=note(name)), raising=False)
        code = main.run(MANUAL, words, docopt)
    return Ran(code, out.getvalue(), err.getvalue(), asked[0] if asked else None)


def ending(start: List[bytes], *ends: bytes) -> List[List[bytes]]:
    """The words with each of the ends at the last one's end."""
    return [[*start[:-1], start[-1] + end] for end in ends]
