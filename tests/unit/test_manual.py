"""What `generate` makes of the manual: the man page says what it says, word for word."""

from __future__ import annotations

import re
import subprocess

import pytest
from conftest import CHECKOUT
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
