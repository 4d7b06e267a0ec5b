"""A file of routes: what it means, that it says the same as a command line, and that each mistake is named with its line."""

from __future__ import annotations

import configparser
import io
import os
import re
import threading
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import pytest
from _tsproxy.cli import config, ini, routes
from _tsproxy.cli.config import OPTIONS, REPEATED, ROUTE_FIELDS, Route, Target, UsageError
from command_line import BAD, GOOD, options, parsed, route_of
from harness import examples
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

BASE = Route(())
FILE = "venue.routes"
Said = Dict[str, Dict[str, List[str]]]  # by section and key: the values


def read(text: str, base: Route = BASE, inherited: Optional[Sequence[str]] = ()) -> Tuple[Route, ...]:
    return routes.parse(text.encode(), FILE, base, inherited).routes


def complaint(text: str, base: Route = BASE, inherited: Optional[Sequence[str]] = ()) -> str:
    """The line that such a file costs."""
    with pytest.raises(UsageError) as caught:
        read(text, base, inherited)
    assert str(caught.value).isprintable()
    return str(caught.value)


# What a file means

VENUE = """\
# One venue.
[DEFAULT]
source = 10.20.0.5
idle-timeout = 0

[oe-primary]
port = 9001
target = 203.0.113.10:443

[oe-backup]
port = 9002
target = 203.0.113.11:443
max-connections = 4

; What was traded.
[drop-copy]
bind = 10.1.0.2
port = 9003
target = dc1.exchange.example:443
         # the second one is tried when the first can't be reached
         dc2.exchange.example:443

         dc3.exchange.example:443
timestamps = preserve
source = 10.20.0.6
trust-host = on
"""
MEANT = (
    Route((Target("203.0.113.10", 443),), "oe-primary", ("port",), 9001, sources=("10.20.0.5",)),
    Route((Target("203.0.113.11", 443),), "oe-backup", ("port",), 9002, sources=("10.20.0.5",), max_connections=4),
    Route(
        tuple(Target(f"dc{number}.exchange.example", 443) for number in (1, 2, 3)),
        *("drop-copy", ("port", "bind"), 9003, "10.1.0.2", "preserve"),
        trust_host=True,
        sources=("10.20.0.6",),
    ),
)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["no mark", "byte order mark"])
def test_a_section_is_a_route_and_the_default_section_holds_for_all(end: str, mark: str) -> None:
    assert read(mark + VENUE.replace("\n", end)) == MEANT


def test_what_the_file_does_not_say_is_as_on_the_command_line() -> None:
    base = BASE._replace(keepalive_s=7, idle_timeout_s=9.0, timestamps="rewrite")
    first, second = read("[a]\nport=1\ntarget=a:1\n[b]\nport=2\ntarget=b:1\nidle-timeout=3", base)
    assert (first.keepalive_s, first.idle_timeout_s, first.timestamps) == (7, 9.0, "rewrite")
    assert (second.keepalive_s, second.idle_timeout_s, second.timestamps) == (7, 3.0, "rewrite")


def test_a_route_whose_socket_was_handed_over_needs_no_port() -> None:
    handed, own = read("[a]\ntarget=a:1\n[b]\nport=0\ntarget=b:1", inherited=["a"])
    assert (handed.listen_options, own.listen_options) == ((), ("port",))


def test_each_option_of_a_route_is_a_key_and_each_of_the_process_is_none() -> None:
    assert {entry.field for entry in routes.KEYS.values()} == ROUTE_FIELDS - {"name", "listen_options"}
    switches = {"trust-host", "reuse-port", "spoof-timestamps"}  # which have no value on the command line
    assert {name[2:] for name in (*OPTIONS, *REPEATED)} == (routes.KEYS.keys() | routes.OF_PROCESS) - switches


# The same as on a command line


def is_key(option: str) -> bool:
    return option[2:] in routes.KEYS and option != "--timestamps"


