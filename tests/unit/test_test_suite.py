"""The tests themselves: tests/README.md names each file, a test imports no other test, unit tests start no tsproxy."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Set

from harness import ROOT

TESTS = ROOT / "tests"
FILES = sorted(TESTS.rglob("test_*.py"))
SUPPORT = sorted((TESTS / "support").glob("*.py"))
# What starts a tsproxy or makes a namespace: names in support/, and fixtures.
IMPORTS = {"CHECKOUT", "Proxy", "Namespace", "Wire", "require_root", "as_nobody"}
FIXTURES = {"bundle", "form", "start", "start_form", "begin", "make_wire", "named"}


def test_the_index_names_each_file_once_and_no_other() -> None:
    named = re.findall(r"^\|.*\| `(\S+\.py)` \|$", (TESTS / "README.md").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(str(path.relative_to(TESTS)) for path in FILES)


def test_each_file_stands_in_a_directory_that_tells_what_it_needs() -> None:
    assert {path.relative_to(TESTS).parts[0] for path in FILES} <= {"unit", "process", "root", "deploy"}


def test_no_two_files_have_one_name() -> None:
    names = [path.name for path in (*FILES, *SUPPORT)]
    assert len(set(names)) == len(names)


def imports(path: Path) -> Set[str]:
    """Each module and each name that it imports from one."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    modules = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    return modules | {alias.name for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}


def test_what_tests_share_is_in_support() -> None:
    found = {path.name: {name for name in imports(path) if re.match("test_|conftest", name)} for path in (*FILES, *SUPPORT)}
    assert {path: names for path, names in found.items() if names} == {}


def parameters(path: Path) -> Set[str]:
    """The fixtures of its tests."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    return {argument.arg for node in nodes if node.name.startswith("test_") for argument in node.args.args}


def test_a_unit_test_starts_no_tsproxy_and_needs_no_root() -> None:
    units = [path for path in FILES if path.parent.name == "unit"]
    found = {path.name: imports(path) & IMPORTS | parameters(path) & FIXTURES for path in units}
    assert {path: names for path, names in found.items() if names} == {}


def test_the_tests_that_run_under_other_kernels_are_there() -> None:
    """pytest ends at once, with all of them, where it can't find one that it was named."""
    named = re.findall(
        r"(tests/\w+/test_\w+\.py)::(test_\w+)", (ROOT / "tests/deploy/kernels/test_deploy_kernels.py").read_text()
    )
    assert len(named) > 10
    assert [name for file, name in named if f"def {name}(" not in (ROOT / file).read_text()] == []
