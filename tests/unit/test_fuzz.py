"""What comes from outside, bent: command lines, addresses, SYNs, the environment, the workers' messages. No traceback, ever.

What is sound is taken for what it says, by another reading (getopt(3)'s rules, inet_pton(3), getaddrinfo(3), a second
parser). What is not costs one line that names the option, what was given and what is allowed.
"""

from __future__ import annotations

import contextlib
import gc
import getopt
import ipaddress
import json
import os
import re
import socket
import struct
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import pytest
from _tsproxy.cli import config, parser
from _tsproxy.cli.config import Config, UsageError
from _tsproxy.cli.words import words as words_of
from _tsproxy.linux import addresses, systemd
from _tsproxy.linux.addresses import PACKED_SIZE
from _tsproxy.policy import syn
from _tsproxy.proxy.inbox import Command, Message
from _tsproxy.stats import connection_line, encoder, records
from _tsproxy.stats.records import ConnectionRecord, Notice, Record
from command_line import BAD, GOOD, KNOWN, MANUAL, NAMED, fields_of, parsed, route_of, run
from docopt import docopt
from harness import examples
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from samples import FULL, RECORDS

thorough = settings(deadline=None, max_examples=examples(400), suppress_health_check=[HealthCheck.too_slow])
quick = settings(thorough, max_examples=examples(150))
Pair = Tuple[str, Optional[str]]  # an option and its value; None for a switch
Spelled = List[List[str]]  # the words of each option, of the command, of an argument

# Text that is nearly right

BLANKS = [" ", "\t", "\n", "\r\n", "\0", "\x1b[31m", "\u00a0", "\u2028", "\ufeff", "\u202e"]
STRANGE = ["\u0663", "\uff11", "\u00b2", "\u212a", "\u0130", "\U0001d7d8", "\udcff", "\udc80\udcfe", "\u00fc", "e\u0301"]
SIGNS = ["-", "--", "---", "+", "_", "1_000", "0x", "e9", ".", "..", ",", ":", "::", "%", "[", "]", "[[", "/", "//", "=", "=="]
SHELL = ["$", "*", "?", "~", "#", "'", '"', "\\", "${HOME}", "%s", "{0}", "[options]", "<port>", "...", "|", "(", ")"]
HUGE = ["9" * 19, "9" * 400, "9" * 5000, "0" * 30, "1" + "0" * 12, "18446744073709551616", "4294967296", "2147483648", "65536"]
BITS = st.sampled_from(
    [*BLANKS, *STRANGE, *SIGNS, *SHELL, *HUGE, "0", "1", "8", "a", "f", "g", "lo", "us", "ms", "s", "m", "h", "k"]
)


@st.composite
def bent(draw: st.DrawFn, texts: st.SearchStrategy[str]) -> str:
    """One of the texts with up to three mistakes in it."""
    text = draw(texts)
    for _ in range(draw(st.integers(0, 3))):
        at, to = (draw(st.integers(0, len(text))) for _ in range(2))
        text = draw(
            st.sampled_from(
                [
                    text[:at] + draw(BITS) + text[at:],
                    text[:at] + draw(BITS) + text[at + 1 :],
                    text[: min(at, to)] + text[max(at, to) :],
                    text[:at] + text[min(at, to) :],
                    text.translate({ord("0") + digit: 0xFF10 + digit for digit in range(10)}),
                    text.upper(),
                    text[::-1],
                    f"{text}{text}",
                ]
            )
        )
    return text


def as_argument(data: bytes) -> str:
    """How bytes come in by argv or the environment."""
    return os.fsdecode(data.replace(b"\0", b""))


ARGUMENTS = st.text(max_size=12) | st.binary(max_size=12).map(as_argument)
SAMPLES: Dict[str, List[str]] = {name: [row[1] for row in GOOD if row[0] == name] for name in NAMED}
REFUSED: Dict[str, List[str]] = {name: [text for option, texts in BAD if option == name for text in texts] for name in NAMED}
PREFIXES = [(4, 0), (4, 8), (4, 24), (4, 31), (4, 32), (6, 0), (6, 10), (6, 64), (6, 95), (6, 96), (6, 104), (6, 127), (6, 128)]
LITERALS = st.ip_addresses().map(str) | st.ip_addresses(v=4).map("::ffff:{}".format)
ZONED = st.builds("{}%{}".format, st.ip_addresses(v=6), st.sampled_from(["lo", "eth0.7", "1", "", "a b", "4294967296"]))
BRACKETED = (LITERALS | ZONED).map("[{}]".format)
BLOCKS = st.sampled_from(PREFIXES).flatmap(
    lambda kind: st.ip_addresses(v=kind[0]).map(lambda ip: str(ipaddress.ip_network((ip, kind[1]), strict=False)))
)
PORTS = st.integers(-1, 65537).map(str) | st.sampled_from(["", "0443", "000443", "+1", "http"])
ENDPOINTS = st.builds("{}:{}".format, LITERALS | BRACKETED | st.sampled_from(["a", "a.b.", "1.2.3", "0x7f.1", "-a", ""]), PORTS)
MORE = {
    "--target": ENDPOINTS,
    "--bind": LITERALS | BRACKETED | ZONED,
    "--source": LITERALS | BRACKETED | ZONED,
    "--allow": BLOCKS | LITERALS | BRACKETED | BLOCKS.map("::ffff:{}".format),
}


