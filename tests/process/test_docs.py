"""The pages are true: what they show is run, what they name exists, and what is drawn from the code is drawn anew."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Dict, Iterator, List, NamedTuple, Set, Tuple

import pytest
from _tsproxy.proxy import states
from _tsproxy.stats.endings import ENDING_FIELDS
from harness import CHECKOUT, ROOT

LIB = ROOT / "lib/_tsproxy"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "bench").glob("*.md")])
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> List[str]:
    return [text for _, kind, text in BLOCK.findall(page.read_text()) if kind == language]


# What a page shows as a command and its output is run


class Step(NamedTuple):
    """A command of a `console` block, and what the page says that it prints."""

    command: str
    output: List[str]


def steps(page: Path) -> List[Step]:
    """Of all blocks of a page, in order: they are one session."""
    found: List[Step] = []
    for line in "".join(blocks(page, "console")).splitlines():
        if line.startswith(("$ ", "# ")):
            found.append(Step(line[2:], []))
        else:
            found[-1].output.append(line)
    return found


SHOWN = [page for page in PAGES if steps(page) and page.name != "audit.md"]  # test_docs_audit.py plays that, with its network
# What is otherwise each time, and the word that stands for it
VOLATILE = {
    r'"(timestamp|version|runtime)":"[^"]*"': r'"\1":"@"',
    r'"(pid|workers|\w+_us|\w*_port|\w*[rt]x_bytes|\w*_segments_\w+|uptime_s)":(?:[\d.]+|null)': r'"\1":@',
    r"TS val \d+": "TS val @",
    r"connected in [\d.]+ ms": "connected in @",
    r"nor in \d+ segments": "nor in @ segments",
    r"^[\d-]+T[\d:]+Z  pid \d+": "@",
    r"tsproxy \d+\.\d+\.\d+": "tsproxy @",
}


def settled(line: str) -> str:
    for pattern, word in VOLATILE.items():
        line = re.sub(pattern, word, line)
    return line.rstrip()


def expectation(output: List[str]) -> str:
    """As a regular expression: a line of three dots is any lines, three dots within one are any text."""
    lines = ["(?:.*\n)*" if line == "..." else re.escape(settled(line)).replace(r"\.\.\.", ".*") + "\n" for line in output]
    return "".join(lines)


def played(commands: List[str], directory: Path, path: str) -> List[str]:
    """What each command prints, typed into one shell in a network namespace of its own."""
    unshare = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--net"]
    ends = [f"--- {number} ---" for number in range(len(commands))]
    typed = "ip link set lo up\n" + "".join(f"{command}\necho '{end}'\n" for command, end in zip(commands, ends))
    shell = subprocess.Popen(
        [*unshare, "bash", "--norc"],
        cwd=directory,
        env={**os.environ, "PATH": path, "LC_ALL": "C.UTF-8"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = shell.communicate(typed, timeout=90)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)
    found = []
    for end in ends:
        before, mark, said = said.partition(f"{end}\n")
        assert mark, f"the session ended early: {before}{said}"
        found.append(before)
    return found


def require(*tools: str) -> None:
    """Skip, loudly, where a page can't be played; in CI that is a failure."""
    missing = [tool for tool in tools if not shutil.which(tool)]
    works = not missing and subprocess.run(["unshare", "--map-root-user", "--net", "true"], check=False).returncode == 0
    if works or (not missing and os.geteuid() == 0):
        return
    message = f"LOUD: what the pages show is NOT run here: {', '.join(missing) or 'no network namespace can be had'}"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


