"""What keeps the house in order names what is there: the CI workflow, the hooks before a commit, the editor's rules."""

from __future__ import annotations

import configparser
import os
import re
import subprocess
from pathlib import Path
from typing import Any, List

import pytest
import yaml
from harness import ROOT

CI = (ROOT / ".ci/run").read_text()


def workflow() -> Any:
    return yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["tests"]


def test_the_workflow_runs_each_python_of_the_classifiers_as_root_and_not() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    named = re.findall(r"^Programming Language :: Python :: (3\.\d+)$", config["metadata"]["classifiers"], re.MULTILINE)
    matrix = workflow()["strategy"]["matrix"]
    assert matrix["python"] == named
    assert config["options"]["python_requires"] == f">={named[0]}"
    assert [int(version[2:]) for version in named] == list(range(9, 9 + len(named)))
    assert len(matrix["user"]) == 2 and matrix["user"][0] == "root"


@pytest.mark.parametrize("user", workflow()["strategy"]["matrix"]["user"])
def test_the_workflow_calls_ci_run_as_root_with_ci_set_and_otherwise_without(user: str, tmp_path: Path) -> None:
    """Played with stand-ins for sudo and .ci/run, which say how they were called."""
    (script,) = [step["run"] for step in workflow()["steps"] if "run" in step]
    fakes = {"bin/sudo": 'echo sudo; [ "$1" = --preserve-env=CI ] && shift; exec "$@"', ".ci/run": "echo run CI=${CI-unset}"}
    for name, text in fakes.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    environment = {**os.environ, "CI": "true", "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    words = ["bash", "-euo", "pipefail", "-c", script.replace("${{ matrix.user }}", user)]
    said = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout.split("\n")
    assert said[:-1] == (["sudo", "run CI=true"] if user == "root" else ["run CI=unset"])
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_each_hook_before_a_commit_is_a_line_of_ci_run() -> None:
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    entries = [hook["entry"] for hook in repo["hooks"]]
    lines = [line for line in CI.splitlines() if line.startswith(".venv/bin/")]
    assert entries == [line.removesuffix(" .") for line in lines]


def tracked() -> List[Path]:
    """The text files of the repository, as git tells them from others."""
    done = subprocess.run(["git", "ls-files", "--eol", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("LOUD: no git repository: how its files are written is NOT tested here")
    found = [entry.split("\t", 1) for entry in done.stdout.split("\0") if entry]
    return [ROOT / name for kind, name in found if not kind.startswith("i/-text") and (ROOT / name).is_file()]


def test_files_are_written_as_the_editor_is_told() -> None:
    rules = configparser.ConfigParser()
    rules.read_string("[top]\n" + (ROOT / ".editorconfig").read_text())
    told = rules["*"]
    assert re.search(rf"^line-length = {told['max_line_length']}$", (ROOT / "ruff.toml").read_text(), re.MULTILINE)
    for path in tracked():
        text = path.read_bytes().decode(told["charset"])
        assert "\r" not in text, path
        assert not text or text.endswith("\n"), path
        assert not re.search(r"[ \t]+$", text, re.MULTILINE), path