def values(option: str) -> st.SearchStrategy[str]:
    """Good, nearly good and bad values of an option."""
    known = st.sampled_from(SAMPLES[option]) | MORE.get(option, st.sampled_from(SAMPLES[option]))
    return known | bent(known) | st.sampled_from(REFUSED[option]) | ARGUMENTS


# Values


def read(option: str, text: str) -> Optional[Config]:
    """The Config that the value makes, or None if it costs a line, which must be one that a person can act on."""
    try:
        return parsed(option, text)
    except UsageError as problem:
        line = str(problem)
    start = f"{option}: given {text!r}; allowed: "
    assert line.startswith(start)
    assert 2 < len(line) - len(start) < 200
    assert line.isprintable()
    return None


@pytest.mark.parametrize("option", NAMED)
@settings(quick, max_examples=examples(100))
@given(data=st.data())
def test_a_value_that_is_taken_is_the_same_when_it_is_written_again(option: str, data: st.DataObject) -> None:
    wanted = read(option, data.draw(values(option)))
    if wanted is None:
        return
    again = config.parse(parser.read(MANUAL, words_of(wanted, route_of(wanted)), docopt))
    meant = {**fields_of(wanted), "routes": (), "listen_options": ()}  # which of them were given is not to be seen in a value
    assert {**fields_of(again), "routes": (), "listen_options": ()} == meant


@pytest.mark.parametrize("option", ["--port", "--workers", "--max-connections", "--static-timestamp"])
@quick
@given(data=st.data())
def test_a_whole_number_is_what_its_ascii_digits_say(option: str, data: st.DataObject) -> None:
    text = data.draw(values(option))
    found = read(option, text)
    if found is not None:
        assert set(text) <= set("0123456789")
        assert fields_of(found)[config.OPTIONS[option].field] == int(text)


def packed_ip(text: str) -> Optional[bytes]:
    """The address by inet_pton(3), an IPv4-mapped one as IPv4; None if it is none."""
    for family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError, ValueError):  # ValueError: NUL, lone surrogates
            raw = socket.inet_pton(family, text)
            return raw[12:] if raw[:12] == b"\0" * 10 + b"\xff\xff" else raw
    return None


def is_unicast(raw: bytes) -> bool:
    """By the first byte of groups (RFC 5771, RFC 4291, section 2.7); 255.255.255.255 is broadcast."""
    return not (0xE0 <= raw[0] <= 0xEF if len(raw) == 4 else raw[0] == 0xFF) and raw != b"\xff" * 4


def unbracketed(text: str) -> str:
    return text[1:-1] if text[:1] == "[" and text[-1:] == "]" else text


@pytest.mark.parametrize("option", ["--bind", "--source"])
@thorough
@given(data=st.data())
def test_an_address_is_one_where_inet_pton_says_so(option: str, data: st.DataObject) -> None:
    text = data.draw(values(option))
    found = read(option, text)
    bare = packed_ip(unbracketed(text))
    assert (found is not None) == (bare is not None and is_unicast(bare))
    if found is not None:
        written = route_of(found).bind if option == "--bind" else route_of(found).sources[0]
        assert packed_ip(written) == bare
        assert (":" in written) == (len(bare or b"") == 16)


def block_of(text: str) -> Optional[Tuple[int, int, int]]:
    """(bits of an address, the bits that count, first address) of a CIDR block, read by hand; None if it is none."""
    match = re.fullmatch(r"([0-9A-Fa-f:.]+)(?:/([0-9]{1,3}))?", text, re.ASCII)
    raw = None
    for family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError):
            raw = socket.inet_pton(family, match[1]) if match else None
            break
    if match is None or raw is None:
        return None
    width = len(raw) * 8
    bits = int(match[2] or width)
    first = int.from_bytes(raw, "big")
    if bits > width or first & ((1 << (width - bits)) - 1):
        return None
    if raw[:12] == b"\0" * 10 + b"\xff\xff" and bits >= 96:
        return 32, bits - 96, first & 0xFFFFFFFF
    return width, bits, first


