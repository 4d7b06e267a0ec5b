"""The command line word by word: exact names, one line for each mistake, and docopt never guesses what was meant."""

from __future__ import annotations

import contextlib
import io
import re
from typing import Dict, List

import _tsproxy
import pytest
from _tsproxy.cli import config, parser
from _tsproxy.cli.config import UsageError
from _tsproxy.tools import generate
from command_line import KNOWN, MANUAL, Ran, fields_of, route_of, run
from docopt import docopt
from harness import examples
from hypothesis import example, given, settings
from hypothesis import strategies as st

SWITCHES = {"--reuse-port", "--spoof-timestamps", "--trust-host", "--json", "--help", "--version"}
AUDIT = {"--from", "--interface", "--seconds", "--lines", "--svg"}  # audit's own, of which relaying knows nothing
T = "--target=a:1"
unhurried = settings(deadline=None)


# The manual and the parsers


def test_each_option_of_the_manual_is_parsed_by_something_and_the_other_way_round() -> None:
    assert KNOWN.keys() == config.OPTIONS.keys() | config.REPEATED.keys() | SWITCHES | AUDIT | {"--routes"}


def test_the_manual_says_which_options_take_a_value_and_which_repeat() -> None:
    assert {name for name, known in KNOWN.items() if not known.argument} == SWITCHES
    assert {name for name, known in KNOWN.items() if known.repeats} == config.REPEATED.keys() | {"--from"}


def test_the_table_of_options_is_the_one_that_docopt_reads() -> None:
    read = docopt(MANUAL, [T], default_help=False)
    assert {word for word in read if word.startswith("--")} == KNOWN.keys()
    assert {word for word in read if word.islower() and word[0].isalpha()} == {*parser.commands_of(MANUAL), *generate.ALONE}


@pytest.mark.parametrize("more", [[], ["--allow=::/0", "--allow=10.0.0.0/8"], ["--port=1", "--reuse-port", "--trust-host"]])
def test_relaying_is_parsed_as_with_the_usage_lines_of_all_commands(more: List[str]) -> None:
    """docopt gets to see that of relaying alone then."""
    whole = docopt(MANUAL, [T, *more], default_help=False)
    found = parser.read(MANUAL, [T, *more], docopt)
    repeated = {name for name, known in KNOWN.items() if known.repeats}  # docopt-ng 0.9 has some of them twice
    assert {name: found.get(name, whole[name]) for name in whole.keys() - repeated} == {
        name: whole[name] for name in whole.keys() - repeated
    }


def described(name: str) -> str:
    """What the manual says of an option, up to the next one."""
    return re.split(r"\n\n|\n  -", MANUAL[MANUAL.index(f" {name}=<") :])[0]


def test_the_defaults_in_the_manual_are_those_of_the_config() -> None:
    bare = config.parse(docopt(MANUAL, [T], default_help=False))
    defaults = {**config.Config._field_defaults, **config.Route._field_defaults}
    for name, option in config.OPTIONS.items():
        if name in {"--user", "--workers", "--cpus", "--interface", "--dscp"}:  # none, and what the machine decides
            assert "[default" not in described(name)
            continue
        stated = re.search(r"\[default: (\S+)\]|Default: (\S+)\.", described(name))
        assert stated, name
        assert defaults[option.field] == fields_of(bare)[option.field], name
        value = option.parse(name, stated[1] or stated[2])
        assert (value == "on" if name == "--connection-log" else value) == fields_of(bare)[option.field], name


def test_the_words_that_the_manual_offers_are_those_that_are_taken() -> None:
    offered = {"--timestamps": config.MODES, "--on-full": config.FULL_ACTIONS, "--runtime": config.RUNTIMES}
    for name, words in {**offered, "--log-level": config.LEVELS}.items():
        text = re.split("[dD]efault:", described(name))[0]
        assert all(re.search(rf"\b{word}\b", text) for word in words), name
    assert KNOWN["--connection-log"].argument == f"<{'|'.join(config.SWITCH)}>"


