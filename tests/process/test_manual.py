"""What `generate` makes of the manual: the man page says what it says, word for word, and shells complete what it has."""

from __future__ import annotations

import itertools
import re
import subprocess
from pathlib import Path
from typing import Callable, Iterator

import pytest
from _tsproxy.cli import config
from _tsproxy.tools import generate
from harness import CHECKOUT, wait_until
from pty_session import PtySession
from shippers import find, generated


@pytest.fixture(scope="module")
def manual() -> str:
    return subprocess.run([*CHECKOUT, "--help"], capture_output=True, text=True, check=True).stdout


# The man page


def test_the_man_page_has_each_line_of_the_manual_word_for_word(manual: str) -> None:
    command = [find("mandoc"), "-T", "utf8", "-O", "width=1000"]
    shown = subprocess.run(command, input=generated("man"), capture_output=True, text=True, check=True).stdout
    shown = " ".join(re.sub(".\b", "", shown).split())  # a letter that is struck twice is bold
    said = manual.replace("tsproxy.py", "tsproxy").replace("Usage:", "SYNOPSIS").replace("Exit codes:", "EXIT STATUS")
    said = re.sub(r"^([A-Z][a-z ]+):$", r"\1", said.replace("Signals:", "SIGNALS"), flags=re.M)
    parts = [" ".join(part.split()) for line in said.splitlines()[1:] for part in re.split(r"\s{2,}", line.strip())]
    assert [part for part in parts if part not in shown] == []


def test_each_option_and_each_command_has_a_paragraph_of_its_own_in_the_man_page(manual: str) -> None:
    tagged = [re.sub(r"\\f[BIR]|\\", "", term) for term in re.findall(r"^\.TP\n(.*)$", generated("man"), re.M)]
    assert tagged == re.findall(r"^(?:  )?(-\S+(?: -\S+)?|[a-z]+)(?:  .*)?$", manual, re.M)


# Completion

SHELLS = {
    "bash": ("bash --norc --noprofile -i", ":"),
    "zsh": ("zsh -f -i", "autoload -U compinit bashcompinit; compinit -u -D; bashcompinit"),
}
Complete = Callable[[str], str]


@pytest.fixture(params=SHELLS)
def complete(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Complete]:
    """What a line becomes by Tab, in a shell at a terminal."""
    command, before = SHELLS[request.param]
    (tmp_path / "completion").write_text(generated("completion"))
    (tmp_path / "lines.json").write_text("")
    words = [find(command.split()[0]), *command.split()[1:]]
    environment = {"PS1": "$ ", "HOME": str(tmp_path), "HISTFILE": ""}
    with PtySession(words, columns=250, env=environment, cwd=tmp_path) as session:
        session.press(f"{before}; . ./completion; echo rea''dy\n".encode())
        session.wait_for("\nready")
        numbers = itertools.count()

        def press_tab(line: str) -> str:
            """The line, echoed and not run: Ctrl-A goes to its beginning, Ctrl-E to its end."""
            number = next(numbers)
            session.press(f"{line}\t\x01echo '{number}<\x05>'\n".encode())
            shown = re.compile(rf"[\r\n]{number}<(.*)>")
            found = wait_until(lambda: session.rows and shown.search(session.output.decode()), line)
            return str(found[1]).rstrip(" ")

        yield press_tab


def test_shells_complete_commands_kinds_options_values_and_files(complete: Complete) -> None:
    for typed, completed in {
        "tsproxy ch": "check",
        "tsproxy generate kub": "kubernetes",
        "tsproxy generate syslog": "syslog-ng",
        "tsproxy generate comp": "completion",
        "tsproxy generate netns --targ": "--target",
        "tsproxy --on-f": "--on-full",
        "tsproxy --on-full qu": "queue",
        "tsproxy --on-full=re": "--on-full=reject",
        "tsproxy -t a:1 --timestamps pres": "preserve",
        "tsproxy --log-level=warning --connection-log=of": "--connection-log=off",
        "tsproxy check --js": "--json",
        "tsproxy top li": "lines.json",
        "tsproxy bundle li": "lines.json",
        "tsproxy --routes li": "lines.json",
    }.items():
        assert complete(typed) == " ".join([*typed.split()[:-1], completed])


def test_shells_offer_nothing_where_nothing_fits(complete: Complete) -> None:
    for typed in (
        "tsproxy --port ch",
        "tsproxy --js",
        "tsproxy generate rsyslog --targ",
        "tsproxy demo ch",
        "tsproxy --user=ch",
    ):
        assert complete(typed) == typed


def test_the_words_that_are_completed_are_those_that_are_taken() -> None:
    script = generated("completion")
    for name, words in {
        "--timestamps": config.MODES,
        "--on-full": config.FULL_ACTIONS,
        "--zero-copy": config.ZERO_COPY,
        "--runtime": config.RUNTIMES,
        "--connection-log": config.SWITCH,
        "--log-level": config.LEVELS,
    }.items():
        assert f"    {name}) words='{' '.join(words)}' ;;\n" in script
    assert f"'generate') words='{' '.join([*generate.KINDS, *generate.ALONE])}' ;;\n" in script