@thorough
@given(values("--allow"))
@example("::ffff:0:0/96")
@example("::ffff:10.0.0.0/95")
@example("10.0.0.0/008")
def test_a_block_is_the_addresses_that_its_figures_say_and_no_other(text: str) -> None:
    found = read("--allow", text)
    meant = block_of(text)
    assert (found is not None) == (meant is not None)
    if found is not None:
        (block,) = route_of(found).allow
        assert (block.max_prefixlen, block.prefixlen, int(block.network_address)) == meant


def numeric(host: str, port: int) -> Optional[Tuple[Any, ...]]:
    """What getaddrinfo(3) makes of it without asking a server; None if that would take one."""
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)[0][4]
    except socket.gaierror:
        return None


@thorough
@given(values("--target"))
@example("[::ffff:192.0.2.1%lo]:443")
@example("[::ffff:192.0.2.1%1]:443")
def test_a_target_is_what_the_resolver_will_take_it_for(text: str) -> None:
    found = read("--target", text)
    if found is None:
        return
    (target,) = route_of(found).targets
    assert config.target("--target", str(target)) == target
    assert target.host.encode("idna")  # what getaddrinfo() in Python does first
    if not target.is_literal:
        assert numeric(target.host, target.port) is None
        return
    address = ipaddress.ip_address(target.host)
    assert not (target.scope and address.version == 4)
    if not target.scope or (target.scope == "lo" and address.is_link_local):
        sockaddr = numeric(target.host + "%" * bool(target.scope) + target.scope, target.port)
        assert sockaddr is not None
        assert (packed_ip(sockaddr[0].partition("%")[0]), sockaddr[1]) == (address.packed, target.port)


# Command lines


def spelled(draw: st.DrawFn, option: str, value: Optional[str]) -> List[str]:
    """The option in one of the ways that it may be written."""
    short = next((spelling for spelling, known in TABLE.items() if known.name == option and len(spelling) == 2), None)
    if value is None:
        return [short or option]
    ways = [[f"{option}={value}"]] + [[option, value]] * (value != "--")
    if short:
        ways += [[short + value]] * bool(value) + [[short, value]] * (value != "--")
    return draw(st.sampled_from(ways))


TABLE = parser.options_of(MANUAL)
ONCE = [name for name in config.OPTIONS if name != "--static-timestamp"]
SWITCHES = ["--reuse-port", "--trust-host"]
COMMANDS = [[], [], [], [["check"]], [["generate"], ["netns"]]]


@st.composite
def sound_lines(draw: st.DrawFn) -> Tuple[Spelled, List[str]]:
    """(a sound command line, the same in one fixed spelling): relaying, check or generate, each option any way, any order."""
    targets = draw(st.lists(st.sampled_from(["a:1", "a.b.:65535", "exchange.example:443"]), min_size=1, max_size=3))
    pairs: List[Pair] = [("--target", target) for target in targets]
    pairs += [("--allow", block) for block in draw(st.lists(st.sampled_from(SAMPLES["--allow"]), max_size=2))]
    for name in draw(st.lists(st.sampled_from(ONCE), unique=True, max_size=4)):
        pairs.append((name, draw(st.sampled_from(SAMPLES[name]))))
    if not {"--cpus", "--workers"} <= {name for name, _ in pairs}:  # they may contradict each other
        pairs += [(name, None) for name in draw(st.lists(st.sampled_from(SWITCHES), unique=True))]
    else:
        pairs = [pair for pair in pairs if pair[0] != "--workers"]
    command = draw(st.sampled_from(COMMANDS))
    canonical = [word for words in command for word in words]
    canonical += [name if value is None else f"{name}={value}" for name, value in pairs]
    units = [spelled(draw, name, value) for name, value in pairs]
    return interleaved(draw, command, units), canonical


def interleaved(draw: st.DrawFn, command: Spelled, units: Spelled) -> Spelled:
    """The command's words among the options, each kind in its own order."""
    line = list(units)
    for at, words in zip(sorted(draw(st.lists(st.integers(0, len(units)), min_size=2, max_size=2))), command):
        line.insert(at + len(line) - len(units), words)
    return line


def flat(line: Spelled) -> List[str]:
    return [word for words in line for word in words]


@quick
@given(sound_lines())
def test_a_sound_line_means_the_same_however_it_is_spelled(pair: Tuple[Spelled, List[str]]) -> None:
    line, canonical = pair
    spelled_so, plainly = run(flat(line)), run(canonical)
    assert spelled_so == plainly
    assert (spelled_so.code, spelled_so.err) == (0, "")
    assert spelled_so.asked is not None
    (meant,) = [each for each in spelled_so.asked[1] if isinstance(each, Config)]
    written = {name: [word.partition("=")[2] for word in canonical if word.startswith(f"{name}=")] for name in config.REPEATED}
    assert [str(target) for target in route_of(meant).targets] == written["--target"]
    assert route_of(meant).allow == tuple(config.network("--allow", text) for text in written["--allow"])


