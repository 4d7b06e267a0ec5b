"""The house's rules: imports run one way and in no circle, nothing foreign is needed, nothing global is kept."""

from __future__ import annotations

import ast
import configparser
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Dict, Iterator, List, Set

import grimp
import pytest
from harness import ROOT

LIB = ROOT / "lib"
SOURCES = sorted((LIB / "_tsproxy").rglob("*.py"))
LINT = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
each_source = pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(LIB)))


def lint(root: Path) -> subprocess.CompletedProcess[str]:
    """lint-imports, run over the setup.cfg and the lib/ of a checkout."""
    environment = {**os.environ, "PYTHONPATH": str(root / "lib")}
    return subprocess.run([sys.executable, "-c", LINT], cwd=root, capture_output=True, text=True, check=False, env=environment)


# Imports run one way


def test_the_contracts_are_kept() -> None:
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The part of a checkout that the contracts are about, to be spoilt."""
    shutil.copy(ROOT / "setup.cfg", tmp_path)
    shutil.copytree(LIB, tmp_path / "lib", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    return tmp_path


FORBIDDEN = [
    ("linux/cpus.py", "import _tsproxy.stats.metrics"),
    ("cli/config.py", "from _tsproxy.linux import cpus"),
    ("cli/parser.py", "from _tsproxy.tools import main"),
    ("stats/line_writer.py", "from _tsproxy.proxy import session"),
    ("proxy/gate.py", "from _tsproxy.policy import levers"),
    ("policy/levers.py", "from _tsproxy.proxy import gate"),
    ("proxy/worker.py", "from _tsproxy.supervisor import serve"),
    ("supervisor/serve.py", "def later() -> None:\n    from _tsproxy.tools import main"),
    ("proxy/direction.py", "from _tsproxy.proxy.session import Session"),
    ("supervisor/worker_slot.py", "from _tsproxy.supervisor import worker_pool"),
    ("loop/timers.py", "from _tsproxy.proxy import context"),
    ("capture/options.py", "from _tsproxy.policy import syn"),
    ("capture/layers.py", "from _tsproxy.capture import files"),
    ("tools/audit/flows.py", "from _tsproxy.tools.audit import verdict"),
    ("tools/top/model.py", "from _tsproxy.tools.top import picture"),
]


@pytest.mark.parametrize(
    ("where", "what"), FORBIDDEN, ids=[f"{where}: {what.split('import ')[1]}" for where, what in FORBIDDEN]
)
def test_an_import_that_runs_the_other_way_breaks_a_contract(copy: Path, where: str, what: str) -> None:
    with (copy / "lib" / "_tsproxy" / where).open("a") as source:
        source.write(f"\n{what}\n")
    done = lint(copy)
    assert done.returncode != 0
    assert "BROKEN" in done.stdout
    importer = "_tsproxy." + where[:-3].replace("/", ".")
    assert f" {importer} ->" in done.stdout


@pytest.mark.parametrize(
    ("contract", "package"),
    [
        ("packages", "_tsproxy"),
        ("proxy", "_tsproxy.proxy"),
        ("supervisor", "_tsproxy.supervisor"),
        ("loop", "_tsproxy.loop"),
        ("top", "_tsproxy.tools.top"),
        ("capture", "_tsproxy.capture"),
        ("audit", "_tsproxy.tools.audit"),
    ],
)
def test_a_contract_leaves_no_module_out(contract: str, package: str) -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    named = {name.strip() for name in config[f"importlinter:contract:{contract}"]["layers"].replace("|", "\n").split("\n")}
    children = {
        path for path in (LIB / package.replace(".", "/")).iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert named - {""} == {f"{package}.{path.stem}" for path in children if path.stem != "__init__"}


def imports() -> Dict[str, Set[str]]:
    """Each module and those that it imports, be it at the top or in a function."""
    graph = grimp.build_graph("_tsproxy", cache_dir=None)
    return {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}


def test_no_import_runs_in_a_circle() -> None:
    found = imports()
    assert len(found) == len(list((LIB / "_tsproxy").rglob("*.py")))
    TopologicalSorter(found).prepare()  # CycleError names the circle
    with pytest.raises(CycleError):
        TopologicalSorter({**found, "_tsproxy.cli.config": {"_tsproxy.tools.main"}}).prepare()


def test_workers_do_not_load_the_encoder() -> None:
    loaded = "{'orjson', 'json', '_tsproxy.stats.encoder'} & set(sys.modules)"
    code = f"import sys, _tsproxy.supervisor.worker_args; print(*sorted({loaded}))"
    environment = {**os.environ, "PYTHONPATH": str(LIB)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "\n"


# Nothing foreign


def foreign(tree: ast.AST) -> Set[str]:
    """The top-level names that a module imports from neither the standard library nor this one."""
    names: Set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("_tsproxy" if node.level else (node.module or "").partition(".")[0])
    return {name for name in names if name != "_tsproxy" and not is_standard(name)}


def is_standard(name: str) -> bool:
    if hasattr(sys, "stdlib_module_names"):
        return name in sys.stdlib_module_names
    spec, home = importlib.util.find_spec(name), sysconfig.get_path("stdlib")  # Python 3.9
    origin = spec.origin if spec and spec.origin else ""
    return origin in {"built-in", "frozen"} or (origin.startswith(home) and "site-packages" not in origin)


@each_source
def test_only_the_encoder_imports_what_is_not_in_the_standard_library(source: Path) -> None:
    allowed = {"orjson"} if source == LIB / "_tsproxy/stats/encoder.py" else set()
    assert foreign(ast.parse(source.read_text())) == allowed


def test_what_is_foreign_is_seen_wherever_it_is_imported() -> None:
    assert foreign(ast.parse("import os.path, docopt.x\ndef f():\n    from orjson import dumps")) == {"docopt", "orjson"}
    assert foreign(ast.parse("from __future__ import annotations\nfrom . import x\nimport _tsproxy.cli, termios")) == set()


# Nothing global

MUTATORS = {
    "add",
    "append",
    "clear",
    "discard",
    "extend",
    "insert",
    "pop",
    "popitem",
    "popleft",
    "remove",
    "setdefault",
    "update",
}


def at_module_level(tree: ast.Module) -> Iterator[ast.stmt]:
    """The statements that run at import, without the insides of functions and classes."""
    waiting: List[ast.stmt] = list(tree.body)
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            waiting += [child for child in ast.walk(node) if isinstance(child, ast.stmt) and child is not node]


def assigned(tree: ast.Module) -> Set[str]:
    """The names that a module binds by assignment, those of comprehensions, which are local, left out."""
    binding = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.For, ast.With)
    nodes = [node for statement in at_module_level(tree) if isinstance(statement, binding) for node in ast.walk(statement)]
    local = {id(name) for node in nodes if isinstance(node, ast.comprehension) for name in ast.walk(node.target)}
    return {
        node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and id(node) not in local
    }


def imported(tree: ast.Module) -> Set[str]:
    return {
        alias.asname or alias.name for node in at_module_level(tree) if isinstance(node, ast.Import) for alias in node.names
    }


def is_alias(name: str) -> bool:
    """CapWords: the name of a type."""
    return name.strip("_")[:1].isupper() and "_" not in name.strip("_")


def state(tree: ast.Module) -> List[str]:
    """What could be changed behind a caller's back: the reasons, with their lines."""
    constants = {name for name in assigned(tree) if name.isupper() or is_alias(name)}
    dunders = {name for name in assigned(tree) if name.startswith("__") and name.endswith("__")}
    # A name that is imported, too, is the None of a guarded import
    found = [f"{name} is no constant" for name in sorted(assigned(tree) - constants - dunders - imported(tree))]
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Global):
            found.append(f"line {line}: global {', '.join(node.names)}")
        elif isinstance(node, (ast.Attribute, ast.Subscript)) and named(node.value) in constants:
            if not isinstance(node.ctx, ast.Load):
                found.append(f"line {line}: {named(node.value)} is changed")
            elif isinstance(node, ast.Attribute) and node.attr in MUTATORS:
                found.append(f"line {line}: {named(node.value)}.{node.attr}()")
        elif isinstance(node, (ast.Name, ast.Attribute)) and (named(node) or getattr(node, "attr", "")) in {
            "cache",
            "lru_cache",
        }:
            found.append(f"line {line}: a cache is state, too")
    return found


