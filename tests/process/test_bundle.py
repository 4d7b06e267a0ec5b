"""The single file: what is in it, how it is written, how it runs where there is nothing but Python."""

from __future__ import annotations

import ast
import configparser
import contextlib
import hashlib
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Set, Tuple

import pytest
from _tsproxy.tools import bundle as bundler
from harness import ROOT, Exchange, Proxy, receive_all
from hypothesis import example, given, settings
from hypothesis import strategies as st
from program import AT_HAND, PYTHON, python_for

LIB = ROOT / "lib"
MODULES = {str(path.relative_to(LIB)): path for path in sorted(LIB.rglob("*.py"))}
TEMPLATES = {str(path.relative_to(LIB)): path for path in sorted(LIB.rglob("templates/*.*")) if path.suffix != ".py"}
EACH_PYTHON = [
    pytest.param(path, id=version, marks=() if version == AT_HAND else pytest.mark.slow) for version, path in PYTHON.items()
]
on_each_python = pytest.mark.parametrize("python", EACH_PYTHON)

Ended = subprocess.CompletedProcess


def run(*command: Any, cwd: Optional[Path] = None, ok: bool = True, **extra: str) -> Ended[str]:
    """Run it to its end, in an environment without PYTHON* but for `extra`; its output as text."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    words = [str(word) for word in command]
    ended = subprocess.run(
        words, cwd=cwd, env={**kept, **extra}, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
    )
    assert not ok or ended.returncode == 0, f"{words}: exit {ended.returncode}: {ended.stderr}"
    return ended


def make(out: Any, **how: Any) -> Ended[str]:
    """`tsproxy.py bundle OUT` in the checkout, on the Python that runs the tests."""
    return run(sys.executable, ROOT / "tsproxy.py", "bundle", out, **how)


def refused(ended: Ended[str], code: int, *words: str) -> None:
    """It ended with that code and one line on standard error that has these words."""
    assert (ended.returncode, ended.stdout) == (code, ""), ended.stderr
    assert re.match(r"tsproxy(\.py)?: ", ended.stderr) and ended.stderr.count("\n") == 1, ended.stderr
    for word in words:
        assert word in ended.stderr


def held(script: str) -> Dict[str, Tuple[int, str]]:
    """FILES of a bundle, read without running it: path -> (line, text)."""
    found = {}
    for node in ast.parse(script).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
            path = ast.literal_eval(node.targets[0].slice)
            line, text = ast.literal_eval(node.value)
            assert text.startswith("\n")
            found[path] = line, text[1:]
    return found


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """An empty directory to run in."""
    place = tmp_path / "empty"
    place.mkdir()
    return place


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for PYTHONPATH with docopt-ng and nothing else in it, for any Python."""
    place = tmp_path_factory.mktemp("site")
    for file in metadata.files("docopt-ng") or ():
        if ".." not in file.parts and file.suffix != ".pyc":
            (place / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file.locate(), place / file)
    return place


# The same bytes


@on_each_python
def test_same_sources_give_the_same_bytes_on_each_python(python: str, site: Path, bundle: Path, tmp_path: Path) -> None:
    for seed in ("1", "2"):
        out = tmp_path / seed
        run(
            *(python, ROOT / "tsproxy.py", "bundle", out),
            cwd=tmp_path,
            PYTHONPATH=str(site),
            PYTHONHASHSEED=seed,
            LC_ALL="C",
            TZ="Asia/Tokyo",
            HOME="/nowhere",
        )
        assert out.read_bytes() == bundle.read_bytes()