EVERY_NAME = [*TABLE, *parser.commands_of(MANUAL), "generate", "netns", "OUT", "KIND", "options", "top", "--zero-copy"]
WORDS = st.sampled_from([*EVERY_NAME, "--", "-", "", "-hV", "-tp", "-Vt", "-th", "--=", "-=", "=x", "--no-json", "-p-1"])
BENT_WORDS = bent(WORDS) | ARGUMENTS | st.sampled_from(sorted(TABLE)).flatmap(lambda name: bent(st.just(f"{name}=1")))
PREFIX = st.sampled_from(sorted(KNOWN)).flatmap(lambda name: st.integers(2, len(name)).map(lambda end: name[:end]))


@st.composite
def mangled_lines(draw: st.DrawFn) -> List[str]:
    """A sound command line with one to four mistakes in it."""
    line, _ = draw(sound_lines())
    words = flat(line)
    for _ in range(draw(st.integers(1, 4))):
        at, to = (draw(st.integers(0, len(words))) for _ in range(2))
        change = draw(st.sampled_from(sorted(CHANGES)))
        words = CHANGES[change](draw, words, at, to)
    return words


def bad_value(draw: st.DrawFn, words: List[str], at: int, to: int) -> List[str]:
    option = draw(st.sampled_from(NAMED))
    return words[:at] + spelled(draw, option, draw(values(option))) + words[at:]


def bend(draw: st.DrawFn, words: List[str], at: int, to: int) -> List[str]:
    return words[:at] + [draw(bent(st.just(word))) for word in words[at : at + 1]] + words[at + 1 :]


Change = Callable[[st.DrawFn, List[str], int, int], List[str]]
CHANGES: Dict[str, Change] = {
    "abbreviate": lambda draw, words, at, to: [*words[:at], draw(PREFIX), *words[at:]],
    "assign nothing": lambda draw, words, at, to: [*words[:at], f"{draw(st.sampled_from(sorted(TABLE)))}=", *words[at:]],
    "insert": lambda draw, words, at, to: [*words[:at], draw(WORDS | BENT_WORDS), *words[at:]],
    "end the options": lambda draw, words, at, to: [*words[:at], "--", *words[at:]],
    "drop": lambda draw, words, at, to: words[:at] + words[at + 1 :],
    "double": lambda draw, words, at, to: words[: at + 1] + words[at:],
    "swap": lambda draw, words, at, to: words[to:] + words[at:to] + words[:at],
    "glue": lambda draw, words, at, to: [*words[:at], "".join(words[at : at + 2]), *words[at + 2 :]],
    "bad value": bad_value,
    "bend": bend,
}
OPTION = r"--[a-z-]+"
COMPLAINTS = [
    rf"{OPTION}: given .*; allowed: .+",
    r"(OUT|FILE|KIND): given nothing; allowed: .+",
    rf"{OPTION}: not an option of .+; usage: tsproxy\.py .+",
    rf"{OPTION}=\S+ contradicts {OPTION}=\S+: .+; give one of the two",
    rf"{OPTION} contradicts {OPTION}=\S+: .+; give one of the two",
    r"unknown (option|command) '.*",
    r'unknown (option|command) ".*',
    r"can't take .* after --; .+",
    r"can't take .*; usage: tsproxy\.py .+",
]
COMPLAINT = re.compile(rf"tsproxy.py: ({'|'.join(COMPLAINTS)})\n")


@settings(thorough, max_examples=examples(700))
@given(mangled_lines() | st.lists(WORDS | BENT_WORDS, max_size=6))
@example(["--target=a:1", "--port", "1_000"])
@example(["-t", "a:1", "-p\uff11"])
@example(["--target=a:1", "--\0"])
@example(["-t"])
@example(["-tp", "-p"])
def test_a_mangled_command_line_is_taken_or_costs_one_line_of_a_known_form(words: List[str]) -> None:
    before = time.process_time()
    ran = run(words)
    assert time.process_time() - before < 5
    if ran.code == 0:
        assert (ran.err, bool(ran.asked)) == ("", not ran.out)
        return
    assert (ran.code, ran.out, ran.asked) == (2, "", None)
    assert COMPLAINT.fullmatch(ran.err), ran.err
    assert ran.err[:-1].isprintable()
    if named := re.match(rf"tsproxy.py: ({OPTION}): ", ran.err):
        assert named[1] in KNOWN


GETOPT_SHORT = "".join(spelling[1] + ":" * bool(known.argument) for spelling, known in TABLE.items() if len(spelling) == 2)
GETOPT_LONG = [known.name[2:] + "=" * bool(known.argument) for known in KNOWN.values()]