@pytest.mark.parametrize("page", SHOWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_shows_what_its_commands_print(page: Path, bundle: Path, tmp_path: Path) -> None:
    require("unshare", "ip", "sysctl", "curl")
    path = os.pathsep.join([str(bundle.parent), os.path.dirname(sys.executable), os.environ["PATH"]])
    shown = steps(page)
    for step, said in zip(shown, played([step.command for step in shown], tmp_path, path)):
        text = "".join(f"{settled(line)}\n" for line in said.splitlines())
        assert re.fullmatch(expectation(step.output), text), f"$ {step.command}\n{said}"


def test_an_output_that_a_page_does_not_show_is_noticed() -> None:
    assert re.fullmatch(expectation(["a...z", "...", "end"]), "abcz\nmore\nand more\nend\n")
    assert not re.fullmatch(expectation(["a...z", "end"]), "abcz\nmore\nend\n")
    assert not re.fullmatch(expectation([]), "said all the same\n")
    assert settled('{"pid":7,"tx_bytes":12,"upstream_rtt_us":null}') == '{"pid":@,"tx_bytes":@,"upstream_rtt_us":@}'


BEFORE = {"ssh", "bare-host", "sudo", "python3", "-I", "-S"}  # what may stand before the program


def called(script: str) -> Iterator[Tuple[str, ...]]:
    """The words after `tsproxy` in each command that calls it, those with an ellipsis left out."""
    for line in script.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: List[str] = []
        for word in [*lexer, ";"]:
            if not set(word) <= set("();<>|&"):
                words.append(word)
                continue
            rest = list(itertools.dropwhile(BEFORE.__contains__, words))
            if rest and Path(rest[0]).name in ("tsproxy", "tsproxy.py") and "..." not in rest:
                yield tuple(rest[1:])
            words = []


def calls() -> Set[Tuple[str, ...]]:
    """Each command line of tsproxy in a page that is not run as a whole: in a block or in the text."""
    found: Set[Tuple[str, ...]] = set()
    for page in PAGES:
        inline = re.findall(r"`((?:\./)?tsproxy(?:\.py)? [^`\n]+)`", BLOCK.sub("", page.read_text()))
        found |= {words for script in [*blocks(page, "sh"), *inline] for words in called(script)}
    return found - {("--help",), ("--version",)}


def test_each_command_line_in_a_page_is_one_that_tsproxy_takes() -> None:
    manual = subprocess.run([*CHECKOUT, "--help"], capture_output=True, text=True, check=True).stdout
    commands = {*re.findall(r"^  tsproxy\.py ([a-z]+)\b", manual, re.MULTILINE)}
    lines = calls()
    assert len(lines) > 10
    for words in lines:
        ended = subprocess.run([*CHECKOUT, *words, "--help"], capture_output=True, text=True, check=False)
        assert ended.returncode == 0, f"{words}: {ended.stderr}"
        assert not words or words[0].startswith("-") or words[0] in commands, words


@each_page
def test_each_shell_script_of_a_page_is_sound(page: Path) -> None:
    for script in blocks(page, "sh"):
        assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0, script


# What a page names exists


def anchors(page: Path) -> Set[str]:
    """As GitHub makes them: in lower case, spaces as dashes, without punctuation."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_each_link_of_a_page_leads_somewhere(page: Path) -> None:
    text = BLOCK.sub("", page.read_text())
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_the_index_lists_each_page() -> None:
    index = (ROOT / "docs/README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in index, page.name


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@each_page
def test_each_file_that_a_page_names_is_there(page: Path) -> None:
    text = page.read_text()
    for name in set(re.findall(r"\b(?:bench|docs)/[a-z_]+\.py\b", text)):
        assert (ROOT / name).is_file(), name
    tests = {path.name for path in (ROOT / "tests").rglob("*.py")}
    if page.name != "CHANGELOG.md":
        assert set(re.findall(r"\btest_[a-z_]+\.py\b", text)) <= tests


# What a page says of the code


def manual_options() -> Dict[str, str]:
    """--name=<argument> -> its default, or "" where the manual has none in brackets."""
    manual = subprocess.run([*CHECKOUT, "--help"], capture_output=True, text=True, check=True).stdout
    entries = re.findall(r"^  +(?:-\w,? )?(--[a-z-]+(?:=<\S+>)?)(.*?)(?=^  +-|^\S|\Z)", manual, re.MULTILINE | re.DOTALL)
    return {name: "".join(re.findall(r"\[default:\s+(\S+)\]", text)) for name, text in entries}


def test_the_options_page_has_each_option_of_the_manual_with_its_default() -> None:
    page = (ROOT / "docs/options.md").read_text().replace("\\|", "|")
    rows = {match[1]: match[2] for match in re.finditer(r"^\| `(?:-\w )?(--[^`]+)` \| ([^|]*)\|", page, re.MULTILINE)}
    options = manual_options()
    assert len(options) > 25
    assert options.keys() - rows.keys() == {"--json", "--help", "--version"}, "those of more than one command, told below"
    assert rows.keys() <= options.keys()
    assert {name for name, default in options.items() if default and rows[name].split()[0] != default} == set()
    assert all(f"`{name}`" in page for name in ("--json", "--help", "--version"))


def test_the_json_page_has_each_field_of_the_lines() -> None:
    page = (ROOT / "docs/json-lines.md").read_text()
    done = subprocess.run([*CHECKOUT, "generate", "fields"], capture_output=True, text=True, check=True)
    fields = {row["field"] for row in json.loads(done.stdout)["fields"]}
    histograms = re.compile(r"(connect|relay|loop_lag)_us_(p\d+|max|count|le_\d+)")
    assert {field for field in fields if not histograms.fullmatch(field) and f"`{field}`" not in page} == set()
    assert len(fields) > 60


def test_the_json_page_has_each_ending() -> None:
    page = (ROOT / "docs/json-lines.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    for words in ENDING_FIELDS.values():
        assert any(f"`{words.reason}`" in row and f"`{words.termination_state}`" in row for row in rows), words


MOVED = (LIB / "proxy").is_dir()


@pytest.mark.xfail(not MOVED, reason="the packages are about to get these names")
def test_the_architecture_page_names_packages_and_modules_that_are_there() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    packages = {path.name for path in LIB.iterdir() if (path / "__init__.py").exists()}
    assert set(re.findall(r"^\| `([a-z]+)` \| ", page, re.MULTILINE)) == packages
    modules = set(re.findall(r"\b(?:" + "|".join(packages) + r")/[a-z_/]+\.py\b", page))
    assert len(modules) > 10
    assert {module for module in modules if not (LIB / module).is_file()} == set()


# What is drawn


@pytest.fixture(scope="module")
def draw() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw", ROOT / "docs/draw.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_state_diagrams_and_pictures_are_those_of_the_code_and_the_figures(draw: ModuleType) -> None:
    assert [str(path.relative_to(ROOT)) for path in draw.stale()] == [], "to draw them anew: python docs/draw.py"


def test_a_transition_that_the_table_gains_makes_the_page_stale(draw: ModuleType) -> None:
    assert [len(table) for table in draw.tables(states)] == [2, 3]
    (table, _) = draw.tables(states)
    (first, second), event = sorted({state for state, _ in table}), next(event for _, event in table)
    assert "SHUT --> [*]" in draw.diagram(table)
    longer = draw.diagram({**table, (second, event): first})
    assert f"{second.name} --> {first.name}: {event.name}" in longer
    assert longer not in draw.ARCHITECTURE.read_text()


def test_the_picture_has_the_figures_of_the_notes_and_no_others(draw: ModuleType) -> None:
    measured = draw.measured("closed loop, 1 connection, 64 bytes", draw.NOTES.read_text())
    assert measured["tsproxy"] == {"p50 us": 124, "p90 us": 135, "p99 us": 164, "p99.9 us": 267, "round trips/s": 7935}
    labels = re.findall(r">([\d.]+) us<", draw.latency())
    assert labels == [f"{measured[name][column]:g}" for column in ("p50 us", "p99 us") for name in measured]