def named(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else ""


@each_source
def test_no_module_keeps_state(source: Path) -> None:
    assert state(ast.parse(source.read_text())) == []


@pytest.mark.parametrize(
    "text",
    [
        "counter = 0",
        "counter: int = 0",
        "if True:\n    handlers = {}",
        "def f():\n    global LIMIT\n    LIMIT = 1",
        "CACHE = {}\ndef f(x):\n    CACHE[x] = 1",
        "CACHE = {}\ndef f(x):\n    del CACHE[x]",
        "SEEN = []\ndef f(x):\n    SEEN.append(x)",
        "Shared = {}\ndef f(x):\n    Shared.update(x)",
        "import functools\n@functools.lru_cache\ndef f(): ...",
        "from functools import cache\n@cache\ndef f(): ...",
        "squares = [n * n for n in range(3)]",
        "for number in range(3):\n    pass",
    ],
)
def test_state_is_seen_in_each_of_its_forms(text: str) -> None:
    assert state(ast.parse(text))


@pytest.mark.parametrize(
    "text",
    [
        "__version__ = '1'",
        "LIMIT = 3\n_LIMIT: int = LIMIT",
        "SQUARES = [n * n for n in range(3)]",
        "Fields = dict\nclass A:\n    x = 1\ndef f():\n    y = 2\n    y += 1",
        "try:\n    import orjson\nexcept ImportError:\n    orjson = None",
    ],
)
def test_what_is_no_state_is_let_be(text: str) -> None:
    assert state(ast.parse(text)) == []


# One way to a SYN


CONNECTING = {"connect", "connect_ex", "create_connection", "_connect_from_any_source", "_send_syn"}
# No socket: a Connector's own connect(), which asks the gate.
ASKING = {"Connector.ready: self.connect", "Connector.on_deadline: self.connect", "Connector.on_policy_failed: self.connect"}
ASKING |= {"Session.start: self._connector.connect"}


def mentions(tree: ast.Module, names: Set[str]) -> Set[str]:
    """Where a function has such an attribute, or a module such a name: called or only handed on."""
    homes = {
        id(node): f"{parent.name}.{method.name}"
        for parent in ast.walk(tree)
        if isinstance(parent, ast.ClassDef)
        for method in parent.body
        if isinstance(method, ast.FunctionDef)
        for node in ast.walk(method)
    }
    return {
        f"{homes.get(id(node), 'elsewhere')}: {ast.unparse(node)}"
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and node.attr in names) or (isinstance(node, ast.Name) and node.id in names)
    }


def test_the_proxy_connects_in_one_place_which_only_the_gates_answer_leads_to() -> None:
    """What the gate's answers do: test_connector.py."""
    found = {where for source in (LIB / "_tsproxy/proxy").rglob("*.py") for where in mentions(parsed(source), CONNECTING)}
    assert found - ASKING == {
        "Connector.connect: self._send_syn",
        "Connector._send_syn: self._connect_from_any_source",
        "Connector._connect_from_any_source: sock.connect_ex",
    }
    for room in ("linux", "loop", "stats"):  # what the proxy may import
        for source in (LIB / "_tsproxy" / room).rglob("*.py"):
            assert mentions(parsed(source), {"connect", "connect_ex", "create_connection"}) == set(), source


def parsed(source: Path) -> ast.Module:
    return ast.parse(source.read_text())


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("class A:\n def f(self, s):\n  s.connect(1)", "A.f: s.connect"),
        ("class A:\n def f(self):\n  return self._send_syn", "A.f: self._send_syn"),
        ("from socket import create_connection\ncreate_connection(1)", "elsewhere: create_connection"),
    ],
)
def test_a_connect_is_seen_wherever_it_is(text: str, where: str) -> None:
    assert mentions(ast.parse(text), CONNECTING) == {where}