@settings(thorough, max_examples=examples(600))
@given(mangled_lines() | sound_lines().map(lambda pair: flat(pair[0])))
@example(["-t", "a:1", "-p=1"])
@example(["bundle", "--", "out"])
@example(["bundle", "-"])
def test_a_line_that_is_taken_says_to_getopt_what_it_says_to_us(words: List[str]) -> None:
    try:
        ready = parser.normalize(MANUAL, words)
    except UsageError:
        return
    options, plain = getopt.gnu_getopt(words, GETOPT_SHORT, GETOPT_LONG)
    named = [(TABLE[spelling].name, value) for spelling, value in options]
    if ready in (["--help"], ["--version"]):
        assert (ready[0], "") in named
        return
    assert [word for word in ready if not word.startswith("--")] == plain
    ours = [word.partition("=") for word in ready if word.startswith("--")]
    assert [(name, value) for name, _, value in ours] == named


LONG = [
    ["--target=a:1", *["--allow=10.0.0.0/8"] * 4000],
    ["--target=a:1"] * 4000,
    ["generate", *["x"] * 4000, "--target=a:1"],
    ["-" + "h" * 100_000],
    ["--" + "max-connections" * 8000],
    ["c" * 100_000],
    ["-ta:1", "--port", "0" * 100_000],
    ["-t[" + "1:" * 50_000 + "]:1"],
    ["-t" + "a." * 50_000 + ":1"],
    ["-ta:1", "--cpus=" + "0," * 50_000],
    ["-ta:1", "--user-timeout=" + "9" * 100_000 + "." + "9" * 100_000],
]


@pytest.mark.parametrize("words", LONG, ids=lambda words: ascii(words[-1])[:20])
def test_a_line_as_long_as_the_kernel_passes_takes_no_more_than_a_moment(words: List[str]) -> None:
    before = time.process_time()
    assert run(words).code in (0, 2)
    assert time.process_time() - before < 5


# The command itself


# Addresses between workers

PACKED = st.builds(
    lambda family, rest: struct.pack("=H", family) + rest,
    st.sampled_from([socket.AF_INET, socket.AF_INET6]),
    st.binary(min_size=PACKED_SIZE - 2, max_size=PACKED_SIZE - 2)
    | st.binary(min_size=10, max_size=10).map(lambda ends: ends[:6] + bytes(10) + b"\xff\xff" + ends[6:]),  # IPv4-mapped
)


@thorough
@given(PACKED)
def test_any_bytes_of_a_family_are_an_address_that_the_kernel_would_take(packed: bytes) -> None:
    assert addresses.is_packed(packed)
    found = addresses.unpack(packed)
    family, number = addresses.raw_ip(packed)
    assert ipaddress.ip_address(found.ip) == ipaddress.ip_address(
        number.to_bytes(16 if family == socket.AF_INET6 else 4, "big")
    )
    again = addresses.from_sockaddr(found.family, found.sockaddr)
    mapped = getattr(ipaddress.ip_address(found.ip), "ipv4_mapped", None)
    zone = found.scope if family == socket.AF_INET6 else 0
    assert again == (found._replace(scope=zone) if mapped is None else (socket.AF_INET, str(mapped), found.port, 0))
    with contextlib.suppress(OSError), socket.socket(found.family, socket.SOCK_DGRAM) as probe:
        probe.bind(found._replace(port=0).sockaddr)  # OSError: not of this host


@given(st.binary(max_size=PACKED_SIZE + 2))
def test_bytes_of_no_family_are_known_as_such(data: bytes) -> None:
    known = data[:2] in (struct.pack("=H", socket.AF_INET), struct.pack("=H", socket.AF_INET6))
    assert addresses.is_packed(data) == known


# SYNs


def options_by_the_rfc(field: bytes) -> Optional[List[Tuple[int, bytes]]]:
    """RFC 9293, section 3.1, once more, from the front, one option at a time; None if a length is wrong."""
    if not field or field[0] == 0:
        return []
    if field[0] == 1:
        size, data = 1, b""
    else:
        size = field[1] if len(field) > 1 else 0
        data = field[2:size]
        if size < 2 or size > len(field):
            return None
    rest = options_by_the_rfc(field[size:])
    return None if rest is None else [(field[0], data), *rest]


