"""docs/audit.md: each command that it shows is run, and says what it is shown to say, figures apart."""

from __future__ import annotations

import re
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import List, NamedTuple

import pytest
from harness import CHECKOUT, ROOT
from namespaces import Namespace, require_root
from program import command_file

pytestmark = pytest.mark.root

PAGE = ROOT / "docs" / "audit.md"
MARK = "---- command"


class Shown(NamedTuple):
    """A command of a console block, and the lines under it."""

    command: str
    output: List[str]


def blocks(kind: str) -> List[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def shown() -> List[Shown]:
    found: List[Shown] = []
    for line in "".join(blocks("console")).splitlines():
        if line.startswith("# "):
            found.append(Shown(line[2:], []))
        else:
            found[-1].output.append(line)
    return found


def script(commands: List[str]) -> str:
    """The setting, then the commands, with a mark in front of what each of them says; at the end nothing is left."""
    marked = "".join(f'echo "{MARK} {number}"\n{command}\n' for number, command in enumerate(commands))
    return f"trap 'kill $(jobs -p)' EXIT\n{''.join(blocks('sh'))}\n{marked}"


def said(output: str) -> List[List[str]]:
    """The lines after each mark."""
    return [part.splitlines()[1:] for part in output.split(MARK)[1:]]


def words(lines: List[str]) -> str:
    """Without what differs from run to run: figures, and the blanks that align them."""
    text = re.sub(r"[+-]?\d[\d,.]*", "0", "\n".join(lines))
    text = re.sub(r"none to be seen within 0 ppm|0 ppm, error 0 ppm", "SKEW", text)
    return re.sub(r"[ \n]+", " ", text).strip()


def run(tmp_path: Path, commands: List[str]) -> List[List[str]]:
    """What each command says, in one shell in a namespace of its own."""
    (tmp_path / "bin").mkdir()
    command_file(tmp_path / "bin" / "tsproxy", *CHECKOUT)
    work = tmp_path / "work"
    work.mkdir()
    namespace = Namespace()
    try:
        done = subprocess.run(
            [*namespace.enter, "env", f"PATH={tmp_path / 'bin'}:/usr/sbin:/usr/bin:/sbin:/bin", "bash", "-c", script(commands)],
            cwd=work,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        namespace.close()
    assert done.stderr == ""
    return said(done.stdout)


def test_each_command_of_the_page_says_what_the_page_shows(tmp_path: Path) -> None:
    require_root()
    pairs = shown()
    outputs = run(tmp_path, [pair.command for pair in pairs])
    assert len(outputs) == len(pairs)
    for pair, output in zip(pairs, outputs):
        assert words(output) == words(pair.output), "\n".join([pair.command, *output])


def test_the_page_shows_a_leak_a_clean_flow_and_agreement() -> None:
    text = "\n".join("\n".join([pair.command, *pair.output]) for pair in shown())
    for part in ("LEAK: ", "CLEAN: ", "claimed clean and seen clean", "exit code 78", "exit code 0", '"event":"audit"'):
        assert part in text


def test_the_picture_of_the_page_is_one_that_audit_draws() -> None:
    svg = ElementTree.parse(PAGE.parent / "audit.svg").getroot()
    drawn = [element for element in svg.iter() if element.get("class") == "flow"]
    assert len(drawn) == 2  # what the host sent, and what the exchange did
    assert "LEAK" in " ".join(svg.itertext())