def can_be_written(text: str) -> bool:
    """Whether a value can stand in a file: UTF-8, in one line, without blanks around it."""
    return text == text.strip() and not re.search("[\r\n\udc80-\udcff]", text)


GOOD_VALUES = [row for row in GOOD if is_key(row[0])]
BAD_VALUES = [(option, text) for option, texts in BAD for text in texts if is_key(option) and can_be_written(text)]


@pytest.mark.parametrize(("option", "text", "field", "value"), GOOD_VALUES, ids=[f"{row[0]}={row[1]}" for row in GOOD_VALUES])
def test_a_good_value_means_the_same_in_a_file(option: str, text: str, field: str, value: object) -> None:
    keys = {"port": "1", "target": "a:1", option[2:]: text}
    (route,) = read("[a]\n" + "\n".join(f"{key} = {given}" for key, given in keys.items()))
    assert getattr(route, field) == value == getattr(route_of(parsed(option, text)), field)


@pytest.mark.parametrize(("option", "text"), BAD_VALUES, ids=[f"{option}={text!a:.40}" for option, text in BAD_VALUES])
def test_a_bad_value_costs_the_line_of_the_command_line_with_its_place(option: str, text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parsed(option, text)
    said = complaint(f"[a]\n# a comment\n\n{option[2:]} = {text}\n")
    assert said == f"{FILE}:4: [a] {str(caught.value)[2:]}"


# What is refused, and where

A = "[a]\nport = 1\ntarget = a:1\n"
COMMENT = "[b] # comment"
NAMED = "given as a route's name; allowed: 1 to 63 of a-z, 0-9, dot, underscore and dash, the first a letter or digit"
SYNTAX = "allowed: key = value, [section], or a comment, in a line that begins with # or ;"
REWRITE = "strip or preserve (to rewrite is for all routes: --timestamps=rewrite on the command line)"
TAKEN = "allowed: one that [a] (line 1) does not have: both would listen on"
MISTAKES = [
    (
        A + "  [b]\nport = 2\n",
        ":4: [a] given '[b]'; allowed: a section without blanks before it: an indented line goes on ",
    ),
    (A + "allow =\n\t[oe-primary] \n", ":5: [a] given '[oe-primary]'; allowed: a section without blanks "),
    (A + "source = ::1\n ff02::1\n", ":5: [a] source: given 'ff02::1'; allowed: an IPv4 or IPv6 address of this host"),
    ("[a]\nport = 1\ntarget = 224.0.0.1:80\n", ":3: [a] target: given '224.0.0.1:80'; allowed: a unicast address"),
    ("", ": given no route; allowed: at least one section, e.g. [oe-primary]"),
    ("[DEFAULT]\nport = 1\n", ": given no route; "),
    ("port = 1\n", ":1: given 'port = 1'; allowed: a section before the first key, e.g. [oe-primary]"),
    (A + "nonsense\n", f":4: [a] given 'nonsense'; {SYNTAX}"),
    (A + "= 5\n", f":4: [a] given '= 5'; {SYNTAX}"),
    (A + "keepalive: 5\n", f":4: [a] given 'keepalive: 5'; {SYNTAX}"),
    (A + f"{COMMENT}\n", f":4: [a] given '{COMMENT}'; {SYNTAX}"),
    (A + f"{'x' * 99}\n", f":4: [a] given '{'x' * 63}...'; {SYNTAX}"),
    (A + "port = 2\n", ":4: [a] port: given twice; allowed: once (it is in line 2, too)"),
    (A + "[a]\n", ":4: [a] given twice; allowed: once (it is in line 1, too)"),
    ("[DEFAULT]\n[DEFAULT]\n" + A, ":2: [DEFAULT] given twice; "),
    (A + "[]\n", f":4: [a] given '[]'; {SYNTAX}"),
    (A + "[Oe]\n", f":4: [Oe] {NAMED}"),
    (A + "[default ]\n", f":4: [default ] {NAMED}"),
    (A + "[-a]\n", f":4: [-a] {NAMED}"),
    (A + f"[{'x' * 64}]\n", f":4: [{'x' * 63}...] {NAMED}"),
    (A + "[\x1b]\n", rf":4: [\x1b] {NAMED}"),
    (A + "prot = 1\n", ":4: [a] unknown key 'prot'; did you mean port?; allowed: allow, bind, "),
    (A + "Keepalive = 1\n", ":4: [a] unknown key 'Keepalive'; did you mean keepalive?; allowed: allow, "),
    (A + "--keepalive = 1\n", ":4: [a] unknown key '--keepalive'; did you mean keepalive?; allowed: allow, "),
    (A + "\x1b = 1\n", r":4: [a] unknown key '\x1b'; allowed: allow, "),
    (A + "workers = 4\n", ":4: [a] workers: given '4'; allowed: only as --workers on the command line, for the whole process"),
    (A + "spoof-timestamps = on\n", ":4: [a] spoof-timestamps: given 'on'; allowed: only as --spoof-timestamps on "),
    (A + "timestamps = rewrite\n", f":4: [a] timestamps: given 'rewrite'; allowed: {REWRITE}"),
    (A + "trust-host = yes\n", ":4: [a] trust-host: given 'yes'; allowed: on or off"),
    (A + "trust-host =\n", ":4: [a] trust-host: given ''; allowed: on or off"),
    (A + "keepalive = 1\n  # more\n  2\n", ":6: [a] keepalive: given 2 values, one a line; allowed: one"),
    (A + "allow =\n", ":4: [a] allow: given ''; allowed: an address or CIDR block, "),
    (A + "allow = 10.0.0.0/8\n\n  10.1\n", ":6: [a] allow: given '10.1'; allowed: an address or CIDR block, "),
    ("[DEFAULT]\nkeepalive = x\n" + A, ":2: [DEFAULT] keepalive: given 'x'; allowed: a number of s from 1 to 32767, "),
    ("[DEFAULT]\nworkers = 1\n" + A, ":2: [DEFAULT] workers: given '1'; allowed: only as --workers "),
    ("\n\n[a]\nport = 1\n", ":3: [a] target: given nothing; allowed: at least one, e.g. target = exchange.example:443"),
    ("[a]\ntarget = a:1\n", ":1: [a] port: given nothing; allowed: a port from 0 to 65535 (0: any that is free)"),
    (A + "[b]\ntarget = b:1\n", ":4: [b] port: given nothing; "),
    ("[a]\nport=1\ntarget=[::1]:1\nsource=192.0.2.7", ":4: [a] source: given 192.0.2.7; allowed: at least one IPv6 address, "),
    (
        "[DEFAULT]\nsource=::7\n[a]\nport=1\ntarget=10.0.0.1:1",
        ":2: [a] source: given ::7; allowed: at least one IPv4 address, ",
    ),
    ("[a]\nport=1\ntarget=a:1\n" + " a:1\n" * 64, ":3: [a] target: given 65 times; allowed: up to 64 times"),
    (A + "[b]\ntarget=b:1\nport=1", f":6: [b] port: given '1'; {TAKEN} 127.0.0.1:1"),
    (A + "[b]\nbind=0.0.0.0\nport=1\ntarget=b:1", f":6: [b] port: given '1'; {TAKEN} 0.0.0.0:1"),
    ("[a]\nbind=::\n[DEFAULT]\nport=1\ntarget=a:1\nbind=::1\n[b]\n", f":7: [b] port: given '1'; {TAKEN} [::1]:1"),
]


@pytest.mark.parametrize(("text", "said"), MISTAKES, ids=[repr(text[-30:]) for text, _ in MISTAKES])
def test_a_mistake_costs_one_line_with_file_line_section_key_and_what_is_allowed(text: str, said: str) -> None:
    assert complaint(text).startswith(f"{FILE}{said}")


def test_addresses_in_brackets_may_stand_one_a_line() -> None:
    (route,) = read(A + "source = [::1]\n  [2001:db8::1]\n  [10.0.0.1]\n", BASE)
    assert route.sources == ("::1", "2001:db8::1", "10.0.0.1")


def test_rewriting_is_for_all_routes_or_none() -> None:
    said = complaint(A + "timestamps = strip", BASE._replace(timestamps="rewrite"))
    assert said == f"{FILE}:4: [a] timestamps: given 'strip'; allowed: nothing: --timestamps=rewrite is for all routes"


@pytest.mark.parametrize(("key", "value"), [("port", "1"), ("bind", "::1")])
def test_a_listener_beside_the_socket_that_was_handed_over_is_refused(key: str, value: str) -> None:
    said = complaint(f"[a]\ntarget = a:1\n{key} = {value}\n", inherited=["a"])
    allowed = "nothing: a socket of the route's name was handed over (LISTEN_FDNAMES)"
    assert said == f"{FILE}:3: [a] {key}: given '{value}'; allowed: {allowed}"


def test_a_route_without_a_port_is_told_of_sockets_where_there_are_some() -> None:
    said = "allowed: a port from 0 to 65535 (0: any that is free)"
    assert complaint("[a]\ntarget = a:1\n").endswith(said)
    handed = complaint("[a]\ntarget = a:1\n", inherited=["tsproxy-a.socket"])
    assert handed.endswith(f"{said}, or a socket that is handed over by the route's name (FileDescriptorName=)")


@pytest.mark.parametrize("inherited", [None, []], ids=["check", "a start"])
def test_a_route_with_an_address_alone_is_no_route_for_check_either(inherited: Any) -> None:
    said = f"{FILE}:2: [a] port: given nothing; allowed: a port "
    assert complaint("[DEFAULT]\n[a]\nbind = ::1\ntarget = a:1\n[b]\nbind = ::1\ntarget = a:1\n", BASE, inherited).startswith(
        said
    )


def test_where_sockets_are_not_known_a_route_may_have_none() -> None:
    assert len(read("[a]\ntarget = a:1\n[b]\ntarget = a:1\n[c]\nport = 1\ntarget = a:1\n", BASE, None)) == 3


def test_a_value_that_is_long_leaves_room_for_what_is_allowed() -> None:
    """In the line of a reload, which has 4,096 bytes and is cut at its end."""
    said = complaint(f"[a]\nport = {'1' * 5000}\n")
    assert said == f"{FILE}:2: [a] port: given '{'1' * 63}...'; allowed: up to 1000 characters"
    assert len(complaint(f"[a]\nport = {'1' * 1000}\n")) < 1100


def test_a_socket_that_is_named_like_no_route_is_refused_at_a_start_and_left_alone_by_a_reload(tmp_path: Path) -> None:
    file = tmp_path / "routes.ini"
    file.write_text(A)
    with pytest.raises(UsageError) as caught:
        routes.config_of({"--routes": str(file)}, ["b"])
    assert str(caught.value) == f"LISTEN_FDNAMES: given 'b'; allowed: the name of a route of {file}"
    assert [route.name for route in routes.load(str(file), Route(()), ["b"]).routes] == ["a"]


@pytest.mark.parametrize("binds", [("::", "0.0.0.0"), ("::1", "127.0.0.1"), ("127.0.0.1", "127.0.0.2"), ("::", "127.0.0.1")])
def test_routes_may_share_a_port_on_other_addresses(binds: Tuple[str, str]) -> None:
    one, other = binds
    assert len(read(f"[a]\nport=1\nbind={one}\ntarget=a:1\n[b]\nport=1\nbind={other}\ntarget=b:1")) == 2


def test_each_route_may_have_any_port_that_is_free() -> None:
    assert len(read("[DEFAULT]\nport=0\ntarget=a:1\n[a]\n[b]\n")) == 2


@pytest.mark.parametrize("before", ["", "\ufeff", "[a]\n", "[a]\r\nport=1\r\n", "[\u00fc]\n"])
def test_a_byte_that_is_no_utf8_is_named_with_its_line(before: str) -> None:
    with pytest.raises(UsageError) as caught:
        routes.parse(before.encode() + b"bind=\xff", FILE, BASE)
    assert str(caught.value) == f"{FILE}:{before.count(chr(10)) + 1}: given the byte 0xff; allowed: UTF-8"


def test_a_file_that_can_not_be_read_costs_one_line(tmp_path: Path) -> None:
    big = tmp_path / "big"
    big.touch()
    os.truncate(big, ini.MOST_BYTES + 1)
    for path, said in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory"), (big, "a file of up to 4 MiB")):
        with pytest.raises(UsageError, match=f"^--routes: given '{path}'; .*{said}"):
            routes.load(str(path), BASE)
    (tmp_path / "venue").write_text(VENUE)
    assert routes.load(str(tmp_path / "venue"), BASE).routes == MEANT


def test_a_pipe_is_read_to_its_end_and_nobody_waits_for_a_writer_who_is_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(UsageError, match=f"^{pipe}: given no route"):
        routes.load(str(pipe), BASE)  # which nobody has opened to write
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(pipe, os.O_WRONLY)
    monkeypatch.setattr(ini, "_PATIENCE_S", 0.01)
    with pytest.raises(UsageError, match=f"^--routes: given '{pipe}'; .*nothing came for 0.01 s"):
        routes.load(str(pipe), BASE)
    monkeypatch.undo()
    os.write(writer, VENUE[:50].encode())
    rest = threading.Timer(0.05, lambda: (os.write(writer, VENUE[50:].encode()), os.close(writer)))
    rest.start()
    assert routes.load(str(pipe), BASE).routes == MEANT
    rest.join()
    os.close(reader)


# Any bytes, any text

FRAGMENTS = ["[a]", "[b]", "[DEFAULT]", "[a", "[]", " [c]", "port = 1", "port=2", " port = 3", "  4", "\t5", "target = a:1"]
FRAGMENTS += ["# c", "  ; c", "", "  ", "=", "x = y", " x =", "\u00a0= z\u2003"]
TEXTS = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=12), max_size=12).map("\n".join)