# What is taken

CONSUMED = [
    (["-t", "a:1"], [T]),
    (["-ta:1"], [T]),
    (["--target", "a:1"], [T]),
    ([T, "-p8080"], [T, "--port=8080"]),
    ([T, "-p", "--port"], [T, "--port=--port"]),
    ([T, "-p=1"], [T, "--port==1"]),
    ([T, "-b", "-"], [T, "--bind=-"]),
    ([T, "--user="], [T, "--user="]),
    ([T, "--user=a=b"], [T, "--user=a=b"]),
    ([T, "--target=b:2", "-t", "c:3"], [T, "--target=b:2", "--target=c:3"]),
    ([T, "--reuse-port"], [T, "--reuse-port"]),
    ([T, "--"], [T]),
    (["bundle", "out"], ["bundle", "out"]),
    (["audit", "x", "-", "--json"], ["audit", "x", "-", "--json"]),
    (["audit", "x", "-t", "a:1", "--from=::1"], ["audit", "x", T, "--from=::1"]),
    (["audit", "--interface", "lo"], ["audit", "--interface=lo"]),
    (["bundle", "-"], ["bundle", "-"]),
    (["bundle", "--", "out"], ["bundle", "out"]),
    (["-h"], ["--help"]),
    (["-V"], ["--version"]),
    (["-hV"], ["--help"]),
    (["bundle", "--help"], ["--help"]),
    ([T, "--port=no-number", "--version"], ["--version"]),
]


@pytest.mark.parametrize(("words", "canonical"), CONSUMED, ids=[" ".join(words) for words, _ in CONSUMED])
def test_each_spelling_becomes_the_canonical_one_and_docopt_takes_it(words: List[str], canonical: List[str]) -> None:
    assert parser.normalize(MANUAL, words) == canonical
    docopt(MANUAL, canonical, default_help=False)  # SystemExit if it does not


# What is refused