def segment_by_the_rfc(headers: bytes) -> Optional[List[Tuple[int, bytes]]]:
    """RFC 791, 8200 and 9293, once more; None where it is no TCP segment."""
    try:
        version, rest = headers[0] >> 4, b""
        if version == 4:
            (_, _, _, _, _, _, protocol, _, _, _) = struct.unpack_from("!BBHHHBBHII", headers)
            rest = headers[(headers[0] & 15) * 4 :] if (headers[0] & 15) >= 5 else b""
        elif version == 6:
            (_, _, protocol, _, _, _) = struct.unpack_from("!IHBB16s16s", headers)
            rest = headers[40:]
            while protocol in (0, 43, 44, 60):
                after, units, place, _ = struct.unpack_from("!BBHI", rest)
                if protocol == 44 and place // 8:
                    return None
                rest = rest[8:] if protocol == 44 else rest[8 * (units + 1) :]
                protocol = after
        else:
            return None
        words = struct.unpack_from("!HHIIBBHHH", rest)[4] >> 4
    except (IndexError, struct.error):
        return None
    if protocol != 6 or words < 5 or len(rest) < words * 4:
        return None
    return options_by_the_rfc(rest[20 : words * 4])


KINDS = st.sampled_from([1, 1, 2, 3, 4, 5, 8, 8, 28, 30, 34, 69, 253, 254, 255]) | st.integers(2, 255)
OPTIONS = st.tuples(KINDS, st.sampled_from([b"", bytes(8), b"\1\2\3\4\5\6\7\x08"]) | st.binary(max_size=12))
EXTENSIONS = st.lists(st.tuples(st.sampled_from([0, 43, 60]), st.integers(0, 3)) | st.just((44, 0)), max_size=4)


def field_of(found: List[Tuple[int, bytes]]) -> bytes:
    return b"".join(b"\1" if kind == 1 else struct.pack("BB", kind, 2 + len(data)) + data for kind, data in found)