@settings(deadline=None, max_examples=examples(500))
@given(st.binary(max_size=300) | TEXTS.map(lambda text: text.encode("utf-8", "replace")))
@example(b"[a]\nport=1\ntarget=a:1\n")
@example(b"\xef\xbb\xbf[")
def test_any_bytes_are_routes_or_cost_one_printable_line(data: bytes) -> None:
    try:
        assert routes.parse(data, FILE, BASE).routes
    except UsageError as problem:
        assert str(problem).startswith(FILE)
        assert str(problem).isprintable()


def by_configparser(text: str) -> Said:
    parser = configparser.ConfigParser(interpolation=None, delimiters=("=",), comment_prefixes=("#", ";"), strict=True)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_file(io.StringIO(text, newline=None))
    return {name: {key: [line for line in value.split("\n") if line] for key, value in parser[name].items()} for name in parser}


def by_ini(text: str) -> Said:
    sections = {section.name: section.keys for section in ini.read(text.encode(), FILE)}
    defaults = sections.pop(ini.DEFAULT, {})
    found = {ini.DEFAULT: defaults, **{name: {**defaults, **keys} for name, keys in sections.items()}}
    return {name: {key: [value.text for value in of.values] for key, of in keys.items()} for name, keys in found.items()}


@settings(deadline=None, max_examples=examples(1000))
@given(TEXTS.filter(lambda text: not text.startswith("\ufeff")))
@example("[a]\n  port = 1\n  target = x\n    y\n# c\n\n    z\n")
@example("[a]\nx =\n  1\n  [b]\n")
@example("[a]\nx = 1\n[b]\n  y = 2\n")
def test_what_is_taken_is_what_configparser_reads(text: str) -> None:
    try:
        found = by_ini(text)
    except (UsageError, UnicodeEncodeError):
        return
    assert found == by_configparser(text)