USAGES = re.findall(r"^  (tsproxy\.py .*)$", MANUAL, re.M)
USAGE = {line.split()[1].partition("=")[0]: line for line in reversed(USAGES)}
LIVE = next(line for line in USAGES if "audit --interface" in line)
SHIPPING = next(line for line in USAGES if "rsyslog" in line)
ANY_KIND = " or ".join(generate.KINDS)
IN_THE_FILE = "given with --routes; allowed: only in the file, for each route"
REFUSED = [
    ([T, "--max=5"], "unknown option '--max'; did you mean --max-connections or --max-connections-per-client?"),
    ([T, "--time", "strip"], "unknown option '--time'; did you mean --timestamps?"),
    (["--t=a:1"], "unknown option '--t'; did you mean --target or --timestamps or --trust-host?"),
    ([T, "--tmestamps=strip"], "unknown option '--tmestamps'; did you mean --timestamps?"),
    ([T, "--Port=1"], "unknown option '--Port'; did you mean --port?"),
    ([T, "--port\n=1"], "unknown option '--port\\n'; did you mean --port?"),
    ([T, "--zzz"], "unknown option '--zzz'; see --help"),
    ([T, "--=5"], "unknown option '--'; see --help"),
    ([T, "---port=5"], "unknown option '---port'; did you mean --port?"),
    ([T, "-P", "1"], "unknown option '-P'; did you mean -p or --port?"),
    ([T, "-v"], "unknown option '-v'; did you mean -V or --version?"),
    ([T, "-hT"], "unknown option '-T' in '-hT'; did you mean -t or --target?"),
    ([T, "-hx"], "unknown option '-x' in '-hx'; see --help"),
    ([T, "-5"], "unknown option '-5'; see --help"),
    ([T, "-"], "unknown command '-'; see --help"),
    ([T, "--reuse-port=yes"], "--reuse-port: given 'yes'; allowed: no value (it is a switch)"),
    ([T, "--reuse-port="], "--reuse-port: given ''; allowed: no value (it is a switch)"),
    ([T, "--port"], "--port: given nothing; allowed: --port=<port>"),
    ([T, "-p"], "--port: given nothing; allowed: --port=<port>"),
    ([T, "--port", "--", "1"], "--port: given nothing; allowed: --port=<port>"),
    ([T, "--port=1", "--port=1"], "--port: given twice; allowed: once"),
    ([T, "-p1", "--port", "2"], "--port: given twice; allowed: once"),
    ([T, "--reuse-port", "--reuse-port"], "--reuse-port: given twice; allowed: once"),
    ([T, "relay"], "unknown command 'relay'; see --help"),
    ([T, "bundel"], "unknown command 'bundel'; did you mean bundle?"),
    (["help"], "unknown command 'help'; did you mean --help?"),
    (["version"], "unknown command 'version'; did you mean --version?"),
    (["systemd", T], "unknown command 'systemd'; did you mean generate systemd?"),
    (["rsyslog"], "unknown command 'rsyslog'; did you mean generate rsyslog?"),
    (["bund", "out"], "unknown command 'bund'; did you mean bundle?"),
    ([T, ""], "unknown command ''; see --help"),
    ([T, "\udcff\n"], "unknown command '\\udcff\\n'; see --help"),
    ([], "--target: given nothing; allowed: at least one, e.g. --target=exchange.example:443"),
    (["--port=1"], "--target: given nothing; allowed: at least one, e.g. --target=exchange.example:443"),
    (["bundle", "out", "--port=1"], "--port: not an option of 'bundle'; usage: tsproxy.py bundle OUT"),
    (["bundle", "out", T], "--target: not an option of 'bundle'; usage: tsproxy.py bundle OUT"),
    (["demo", "--port=1"], "--port: not an option of 'demo'; usage: tsproxy.py demo"),
    ([T, "--json"], f"--json: not an option of 'relaying'; usage: {USAGE['--target']}"),
    (["generate", "netns", T, "--json"], f"--json: not an option of 'generate'; usage: {USAGE['generate']}"),
    (["audit", "x", "--port=1"], f"--port: not an option of 'audit'; usage: {USAGE['audit']}"),
    (["audit", "--interface=lo", "--lines=x"], f"--lines: not an option of 'audit'; usage: {LIVE}"),
    ([T, "--from=10.0.0.0/8"], f"--from: not an option of 'relaying'; usage: {USAGE['--target']}"),
    (["generate", "rsyslog", T], f"--target: not an option of 'generate'; usage: {SHIPPING}"),
    (["-p1", "generate", "syslog-ng"], f"--port: not an option of 'generate'; usage: {SHIPPING}"),
    (["generate", "netns"], "--target: given nothing; allowed: at least one, e.g. --target=exchange.example:443"),
    (["check"], "--target: given nothing; allowed: at least one, e.g. --target=exchange.example:443"),
    (["bundle"], "OUT: given nothing; allowed: a path, where the one file is written"),
    (["audit"], "FILE: given nothing; allowed: captures, - for standard input, or --interface=<name>"),
    (["audit", "--json"], "FILE: given nothing; allowed: captures, - for standard input, or --interface=<name>"),
    (["generate"], f"KIND: given nothing; allowed: {ANY_KIND}; or what ships the lines: see --help"),
    (["generate", T], f"KIND: given nothing; allowed: {ANY_KIND}; or what ships the lines: see --help"),
    (["generate", "--routes=x"], f"KIND: given nothing; allowed: {ANY_KIND}; or what ships the lines: see --help"),
    (["--routes=x", T], f"--target: {IN_THE_FILE}"),
    ([T, "--routes=x"], f"--target: {IN_THE_FILE}"),
    (["check", "--routes=x", "--source=::1"], f"--source: {IN_THE_FILE}"),
    (
        ["generate", "netns", "--allow=::1", "--routes=x"],
        f"--allow: {IN_THE_FILE}",
    ),
    (["--interface=lo", "--routes=x"], f"--interface: {IN_THE_FILE}"),
    (["--routes=x", "--json"], f"--json: not an option of 'relaying'; usage: {USAGE['--routes']}"),
    ([T, "bundle", "out"], "--target: not an option of 'bundle'; usage: tsproxy.py bundle OUT"),
    ([T, "--", "--max=5"], "can't take '--max=5' after --; a path that begins with a dash may be given as './--max=5'"),
    (["bundle", "--", "-out"], "can't take '-out' after --; a path that begins with a dash may be given as './-out'"),
    (["--", "--", "--"], "can't take '--' after --; a path that begins with a dash may be given as './--'"),
    (["--help", "--help"], "--help: given twice; allowed: once"),
    (["--help", "--max=5"], "unknown option '--max'; did you mean --max-connections or --max-connections-per-client?"),
]
LEFT_TO_DOCOPT = [
    (["demo", "x"], "can't take 'demo x'; usage: tsproxy.py demo"),
    (["generate", "rsyslog", "vector"], f"can't take 'generate rsyslog vector'; usage: {SHIPPING}"),
    (["audit", "x", "--seconds=1"], f"can't take 'audit x'; usage: {LIVE}"),
    (["check", "x", T], f"can't take 'check x'; usage: {USAGE['check']}"),
    (["bundle", "a", "b"], "can't take 'bundle a b'; usage: tsproxy.py bundle OUT"),
    (["bundle", "a\nb", "c"], "can't take 'bundle a\\nb c'; usage: tsproxy.py bundle OUT"),
]