@st.composite
def segments(draw: st.DrawFn) -> Tuple[bytes, List[Tuple[int, bytes]]]:
    """(the headers of a sound SYN, its options): IPv4 with options of its own, or IPv6 with extension headers."""
    found = [(kind, b"" if kind == 1 else data) for kind, data in draw(st.lists(OPTIONS, max_size=6))]
    while len(field_of(found)) > 40:
        found.pop()
    field = field_of(found)
    if len(field) % 4:
        field += b"\0" + draw(st.binary(min_size=3, max_size=3))  # what stands behind the end of the list is padding
        field = field[: len(field) // 4 * 4]
    tcp = struct.pack("!HHIIBBHHH", 41140, 8089, 1, 0, (20 + len(field)) // 4 << 4, 2, 64240, 0, 0) + field
    if draw(st.booleans()):
        words = draw(st.integers(5, 15))
        head = struct.pack("!BBHHHBBHII", 0x40 | words, 0, words * 4 + len(tcp), 0, 0x4000, 64, 6, 0, 1, 2)
        return head + draw(st.binary(min_size=words * 4 - 20, max_size=words * 4 - 20)) + tcp, found
    extensions = draw(EXTENSIONS)
    following = [*(kind for kind, _ in extensions), 6]
    head = struct.pack("!IHBB16s16s", 6 << 28, len(tcp), following[0], 64, bytes(16), bytes(16))
    for after, (kind, units) in zip(following[1:], extensions):
        if kind == 44:  # the whole packet in one fragment; the second byte means nothing
            head += struct.pack("!BBHI", after, draw(st.integers(0, 255)), draw(st.integers(0, 7)), 7)
        else:
            head += struct.pack("BB", after, units) + draw(st.binary(min_size=6 + 8 * units, max_size=6 + 8 * units))
    return head + tcp, found


def read_syn(headers: bytes) -> Optional[List[Tuple[int, bytes]]]:
    """Our reading; None if it is refused. Whatever is read has words and a TSval or none."""
    tsval = syn.offered_tsval(headers)
    try:
        found = syn.parse(headers)
    except syn.Malformed:
        assert tsval is None
        return None
    assert str(found).isprintable()
    assert found.tsval == tsval
    assert tsval is None or (found.has_timestamps and 0 <= tsval < 1 << 32)
    return list(found.options)


@thorough
@given(segments())
def test_the_options_of_any_sound_segment_come_out(made: Tuple[bytes, List[Tuple[int, bytes]]]) -> None:
    headers, options = made
    assert read_syn(headers) == segment_by_the_rfc(headers) == options


@st.composite
def mangled_segments(draw: st.DrawFn) -> bytes:
    headers, _ = draw(segments())
    return mangled(draw, headers)


FIELDS = st.lists(st.sampled_from([0, 1, 2, 3, 4, 8, 10, 40, 255]), max_size=40).map(bytes)


def with_field(field: bytes) -> bytes:
    """A segment with these bytes for options, whatever they say."""
    field = (field + b"\1\1\1")[: -(-len(field) // 4) * 4]
    tcp = struct.pack("!HHIIBBHHH", 41140, 8089, 1, 0, (20 + len(field)) // 4 << 4, 2, 64240, 0, 0) + field
    return struct.pack("!BBHHHBBHII", 0x45, 0, 20 + len(tcp), 0, 0x4000, 64, 6, 0, 1, 2) + tcp


def mangled(draw: st.DrawFn, data: bytes) -> bytes:
    """One to four bytes changed, pieces cut out or put in."""
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        data = draw(
            st.sampled_from(
                [
                    data[:at] + bytes([draw(st.integers(0, 255))]) + data[at + 1 :],
                    data[:at]
                    + draw(st.sampled_from([b"\0", b"\1", b"\xff", b"\x08\x0a", b"\x02", b"\0\0\0\0"]))
                    + data[at + 1 :],
                    data[:at],
                    data[:at] + data[at + draw(st.integers(1, 8)) :],
                    data[:at] + draw(st.binary(min_size=1, max_size=8)) + data[at:],
                ]
            )
        )
    return data


@settings(thorough, max_examples=examples(600))
@given(mangled_segments() | FIELDS.map(with_field) | st.binary(max_size=120))
@example(b"\x44" + bytes(8) + b"\6" + bytes(18) + b"\x50\0\0\0\x50" + bytes(7))  # a header of 16 bytes
@example(bytes.fromhex("6000000000283c40") + bytes(32) + b"\x3c\0")
@example(bytes.fromhex("6000000000302c40") + bytes(32) + b"\6\0\0\x08" + bytes(16) + b"\x50" + bytes(7))  # a later fragment
def test_a_mangled_segment_reads_as_a_second_parser_reads_it(headers: bytes) -> None:
    assert read_syn(headers) == segment_by_the_rfc(headers)


# The environment

NUMERIC = ["0", "1", "3", "7", "1024", "1025", "00001", "001024", "0000001", "-1", "+1", "1 ", " 1", "1\n", "1_0", "0x1", "1.0"]
NUMERIC += ["1e3", "", "\u0661", "000001" + "9" * 9, "001024" + "9" * 5000, "18446744073709551615", "18446744073709551616"]
VARIABLE = st.sampled_from(NUMERIC) | bent(st.sampled_from(NUMERIC)) | st.binary(max_size=12).map(as_argument)
NAMES = st.lists(st.text(max_size=5), max_size=4).map(":".join) | st.just(":" * 2000)
PLACES = st.sampled_from(
    ["", "/", "@", "@a", "/nowhere/notify", "/" + "x" * 107, "/" + "x" * 108, "@" + "x" * 108, "vsock:2:1", "a"]
)
ENVIRONMENTS = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(["LISTEN_FDS", "LISTEN_PID", "WATCHDOG_USEC", "WATCHDOG_PID"], VARIABLE),
        "LISTEN_FDNAMES": NAMES,
        "NOTIFY_SOCKET": PLACES | st.binary(max_size=120).map(as_argument),
    },
)


@thorough
@given(ENVIRONMENTS)
@example({"LISTEN_FDS": "000001999999999", "LISTEN_PID": "7"})
@example({"LISTEN_FDS": "001024" + "9" * 5000, "LISTEN_PID": "7"})
@example({"LISTEN_FDS": "0000001", "LISTEN_PID": "7"})
def test_any_handover_is_that_many_descriptors_or_one_line(environment: Dict[str, str]) -> None:
    given_text = environment.get("LISTEN_FDS", "")
    try:
        handed = systemd.inherited(environment, 7)
    except systemd.BadHandover as problem:
        assert str(problem) == f"LISTEN_FDS: given {given_text!r}; allowed: a number from 1 to 1024"
        assert str(problem).isprintable()
        assert not (re.fullmatch("0{0,9}[0-9]{1,9}", given_text, re.ASCII) and 1 <= int(given_text) <= 1024)
        return
    ours = "LISTEN_FDS" in environment and environment.get("LISTEN_PID") == "7"
    assert not ours or set(given_text) <= set("0123456789")
    assert [each.fd for each in handed] == list(range(3, 3 + int(given_text))) if ours else handed == []
    assert len(handed) <= 1024
    assert set(systemd.without_handover(environment)) == set()


@thorough
@given(ENVIRONMENTS)
@example({"NOTIFY_SOCKET": "@a", "WATCHDOG_USEC": "000000000000000100000000"})
@example({"NOTIFY_SOCKET": "@a", "WATCHDOG_USEC": "9" * 5000})
def test_no_manager_is_too_strange_to_be_told(environment: Dict[str, str]) -> None:
    notifier = systemd.Notifier(environment, 7)
    try:
        notifier.notify(READY=1, STATUS="\udcff\n\0")
        assert 0 <= notifier.watchdog_s <= 3600
        usec, pid = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", "7")
        if notifier.watchdog_s:
            assert pid == "7"
            assert set(usec) <= set("0123456789")
            assert notifier.watchdog_s == min(int(usec) / 1e6, 3600)
    finally:
        notifier.close()


def unix(kind: int, path: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, kind)
    made.bind(str(path))
    if kind == socket.SOCK_STREAM:
        made.listen()
    return made


@contextlib.contextmanager
def descriptor(kind: str, directory: Path) -> Iterator[int]:
    """An open descriptor of that kind."""
    makers: Dict[str, Callable[[], Any]] = {
        "a TCP socket of its own": socket.socket,
        "a datagram socket": lambda: socket.socket(type=socket.SOCK_DGRAM),
        "a netlink socket": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
        "a unix listener": lambda: unix(socket.SOCK_STREAM, directory / "listener"),
        "a unix datagram socket": lambda: unix(socket.SOCK_DGRAM, directory / "datagrams"),
        "a file": lambda: (directory / "file").open("wb"),
    }
    with makers[kind]() as made:
        fd = os.dup(made.fileno())
    try:
        yield fd
    finally:
        with contextlib.suppress(OSError):
            os.close(fd)


DESCRIPTORS = [
    "a TCP socket of its own",
    "a datagram socket",
    "a netlink socket",
    "a unix listener",
    "a unix datagram socket",
    "a file",
]


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # refused, and with that the program ends
@pytest.mark.parametrize("kind", DESCRIPTORS)
def test_nothing_but_a_tcp_listener_is_taken_for_one(kind: str, tmp_path: Path) -> None:
    with descriptor(kind, tmp_path) as fd:
        with pytest.raises(systemd.BadHandover) as refused:
            systemd.listener_from(systemd.Inherited(fd, ""))
        said = str(refused.value)
        del refused
        gc.collect()  # the socket in the traceback closes its descriptor now, not somebody's who has its number later
    assert said.startswith(f"LISTEN_FDS: descriptor {fd}")
    assert said.endswith("; allowed: a listening TCP socket")
    assert said.isprintable()


# What workers and the acceptor tell each other


@st.composite
def mangled_frames(draw: st.DrawFn) -> bytes:
    return mangled(draw, b"".join(map(records.encode, draw(RECORDS))))


@settings(thorough, max_examples=examples(500))
@given(mangled_frames() | st.binary(max_size=300), st.integers(1, 400))
@example(bytes(400), 400)
@example(b"\xff\xff\1" + bytes(400), 7)
@example(records.encode(FULL._replace(client=bytes(PACKED_SIZE))), 400)
@example(records.encode(FULL)[:-2] + b"\xff\1", 400)
@example(records.encode(Notice(1, 2, "info", ""))[:-5] + b"\7" + bytes(4), 400)
def test_a_frame_that_is_broken_costs_itself_and_is_said(stream: bytes, step: int) -> None:
    found: List[Record] = []
    rest = b""
    for start in range(0, len(stream), step):
        got, rest = records.decode(rest + stream[start : start + step])
        found += got
        assert len(rest) < 4096
    for record in found:
        assert isinstance(record, (ConnectionRecord, Notice))
        if isinstance(record, ConnectionRecord):
            line = connection_line.encode(record, encoder.Stamps().rfc3339(record.closed_at_ns), 1, "none", "default")
        else:
            line = encoder.line({"timestamp": encoder.Stamps().rfc3339(record.at_ns), "message": record.message})
        assert json.loads(line)


@pytest.mark.parametrize("at", [2, 25, 57], ids=["kind", "client", "ending"])
def test_a_record_beside_a_broken_one_is_not_lost(at: int) -> None:
    frame = bytearray(records.encode(FULL))
    frame[at] ^= 0xFF
    found, rest = records.decode(records.encode(FULL) + bytes(frame) + records.encode(FULL))
    assert (found[0], found[2], len(found), rest) == (FULL, FULL, 3, b"")
    assert isinstance(found[1], Notice)
    assert (found[1].worker, found[1].level) == (FULL.worker, "error")


@thorough
@given(
    st.sampled_from(Command),
    st.integers(-1, 1 << 20),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**63 - 1),
    st.lists(st.binary(min_size=PACKED_SIZE, max_size=PACKED_SIZE), max_size=12),
)
def test_a_message_comes_back_from_a_slot_whatever_stands_behind_it(
    command: Command, fd: int, number: int, at_ns: int, upstreams: List[bytes]
) -> None:
    message = Message(command, fd, number, at_ns, upstreams[0] if upstreams else bytes(PACKED_SIZE), b"".join(upstreams))
    assert Message.decode(message.encode() + b"\xff" * 50) == message
    assert len(message.encode()) <= 512


@settings(quick, max_examples=examples(100))
@given(st.binary(min_size=512, max_size=512))
def test_any_slot_is_a_message(slot: bytes) -> None:
    message = Message.decode(bytes([slot[0] % len(Command)]) + slot[1:])
    assert len(message.upstreams) <= 512
    assert len(message.client) == PACKED_SIZE