SAMPLES: Dict[str, st.SearchStrategy[List[str]]] = {
    name: st.sampled_from([[text] for option, text, _, _ in GOOD if option == f"--{name}"])
    for name in routes.KEYS.keys() - {"port", "target", "source", "timestamps", "trust-host"}
}
SAMPLES["timestamps"] = st.sampled_from([["strip"], ["preserve"]])
SAMPLES["trust-host"] = st.sampled_from([["on"], ["off"]])
SAMPLES["allow"] = st.lists(st.sampled_from(["10.0.0.0/8", "::1", "192.0.2.1"]), min_size=1, max_size=3)
SAMPLES["source"] = st.lists(st.sampled_from(["10.20.0.5", "10.20.0.6", "fd00::5"]), min_size=1, max_size=3)
TARGETS = st.lists(st.sampled_from(["a.example:443", "b.example:1"]), min_size=1, max_size=4)
KEYS = st.fixed_dictionaries({"target": TARGETS}, optional=SAMPLES)
SECTIONS = st.dictionaries(st.from_regex(routes._NAME, fullmatch=True), KEYS, min_size=1, max_size=4)
BLANKS = st.sampled_from(["", "", "\n", "# a comment\n", "  ; another = one\n", " \n"])


@st.composite
def written(draw: st.DrawFn) -> Tuple[List[str], Said]:
    """A file in any layout, by its lines; and what it says."""
    said = {name: {**keys, "port": [str(1 + number)]} for number, (name, keys) in enumerate(draw(SECTIONS).items())}
    text = ""
    for name, keys in said.items():
        text += f"{draw(BLANKS)}[{name}]\n"
        for key, values in draw(st.permutations(list(keys.items()))):
            between = f"\n{draw(BLANKS)}{draw(st.sampled_from([' ', '    ', chr(9)]))}"
            text += f"{draw(BLANKS)}{key}{draw(st.sampled_from(['=', ' = ', chr(9) + '=']))}{between.join(values)}\n"
    return text.split("\n"), said