@pytest.mark.parametrize(("words", "line"), REFUSED, ids=[ascii(" ".join(words)) for words, _ in REFUSED])
def test_a_mistake_is_answered_with_its_own_line(words: List[str], line: str) -> None:
    with pytest.raises(UsageError) as caught:
        parser.normalize(MANUAL, words)
    assert str(caught.value) == line


@pytest.mark.parametrize(("words", "line"), REFUSED + LEFT_TO_DOCOPT, ids=lambda value: ascii(value)[:60])
def test_a_mistake_ends_with_2_and_nothing_on_standard_output(words: List[str], line: str) -> None:
    assert run(words) == Ran(2, "", f"tsproxy.py: {line}\n", None)


@pytest.mark.parametrize("question", ["-h", "--help"])
def test_help_is_the_manual_on_standard_output(question: str) -> None:
    assert run([question]) == Ran(0, MANUAL.strip() + "\n", "", None)


@pytest.mark.parametrize("question", ["-V", "--version"])
def test_version_is_one_line_on_standard_output(question: str) -> None:
    assert run([question]) == Ran(0, f"tsproxy {_tsproxy.__version__}\n", "", None)


@pytest.mark.parametrize("command", [[], ["check"], ["generate", "netns"]], ids=["relay", "check", "generate"])
def test_what_is_repeated_reaches_each_command_once(command: List[str]) -> None:
    ran = run([*command, T, "--target=b:2", "--source=::1", "--source=::2"])
    assert ran.asked
    (meant,) = [given for given in ran.asked[1] if isinstance(given, config.Config)]
    route = route_of(meant)
    assert (route.targets, route.sources) == ((config.Target("a", 1), config.Target("b", 2)), ("::1", "::2"))


def test_a_sound_line_reaches_its_command() -> None:
    meant = config.parse(docopt(MANUAL, [T, "--port=0"], default_help=False))
    assert run(["-t", "a:1", "-p0"]) == Ran(0, "", "", ("serve", (meant,)))
    assert run(["check", "-p0", "--json", "-t", "a:1"]) == Ran(0, "", "", ("check", (meant, ("as_json", True))))
    assert run(["-p0", "check", T]) == Ran(0, "", "", ("check", (meant, ("as_json", False))))
    assert run(["generate", T, "netns", "-p0"]) == Ran(0, "", "", ("generate", ("netns", meant)))
    assert run(["demo"]) == Ran(0, "", "", ("demo", ()))
    assert run(["top"]) == Ran(0, "", "", ("top", (None,)))
    assert run(["top", "lines.json"]) == Ran(0, "", "", ("top", ("lines.json",)))
    assert run(["bundle", "out"]) == Ran(0, "", "", ("bundle", ("out",)))


