"""One program name in all messages and in the commands they name: that by which it was started."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import List

import pytest
from _tsproxy.cli import program
from harness import ROOT

FORMS = ["checkout", "link", "bundle", "renamed"]
NAME = {"checkout": "tsproxy.py", "link": "orders", "bundle": "tsproxy", "renamed": "proxy-2"}


@pytest.fixture
def command(request: pytest.FixtureRequest, tmp_path: Path) -> List[str]:
    form, bundle = request.param, request.getfixturevalue("bundle")
    path = {"checkout": ROOT / "tsproxy.py", "bundle": bundle}.get(form, tmp_path / NAME[form])
    if form == "link":
        path.symlink_to(ROOT / "tsproxy.py")
    elif form == "renamed":
        shutil.copy(bundle, path)
    return [sys.executable, str(path)]


def said(command: List[str], *words: str) -> str:
    done = subprocess.run([*command, *words], capture_output=True, text=True, check=False, timeout=60)
    return done.stdout + done.stderr


@pytest.mark.parametrize(("command", "name"), NAME.items(), ids=FORMS, indirect=["command"])
def test_messages_call_the_program_by_the_name_it_was_started_by(command: List[str], name: str) -> None:
    assert said(command, "--port").startswith(f"{name}: --port: given nothing")
    assert said(command, "demo", "x") == f"{name}: can't take 'demo x'; usage: {name} demo\n"
    assert said(command, "demo", "--port=1").endswith(f"usage: {name} demo\n")
    usage = said(command, "--help").partition("Without a command")[0]
    assert f"\n  {name} check --target" in usage
    named = {"--help": usage, "logrotate": said(command, "generate", "logrotate")}
    named["nftables"] = said(command, "generate", "nftables", "-t", "127.0.0.1:9")
    named["check"] = said(command, "check", "-t", "127.0.0.1:9", "--timestamps=rewrite", "--static-timestamp=7")
    for text in named.values():
        assert name == "tsproxy.py" or "tsproxy.py" not in text
    commands = re.findall(r"(\S+) generate (?:logrotate|nftables|systemd)", "".join(named.values()))
    assert len(commands) >= 3
    assert set(commands) == {name}


def test_a_name_that_is_no_plain_word_is_tsproxy() -> None:
    assert [program.name(path) for path in ("/a/b/tsproxy", "./x.py", "orders-2")] == ["tsproxy", "x.py", "orders-2"]
    assert {program.name(path) for path in ("-c", "", "-", "a b", "x;y", "\x1b[31m", "a\n", "$(x)", os.fsdecode(b"\xff"))} == {
        "tsproxy"
    }


def test_an_answer_names_what_was_given_as_it_was_given() -> None:
    command = [sys.executable, str(ROOT / "tsproxy.py")]
    assert "given 'tsproxy.py'" in said(["env", "-C", "/", *command], "-t", "tsproxy.py")