@settings(deadline=None, max_examples=examples(300))
@given(written())
def test_a_file_that_is_written_says_what_was_meant(file: Tuple[List[str], Said]) -> None:
    lines, said = file
    found = read("\n".join(lines))
    assert [route.name for route in found] == list(said)
    for route in found:
        keys = said[route.name]
        given_options: Dict[str, Any] = {
            f"--{key}": values if f"--{key}" in REPEATED else values[0] for key, values in keys.items()
        }
        given_options["--trust-host"] = keys.get("trust-host") == ["on"]
        meant = route_of(config.parse(options(**given_options)))
        assert route == meant._replace(name=route.name, listen_options=tuple(key for key in ("port", "bind") if key in keys))


@settings(deadline=None, max_examples=examples(300))
@given(written(), st.sampled_from(["nonsense", "= 1", "[nonsense", "Port = 1", "workers = 1"]), st.data())
def test_the_line_that_is_named_is_that_of_the_mistake(file: Tuple[List[str], Said], wrong: str, data: st.DataObject) -> None:
    lines, _ = file
    at = data.draw(st.integers(0, len(lines)))
    section = next((line for line in reversed(lines[:at]) if line.startswith("[")), None)
    following = next((line for line in lines[at:] if line.strip() and line.strip()[0] not in "#;"), "")
    assume(not following[:1].isspace())  # else it belongs to the mistake
    said = complaint("\n".join([*lines[:at], wrong, *lines[at:]]))
    assert said.startswith(f"{FILE}:{at + 1}: " + (f"{section} " if section else "given "))