# Any words at all

FRAGMENTS = [name[:length] for name in KNOWN for length in range(2, len(name))]
MISSPELT = [name[:4] + name[5:] for name in KNOWN] + [name.upper() for name in KNOWN] + ["--targets", "--maxconnections"]
SHORTS = ["-t", "-p", "-b", "-h", "-V", "-T", "-P", "-v", "-hV", "-p1", "-ta:1", "-x", "-5", "-1e3", "-inf", "-"]
PLAIN = [
    "bundle",
    "check",
    "generate",
    "demo",
    "netns",
    "out",
    "a:1",
    "1",
    "",
    "--",
    "=",
    "\n",
    "-\n",
    "options",
    "[options]",
    "OUT",
    "<host:port>",
    "b\u00fc",
    "\udcff",
]
WORDS = st.sampled_from([*KNOWN, *FRAGMENTS, *MISSPELT, *SHORTS, *PLAIN, T]) | st.text(max_size=8)
VALUES = st.sampled_from(["1", "", "a:1", "127.0.0.1", "strip", "on", "=", "-1", "--port", "x\ny"]) | st.text(max_size=8)
ANY_WORD = WORDS | st.builds("{}={}".format, WORDS, VALUES)
OFTEN_SOUND = st.sampled_from([[T], ["bundle", "out"], ["-t", "a:1"], ["check", T], ["generate", "netns", T], ["demo"]])
LINES = st.lists(ANY_WORD, max_size=5) | st.builds(
    lambda start, rest: start + rest, OFTEN_SOUND, st.lists(ANY_WORD, max_size=3)
)


def canonical_values(ready: List[str]) -> Dict[str, List[str]]:
    """What the canonical words say, read without docopt."""
    found: Dict[str, List[str]] = {}
    for word in ready:
        name, _, value = word.partition("=")
        found.setdefault(name if word.startswith("--") else "", []).append(value if word.startswith("--") else word)
    return found


@settings(unhurried, max_examples=examples(500))
@given(LINES)
@example([T, "--", "--max=5"])
@example(["bundle", "--", "--targ"])
@example([T, "--source=::1", "--source=::2", "--allow=::1", "--reuse-port"])
@example(["check", T, "--target=b:2", "--source=::1", "--source=::2"])
def test_docopt_gets_canonical_names_only_and_adds_nothing_of_its_own(words: List[str]) -> None:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            found = parser.read(MANUAL, words, docopt)
        except UsageError as problem:
            assert str(problem).isprintable()
            return
        finally:
            assert (out.getvalue(), err.getvalue()) == ("", "")
    said = canonical_values(parser.normalize(MANUAL, words))
    assert said.keys() <= KNOWN.keys() | {""}
    bare = docopt(MANUAL, [T], default_help=False)
    for name, known in KNOWN.items():
        given_values = said.get(name, [])
        if known.repeats:
            assert found[name] == given_values
        elif given_values:
            assert found[name] == (given_values[0] if known.argument else True)
        else:
            assert found[name] == bare[name]


@settings(unhurried, max_examples=examples(500))
@given(LINES)
@example(["--help"])
@example(["bundle", "a\nb", "c"])
@example([T, "--user=\udcff"])
def test_any_words_are_taken_or_cost_one_line(words: List[str]) -> None:
    ran = run(words)
    if ran.code == 2:
        assert (ran.out, ran.asked) == ("", None)
        assert ran.err.startswith("tsproxy.py: ")
        assert ran.err[:-1].isprintable()
        assert ran.err[-1] == "\n"
    else:
        assert (ran.code, ran.err) == (0, "")
        assert ran.asked or ran.out in (f"{MANUAL.strip()}\n", f"tsproxy {_tsproxy.__version__}\n")
        assert not (ran.asked and ran.out)


# The real command