def test_a_relative_path_to_another_directory_gives_the_same_bytes(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    checkout = os.path.relpath(ROOT / "tsproxy.py", tmp_path)
    run(sys.executable, checkout, "bundle", "here/x", cwd=tmp_path)
    assert (tmp_path / "here/x").read_bytes() == bundle.read_bytes()


@on_each_python
def test_a_bundle_bundles_itself_byte_for_byte(python: str, bundle: Path, empty: Path) -> None:
    run(python, "-I", "-S", bundle, "bundle", "again", cwd=empty)
    assert (empty / "again").read_bytes() == bundle.read_bytes()


def test_a_bundle_whose_files_were_edited_is_made_anew_with_the_right_lines(bundle: Path, tmp_path: Path) -> None:
    edited, again = tmp_path / "edited", tmp_path / "again"
    edited.write_text(bundle.read_text().replace('"""Exit codes, and', '# a line\n# another line\n"""Exit codes, and', 1))
    run(sys.executable, "-I", "-S", edited, "bundle", again)
    script = again.read_text()
    assert script != edited.read_text()
    assert held(script)["_tsproxy/cli/exits.py"][1].startswith("# a line\n")
    for line, text in held(script).values():
        assert script.split("\n")[line - 1] == text.partition("\n")[0]


def test_a_bundle_may_replace_itself(bundle: Path, empty: Path) -> None:
    shutil.copy(bundle, empty / "x")
    run(sys.executable, "-I", "-S", "x", "bundle", "x", cwd=empty)
    assert (empty / "x").read_bytes() == bundle.read_bytes()


def test_nothing_of_this_host_is_in_it(bundle: Path) -> None:
    script = bundle.read_text()
    for trace in (ROOT, bundle.parent, sys.executable, os.getcwd()):
        assert str(trace) == "/" or str(trace) not in script


# What is in it


def test_it_is_plain_text_that_can_be_run(bundle: Path) -> None:
    script = bundle.read_bytes().decode("utf-8")
    assert script.startswith('#!/usr/bin/env -S python3 -I\n"""tsproxy: ')
    assert script.endswith("\n")
    for line in script.split("\n"):
        assert line.isprintable() and len(line) < 200, line
    assert os.access(bundle, os.X_OK)


def test_each_module_template_and_licence_is_in_it_sorted_and_as_it_stands(bundle: Path) -> None:
    script = bundle.read_text()
    files = held(script)
    assert list(files) == sorted(files)
    theirs = {path for path in files if path.startswith("docopt/")}
    assert theirs == {"docopt/LICENSE-MIT", "docopt/__init__.py", "docopt/_version.py"}
    assert len(TEMPLATES) > 20
    assert set(files) - theirs == {*MODULES, *TEMPLATES, "LICENSE"}
    for path, (_, text) in files.items():
        ours = {**MODULES, **TEMPLATES, "LICENSE": ROOT / "LICENSE"}.get(path)
        assert ours is None or (text == ours.read_text("utf-8") and f"{text}'''\n" in script)
    for licence in ("LICENSE", "docopt/LICENSE-MIT"):
        assert files[licence][1] in script and "Permission is hereby granted" in files[licence][1]
    docopt = Path(str(metadata.distribution("docopt-ng").locate_file("docopt/__init__.py")))
    assert files["docopt/__init__.py"][1] == docopt.read_text("utf-8")


def test_without_its_block_and_first_line_it_is_tsproxy_py_with_the_manual_on_top(bundle: Path) -> None:
    script = bundle.read_text()
    ours = (ROOT / "tsproxy.py").read_text()
    head, _, rest = script.partition(bundler.BEGIN)
    assert (head + rest.rpartition(bundler.END)[2]).splitlines()[1:] == ours.splitlines()[1:]
    assert ast.get_docstring(ast.parse(script), clean=False) == ast.get_docstring(ast.parse(ours), clean=False)


@on_each_python
def test_it_and_all_in_it_compile_without_a_warning(python: str, bundle: Path, empty: Path) -> None:
    code = """if True:
        import runpy, sys
        path = sys.argv[1]
        with open(path, "rb") as script:
            compile(script.read(), path, "exec")
        runpy.run_path(path)
        bundled = sys.meta_path[0].bundled
        for name in bundled:
            if name.endswith(".py"):
                compile(bundled[name][1], name, "exec", dont_inherit=True)
        print(len(bundled))
    """
    ended = run(python, "-I", "-S", "-W", "error", "-c", code, bundle, cwd=empty)
    assert int(ended.stdout) == len(MODULES) + len(TEMPLATES) + 4 and ended.stderr == ""


# Quoting

awkward = st.text(st.sampled_from("'\"\\\n\r\0rn0 x{#\f\t\x1a\ufeff\u2028\xe9\U0001f600"), max_size=40)
texts = st.one_of(st.text(), awkward, awkward.map(lambda text: text + "\n"), st.sampled_from([bundler.BEGIN, bundler.END]))


@given(texts)
@example("")
@example("'''")
@example("''''")
@example("\\")
@example("\\'''\\")
@example("\\\\'''")
@example("'\r'")
@example("\0" + "1")
@example("x'")
@settings(deadline=None)
def test_python_reads_any_text_back_from_its_quotes(text: str) -> None:
    literal = bundler.quote(text)
    assert ast.literal_eval(literal) == text
    assert eval(compile(f"# coding: utf-8\n({literal})".encode(), "x", "eval")) == text
    assert literal.count("\n") == text.count("\n") and "\r" not in literal and "\0" not in literal


@given(st.dictionaries(st.text("abc_/.'\"\\\n\xe9", min_size=1), texts, max_size=5))
@settings(deadline=None)
def test_any_files_round_trip_at_the_lines_that_are_said(files: Dict[str, str]) -> None:
    files = {**files, bundler.LOADER: "Files = None\n"}
    entry = f'"""tsproxy: a manual"""\n\n\n{bundler.MAIN}    pass\n'
    script = bundler.build(entry, files)
    found = held(script)
    assert {path: text for path, (_, text) in found.items()} == files
    lines = script.split("\n")
    for line, text in found.values():
        first = text.partition("\n")[0]
        assert "'" in first or "\\" in first or "\r" in first or "\0" in first or lines[line - 1].startswith(first)
        assert lines[line - 2].endswith(f"{line}, r'''")
    assert bundler.build(script, files) == script


def test_code_as_people_write_it_is_not_changed_by_the_quotes() -> None:
    text = 'x = "a" + \'b\' + \'\' + r"\\d"\n"""Doc\\n"""\n'
    assert bundler.quote(text) == f"r'''{text}'''"


def test_an_entry_without_the_last_lines_is_refused() -> None:
    with pytest.raises(bundler.Exit, match="no line"):
        bundler.build('"""tsproxy: a manual"""\n', {bundler.LOADER: ""})


# Running it on a bare host


@on_each_python
def test_version_and_manual_come_from_an_empty_directory(python: str, bundle: Path, empty: Path) -> None:
    def answer(*words: str) -> str:
        ended = run(python, "-I", "-S", "-W", "error", bundle, *words, cwd=empty)
        assert ended.stderr == ""
        return ended.stdout

    version = re.search(r'__version__ = "(.*)"', (LIB / "_tsproxy/__init__.py").read_text())
    assert version and answer("--version") == f"tsproxy {version[1]}\n"
    manual = ast.get_docstring(ast.parse((ROOT / "tsproxy.py").read_text()), clean=False) or ""
    assert answer("--help") == f"{manual.strip()}\n".replace("tsproxy.py", "tsproxy"), "the name it was started by"
    assert list(empty.iterdir()) == []


@on_each_python
def test_a_usage_error_is_one_line_and_2(python: str, bundle: Path, empty: Path) -> None:
    refused(run(python, "-I", "-S", bundle, "--prot=1", cwd=empty, ok=False), 2, "--prot", "--port")
    refused(run(python, "-I", "-S", bundle, "-t", "x:1", "-p", "no", cwd=empty, ok=False), 2, "--port", "'no'")


def test_it_runs_by_its_shebang(bundle: Path, empty: Path) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    assert run(bundle, "--version", cwd=empty, PATH=path).stdout.startswith("tsproxy ")


def test_its_own_modules_win_over_those_beside_it(bundle: Path, empty: Path) -> None:
    for name in ("lib/_tsproxy", "_tsproxy", "docopt"):
        (empty / name).mkdir(parents=True)
        (empty / name / "__init__.py").write_text("raise SystemExit('the wrong one')")
    shutil.copy(bundle, empty / "x.py")
    assert run(sys.executable, "x.py", "--version", cwd=empty).stdout.startswith("tsproxy ")


PLANTED = "import os\nopen(os.environ['TRACE'], 'a').write(__file__ + '\\n')\n"


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A directory with a module under each name that anything could be imported by, which leaves a trace if it is."""
    place = tmp_path / "planted"
    (place / "lib" / "_tsproxy").mkdir(parents=True)
    names = {*standard_modules(), *sys.builtin_module_names, "orjson", "docopt", "sitecustomize", "usercustomize"}
    for name in names - {"sys", "builtins", "posix"}:  # no file is looked at for these
        (place / f"{name}.py").write_text(PLANTED)
        (place / "lib" / f"{name}.py").write_text(PLANTED)
    (place / "lib" / "_tsproxy" / "__init__.py").write_text(PLANTED)
    return place


def standard_modules() -> Set[str]:
    """Those of all Pythons here: sys.stdlib_module_names is there from 3.10 on."""
    code = "import sys; print(*getattr(sys, 'stdlib_module_names', ()))"
    said = [subprocess.run([path, "-I", "-c", code], capture_output=True, text=True, check=True) for path in PYTHON.values()]
    return {name for done in said for name in done.stdout.split() if name != "antigravity"}


def lives(words: List[Any], env: Dict[str, str], far: Exchange) -> None:
    """It relays for a name, so that modules which are imported late are, too; it prints what it makes; it refuses."""
    check = ["check", "-t", far.target, "--timestamps=preserve"]
    for more, code in ((["generate", "systemd", "-ta:1"], 0), (check, 0), (["-x"], 2)):
        assert subprocess.run([*words, *more], env=env, capture_output=True, check=False).returncode == code
    options = ["-t", far.target.replace("127.0.0.1", "localhost"), "-p0", "--timestamps=preserve", "--workers=1"]
    with contextlib.closing(Proxy(list(map(str, words)), *options, env=env)) as proxy:
        with proxy.connect() as client:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
        assert proxy.stop(signal.SIGTERM) == 0


HOW = [
    pytest.param(path, how, id=f"{how}-{version}", marks=() if version == AT_HAND else pytest.mark.slow)
    for version, path in PYTHON.items()
    for how in ("by shebang", "by python3")
]


@pytest.mark.parametrize(("python", "how"), [*HOW, pytest.param(sys.executable, "by a link", id="by a link")])
def test_nothing_is_imported_from_the_directory_that_it_stands_in(
    python: str, how: str, bundle: Path, planted: Path, echoing: Exchange
) -> None:
    """A hostile json.py beside it, in /tmp perhaps. By its shebang PYTHON* variables count for nothing either."""
    script = shutil.copy(bundle, planted / "tsproxy")
    if how == "by a link":
        (planted / "bin").mkdir()
        script = planted / "bin" / "tsproxy"
        script.symlink_to(planted / "tsproxy")
    trace = planted.parent / "trace"
    env = {**os.environ, "TRACE": str(trace), "PATH": f"{Path(python).parent}:{os.environ['PATH']}"}
    if how == "by shebang":
        env.update(PYTHONPATH=str(planted), PYTHONHOME=str(planted), PYTHONSTARTUP=str(planted / "json.py"))
        env.update(PYTHONUSERBASE=str(planted), PYTHONWARNINGS="ignore::json.Any", PYTHONINSPECT="1")
    lives([script] if how == "by shebang" else [python, script], env, echoing)
    assert not trace.exists(), trace.read_text()


def test_a_checkout_imports_nothing_from_beside_tsproxy_py(planted: Path, echoing: Exchange) -> None:
    shutil.rmtree(planted / "lib")
    shutil.copytree(ROOT / "lib", planted / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    script = shutil.copy(ROOT / "tsproxy.py", planted)
    lives([sys.executable, script], {**os.environ, "TRACE": str(planted.parent / "trace")}, echoing)
    assert not (planted.parent / "trace").exists(), (planted.parent / "trace").read_text()


@on_each_python
def test_bytes_go_both_ways_through_it(python: str, bundle: Path, empty: Path, echoing: Exchange) -> None:
    words = ("-t", echoing.target, "-p0", "--timestamps=preserve", "--metrics-interval=0", "--workers=1")
    proxy = Proxy([python, "-I", "-S", str(bundle)], *words, cwd=empty)
    try:
        with proxy.connect() as client:
            client.sendall(b"an order\n" * 1000)
            client.shutdown(socket.SHUT_WR)
            assert receive_all(client) == b"an order\n" * 1000
        assert proxy.stop(signal.SIGTERM) == 0
        assert proxy.line("connection")["rx_bytes"] == 9000
        assert proxy.stderr() == ""
    finally:
        proxy.close()


def test_tsproxy_py_without_lib_says_how_to_make_the_bundle(empty: Path) -> None:
    shutil.copy(ROOT / "tsproxy.py", empty)
    refused(run(sys.executable, "-I", "-S", "tsproxy.py", "--help", cwd=empty, ok=False), 2, "lib/", "tsproxy.py bundle OUT")


# Line numbers

SAME_LINES = """if True:
    import dis, linecache, runpy, sys
    path = sys.argv[1]
    runpy.run_path(path)
    loader, checked = sys.meta_path[0], 0

    def pairs(one, other):
        yield one, other
        for mine, its in zip(one.co_consts, other.co_consts):
            if hasattr(mine, "co_code"):
                yield from pairs(mine, its)

    for place in loader.bundled:
        if not place.endswith(".py"):
            continue
        name = place[:-3].replace("/", ".").replace(".__init__", "")
        alone = loader.get_source(name)
        for code, plain in pairs(loader.get_code(name), compile(alone, "alone", "exec", dont_inherit=True)):
            assert code.co_filename == path
            here = [line for _, line in dis.findlinestarts(code) if line and line >= loader.bundled[place][0]]
            there = [line for _, line in dis.findlinestarts(plain) if line]
            assert len(here) == len(there)
            if code.co_name != "<module>":
                here.append(code.co_firstlineno)
                there.append(plain.co_firstlineno)
            for line, its in zip(here, there):
                assert linecache.getline(path, line).rstrip("\\n") == alone.split("\\n")[its - 1], (name, line, its)
                checked += 1
    print(checked)
"""


@on_each_python
def test_each_line_of_each_module_is_where_the_code_says(python: str, bundle: Path, empty: Path) -> None:
    assert int(run(python, "-I", "-S", "-c", SAME_LINES, bundle, cwd=empty).stdout) > 1000


@on_each_python
def test_a_traceback_shows_the_line_of_the_bundle(python: str, bundle: Path, empty: Path) -> None:
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); from _tsproxy.cli import config; config.size(1, 2)('--x', 'y')"
    ended = run(python, "-I", "-S", "-c", code, bundle, cwd=empty, ok=False)
    frame = re.search(r'File "(.*)", line (\d+), in parse\n +(.*)\n', ended.stderr)
    assert frame, ended.stderr
    assert frame[1] == str(bundle)
    assert frame[3] == bundle.read_text().split("\n")[int(frame[2]) - 1].strip()
    assert frame[3].startswith("raise BadValue(option, given, f")


@on_each_python
def test_inspect_shows_the_text_of_a_function(python: str, bundle: Path, empty: Path) -> None:
    code = """if True:
        import inspect, runpy, sys
        runpy.run_path(sys.argv[1])
        from _tsproxy.cli import config
        print(inspect.getsource(config.parse), end="")
        print(inspect.getsourcefile(config.parse), config.__file__)
    """
    *source, files = run(python, "-I", "-S", "-c", code, bundle, cwd=empty).stdout.splitlines()
    assert "\n".join(source) in (LIB / "_tsproxy/cli/config.py").read_text()
    assert source[0].startswith("def parse(") and source[-1].strip().startswith("return Config(routes=(route,), ")
    assert files == f"{bundle} {bundle}"


def test_the_loader_gives_a_module_s_text_as_it_was(bundle: Path, empty: Path) -> None:
    code = """if True:
        import runpy, sys
        runpy.run_path(sys.argv[1])
        from _tsproxy.cli import config
        sys.stdout.write(config.__loader__.get_source("_tsproxy.cli.config"))
    """
    source = run(sys.executable, "-I", "-S", "-c", code, bundle, cwd=empty).stdout
    assert source == (LIB / "_tsproxy/cli/config.py").read_text()


def with_broken_module(bundle: Path, out: Path) -> None:
    script = bundle.read_text()
    files = {path: text for path, (_, text) in held(script).items()}
    out.write_text(bundler.build(script, {**files, "_tsproxy/broken.py": "x = 1\ndef :\n"}))


GIVE = """if True:
    import marshal, runpy, sys
    runpy.run_path(sys.argv[1])
    from _tsproxy.supervisor import origin, runners
    code = runners._IN_INTERPRETER.partition("import pickle")[0]
    open(sys.argv[2], "wb").write(marshal.dumps((code, origin.compiled())))
"""
TAKE = """if True:
    import marshal, sys
    code, compiled = marshal.load(open(sys.argv[1], "rb"))
    exec(code, {"path": chr(0).join(sys.path), "origin": "/nonexistent/tsproxy", "compiled": compiled})
    from _tsproxy.supervisor import worker_args
    print(worker_args.__file__, worker_args.run_worker.__code__.co_firstlineno)
"""


def test_an_interpreter_of_a_worker_has_the_modules_without_the_file(bundle: Path, tmp_path: Path) -> None:
    """Another version may stand in its place by then: one of it beside one of this would be neither."""
    python = python_for("interpreters")
    run(python, "-I", "-S", "-c", GIVE, bundle, tmp_path / "given")
    place, line = run(python, "-I", "-S", "-c", TAKE, tmp_path / "given").stdout.split()
    assert place == "/nonexistent/tsproxy"
    assert bundle.read_text().split("\n")[int(line) - 1].startswith("def run_worker(")


def test_a_module_is_not_compiled_before_it_is_imported(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "x"
    with_broken_module(bundle, out)
    assert run(sys.executable, "-I", "-S", out, "--version").stdout.startswith("tsproxy ")
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); import _tsproxy.broken"
    ended = run(sys.executable, "-I", "-S", "-c", code, out, ok=False)
    line = out.read_text().split("\n").index("def :") + 1
    assert f'File "{out}", line {line}\n' in ended.stderr and "SyntaxError" in ended.stderr


# Importing it

WAYS = {
    "run_path": "import runpy; runpy.run_path(path)",
    "spec": """
from importlib import machinery, util
spec = util.spec_from_file_location("tsproxy", path, loader=machinery.SourceFileLoader("tsproxy", path))
spec.loader.exec_module(util.module_from_spec(spec))""",
    "suffix": """
from importlib import util
spec = util.spec_from_file_location("tsproxy", path)
spec.loader.exec_module(util.module_from_spec(spec))""",
    "exec": 'exec(compile(open(path, "rb").read(), path, "exec"), {"__name__": "tsproxy", "__file__": path})',
}


@on_each_python
@pytest.mark.parametrize("way", WAYS)
def test_importing_it_brings_the_modules_and_runs_nothing(python: str, way: str, bundle: Path, empty: Path) -> None:
    path = shutil.copy(bundle, empty / "x.py")
    code = f"""
import sys
path = sys.argv[1]
before = list(sys.meta_path)
for time in range(2):
{"".join(f"    {line}" for line in WAYS[way].strip().splitlines(keepends=True))}
    assert sys.meta_path[1:] == before and len(sys.meta_path) == len(before) + 1
    assert not any(name.split(".")[0] in ("_tsproxy", "docopt") for name in sys.modules)
from _tsproxy.supervisor.worker_args import run_worker
import _tsproxy, docopt, _tsproxy.linux.sockets
{"".join(f"{line}" for line in WAYS[way].strip().splitlines(keepends=True))}
import _tsproxy.cli.config
assert _tsproxy.cli.config is sys.modules["_tsproxy.cli.config"] and len(sys.meta_path) == len(before) + 1
for module in (_tsproxy, docopt, _tsproxy.linux.sockets):
    print(module.__file__, module.__spec__.origin, module.__loader__.path)
"""
    ended = run(python, "-I", "-S", "-B", "-c", code, path, "--help", cwd=empty)
    assert (ended.stdout, ended.stderr) == (f"{path} {path} {path}\n" * 3, "")


def test_a_package_of_the_same_name_that_is_in_use_keeps_its_own_modules(bundle: Path, empty: Path) -> None:
    (empty / "_tsproxy/cli").mkdir(parents=True)
    (empty / "_tsproxy/__init__.py").write_text("")
    (empty / "_tsproxy/cli/__init__.py").write_text("")
    (empty / "_tsproxy/cli/exits.py").write_text("mine = True")
    code = """if True:
        import runpy, sys
        sys.path.insert(0, "")
        import _tsproxy
        runpy.run_path(sys.argv[1])
        import _tsproxy.cli.exits
        print(_tsproxy.cli.exits.mine)
        import _tsproxy.cli.config
    """
    ended = run(sys.executable, "-I", "-S", "-c", code, bundle, cwd=empty, ok=False)
    assert ended.stdout == "True\n" and "ModuleNotFoundError: No module named '_tsproxy.cli.config'" in ended.stderr


def test_a_module_that_is_not_in_it_is_not_found(bundle: Path, empty: Path) -> None:
    code = """if True:
        import runpy, sys
        runpy.run_path(sys.argv[1])
        import _tsproxy
        for name in ("_tsproxy.nothing", "_tsproxy.cli.exits.nothing", "LICENSE", "json.nothing"):
            try:
                __import__(name)
            except ModuleNotFoundError:
                print(name)
        try:
            sys.meta_path[0].get_source("json")
        except ImportError as problem:
            print(problem)
    """
    ended = run(sys.executable, "-I", "-S", "-c", code, bundle, cwd=empty)
    names = ["_tsproxy.nothing", "_tsproxy.cli.exits.nothing", "LICENSE", "json.nothing"]
    assert ended.stdout.splitlines() == [*names, f"json is not in {bundle}"]


def interpreters_module(python: str) -> str:
    names = "('_interpreters', '_xxsubinterpreters')"
    code = f"import importlib.util as u; print(next((n for n in {names} if u.find_spec(n)), ''))"
    return run(python, "-I", "-S", "-c", code).stdout.strip()


@on_each_python
def test_a_second_interpreter_has_the_same_modules_from_it(python: str, bundle: Path, empty: Path) -> None:
    module = interpreters_module(python)
    if not module:
        pytest.skip("this Python has no subinterpreters")
    inside = f"import runpy; runpy.run_path({str(bundle)!r})\n"
    inside += (
        "from _tsproxy.supervisor import worker_args; open('seen', 'w').write(worker_args.run_worker.__code__.co_filename)"
    )
    code = f"import {module} as them; them.run_string(them.create(), {inside!r})"
    run(python, "-I", "-S", "-W", "ignore", "-c", code, cwd=empty)
    assert (empty / "seen").read_text() == str(bundle)


# Where it goes


def test_it_says_path_size_and_digest(bundle: Path, tmp_path: Path) -> None:
    ended = make("a name.py", cwd=tmp_path)
    script = (tmp_path / "a name.py").read_bytes()
    assert ended.stdout == f"a name.py: {len(script)} bytes, sha256 {hashlib.sha256(script).hexdigest()}\n"
    assert ended.stderr == "" and script == bundle.read_bytes()
    assert os.listdir(tmp_path) == ["a name.py"]


def test_a_name_that_is_no_utf8_is_taken(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/\xff"
    ended = subprocess.run([sys.executable, str(ROOT / "tsproxy.py"), "bundle", name], capture_output=True, check=True)
    shown = name.replace(b"\xff", b"\\xff")  # for a terminal, which would not know what to do with it
    assert ended.stdout.startswith(shown + b": ") and os.path.isfile(name)


def test_a_dash_means_standard_output_and_nothing_else(bundle: Path, empty: Path) -> None:
    ended = make("-", cwd=empty)
    assert (ended.stdout.encode(), ended.stderr) == (bundle.read_bytes(), "")
    assert list(empty.iterdir()) == []


@pytest.mark.parametrize(("umask", "mode"), [("022", 0o755), ("077", 0o700), ("0", 0o755), ("027", 0o750)])
def test_the_mode_follows_the_umask(umask: str, mode: int, tmp_path: Path) -> None:
    out = tmp_path / "x"
    out.write_text("an older one, not executable")
    run("sh", "-c", f'umask {umask}; exec "$@"', "sh", sys.executable, ROOT / "tsproxy.py", "bundle", out)
    assert stat.S_IMODE(out.stat().st_mode) == mode


def test_a_regular_file_is_replaced_in_one_step(bundle: Path, tmp_path: Path) -> None:
    out, older = tmp_path / "x", tmp_path / "older"
    out.write_text("an older one")
    os.link(out, older)
    make(out)
    assert out.read_bytes() == bundle.read_bytes() and older.read_text() == "an older one"
    assert sorted(os.listdir(tmp_path)) == ["older", "x"]


def _symlink(at: Path) -> None:
    at.with_name("behind").write_text("kept")
    at.symlink_to("behind")


def _socket(at: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(at))


OTHERS = {
    "directory": (Path.mkdir, "a directory"),
    "symlink": (_symlink, "a symbolic link"),
    "dangling": (lambda at: at.symlink_to("nowhere"), "a symbolic link"),
    "fifo": (os.mkfifo, "no regular file"),
    "socket": (_socket, "no regular file"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_regular_file_is_left_alone(kind: str, tmp_path: Path) -> None:
    put, words = OTHERS[kind]
    put(tmp_path / "x")
    before = snapshot(tmp_path)
    refused(make("x", cwd=tmp_path, ok=False), 2, "OUT", "'x'", words, "allowed: ")
    assert snapshot(tmp_path) == before


def snapshot(place: Path) -> List[Tuple[str, int, str]]:
    """Name, kind and content of all in a directory."""
    return sorted((p.name, p.lstat().st_mode, p.read_text() if p.is_file() else "") for p in place.iterdir())


BAD = {
    "": "No such file or directory",
    "missing/x": "No such file or directory",
    "new/": "No such file or directory",
    "file/x": "Not a directory",
    "file/": "Not a directory",
    ".": "a directory",
    "..": "a directory",
    "/": "a directory",
    "/dev/null": "no regular file",
    "loop/x": "Too many levels of symbolic links",
    "n" * 256: "File name too long",
}


@pytest.mark.parametrize("out", BAD)
def test_a_bad_place_is_one_line_and_2(out: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "loop").symlink_to("loop")
    refused(make(out, cwd=tmp_path, ok=False), 2, "OUT: given", repr(out), BAD[out], "allowed: ")
    assert sorted(os.listdir(tmp_path)) == ["file", "loop"] and (tmp_path / "file").read_text() == "kept"


def test_the_longest_name_is_taken(tmp_path: Path) -> None:
    make("n" * 255, cwd=tmp_path)
    assert os.listdir(tmp_path) == ["n" * 255]


def test_no_permission_is_one_line_and_2(tmp_path: Path) -> None:
    place = tmp_path
    if os.geteuid() == 0:
        place = Path("/sys")  # sysfs lets nobody make a file, not even root
    else:
        place.chmod(0o555)
    out = place / "tsproxy-test-out"
    ended = make(out, ok=False)
    place == tmp_path and place.chmod(0o755)
    refused(ended, 2, "OUT: given", str(out), "allowed: ")
    assert re.search("Permission denied|Operation not permitted|Read-only file system", ended.stderr)


def test_a_write_that_fails_keeps_the_older_file_and_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "x"
    out.write_text("an older one")
    limited = ("sh", "-c", 'ulimit -f 64; exec "$@"', "sh")  # blocks of 512 bytes
    refused(run(*limited, sys.executable, "-B", ROOT / "tsproxy.py", "bundle", out, ok=False), 1, str(out), "File too large")
    assert snapshot(tmp_path) == [("x", out.stat().st_mode, "an older one")]


def test_a_full_disk_keeps_the_older_file_and_leaves_nothing(tmp_path: Path) -> None:
    private = ("unshare", "-rm", "sh", "-c")
    mount = f"mount -t tmpfs -o size=64k none {tmp_path}"
    if not shutil.which("unshare") or run(*private, mount, ok=False).returncode != 0:
        pytest.skip("no user and mount namespaces here")
    script = f'{mount} && cd {tmp_path} && echo older >x && {{ "$@"; code=$?; cat x >&2; ls -A >&2; exit $code; }}'
    ended = run(*private, script, "sh", sys.executable, "-B", ROOT / "tsproxy.py", "bundle", "x", ok=False)
    assert (ended.returncode, ended.stdout) == (1, "")
    message, *rest = ended.stderr.splitlines()
    assert message == "tsproxy.py: can't write 'x': No space left on device" and rest == ["older", "x"]


def to_output(output: int, out: Any) -> Ended[str]:
    command = [sys.executable, str(ROOT / "tsproxy.py"), "bundle", str(out)]
    return subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True, check=False, timeout=60)


@pytest.mark.parametrize("out", ["-", "x"])
def test_an_output_that_fails_is_said_and_1(out: str, tmp_path: Path) -> None:
    with open("/dev/full", "wb") as full:
        ended = to_output(full.fileno(), out if out == "-" else tmp_path / out)
    assert ended.returncode == 1
    assert ended.stderr == "tsproxy.py: standard output: No space left on device\n"


@pytest.mark.parametrize("out", ["-", "x"])
def test_an_output_that_nobody_reads_is_1_without_a_word(out: str, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    ended = to_output(writer, out if out == "-" else tmp_path / out)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (1, "")


# Where the sources come from


@pytest.fixture
def installed(site: Path, tmp_path: Path) -> Iterator[Path]:
    """What pip makes of setup.cfg: the modules and packages that it lists, side by side, and a dist-info with the licence."""
    place = tmp_path / "site-packages"
    shutil.copytree(site, place)
    listed = configparser.ConfigParser()
    listed.read(ROOT / "setup.cfg")
    for module in listed["options"]["py_modules"].split():
        shutil.copy(ROOT / f"{module}.py", place)
    for package in listed["options"]["packages"].split():
        target = place / package.replace(".", "/")
        target.mkdir()
        for pattern in ("*.py", *listed["options.package_data"].get(package, "").split()):
            for source in (LIB / package.replace(".", "/")).glob(pattern):
                shutil.copy(source, target)
    info = place / "tsproxy-0.0.0.dist-info"
    (info / "licenses").mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tsproxy\nVersion: 0.0.0\n")
    shutil.copy(ROOT / "LICENSE", info / "licenses")
    recorded = sorted(path.relative_to(place) for path in [*info.rglob("*"), place / "tsproxy.py"] if path.is_file())
    (info / "RECORD").write_text("".join(f"{path},,\n" for path in recorded))
    yield place


AS_COMMAND = "import sys; from tsproxy import main; sys.exit(main())"  # what the console script does


@pytest.mark.parametrize("how", [("-c", AS_COMMAND), ("-m", "tsproxy")], ids=["command", "module"])
@on_each_python
def test_an_installed_tsproxy_makes_the_same_bundle(
    python: str, how: Sequence[str], installed: Path, bundle: Path, empty: Path
) -> None:
    run(python, "-S", *how, "bundle", "x", cwd=empty, PYTHONPATH=str(installed))
    assert (empty / "x").read_bytes() == bundle.read_bytes()


def test_a_licence_beside_an_installed_tsproxy_is_not_taken_for_its_own(installed: Path, bundle: Path, empty: Path) -> None:
    (installed / "LICENSE").write_text("of somebody else")
    run(sys.executable, "-S", "-c", AS_COMMAND, "bundle", "x", cwd=empty, PYTHONPATH=str(installed))
    assert (empty / "x").read_bytes() == bundle.read_bytes()


@pytest.mark.parametrize("distribution", ["docopt-ng", "tsproxy"])
@pytest.mark.parametrize("left", ["file", "record", "nothing"])
def test_a_missing_licence_is_one_line_and_1(distribution: str, left: str, installed: Path, empty: Path) -> None:
    (info,) = installed.glob(f"{distribution.replace('-', '_')}-*.dist-info")
    (licence,) = [path for path in info.rglob("*") if "LICENSE" in path.name]
    if left == "nothing":
        shutil.rmtree(info)
    elif left == "record":
        record = info / "RECORD"
        record.write_text("".join(line for line in record.read_text().splitlines(True) if "LICENSE" not in line))
    else:
        licence.unlink()
    ended = run(sys.executable, "-S", "-c", AS_COMMAND, "bundle", "x", cwd=empty, PYTHONPATH=str(installed), ok=False)
    refused(ended, 1, f"without {distribution}'s licence")
    assert list(empty.iterdir()) == []


def test_a_checkout_without_its_licence_is_one_line_and_1(site: Path, tmp_path: Path) -> None:
    shutil.copytree(LIB, tmp_path / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "tsproxy.py", tmp_path)
    ended = run(sys.executable, "-S", "tsproxy.py", "bundle", "x", cwd=tmp_path, PYTHONPATH=str(site), ok=False)
    refused(ended, 1, "without tsproxy's licence", "LICENSE", "No such file or directory")


def test_a_module_without_source_is_one_line_and_1(installed: Path, empty: Path) -> None:
    code = "import py_compile, sys; py_compile.compile(sys.argv[1], sys.argv[1] + 'c')"
    source = installed / "_tsproxy/cli/exits.py"
    run(sys.executable, "-c", code, source)
    source.unlink()
    ended = run(sys.executable, "-S", "-c", AS_COMMAND, "bundle", "x", cwd=empty, PYTHONPATH=str(installed), ok=False)
    refused(ended, 1, "_tsproxy.cli.exits", "source")


def test_another_script_is_not_taken_for_tsproxy(tmp_path: Path, site: Path) -> None:
    script = tmp_path / "other.py"
    script.write_text(f'"""Usage: other"""\nfrom _tsproxy.tools import bundle\n{bundler.MAIN}    bundle.run("-")\n')
    ended = run(sys.executable, "-S", script, PYTHONPATH=f"{site}:{LIB}", ok=False)
    assert ended.stdout == "" and "can't bundle: what runs is not tsproxy.py" in ended.stderr
