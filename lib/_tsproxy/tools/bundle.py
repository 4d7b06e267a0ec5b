"""`bundle OUT`: the whole program as one plain-text script.

A bundle is tsproxy.py with one block put in before its last lines: a loader, and each module, template and licence as
text. Take the block out and tsproxy.py is left, but for the first line: a bundle needs no module from elsewhere, so that one
keeps Python from looking where others may put some. Same sources, same bytes: nothing of the host, the user, the clock, the
working directory or the Python that writes it goes in.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import inspect
import os
import pkgutil
import re
import stat
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, Dict, Iterator, Mapping, Tuple

import _tsproxy
from _tsproxy.cli import exits
from _tsproxy.cli.exits import Exit
from _tsproxy.linux.printable import printable

LOADER = "_tsproxy/tools/bundle_loader.py"
TEMPLATES = "_tsproxy.tools.generate.templates"  # the one package with files beside its modules
# -I: not beside the script, not in the user's site-packages, not where PYTHON* variables point. -S of env(1) splits the words.
SHEBANG = "#!/usr/bin/env -S python3 -I\n"
MAIN = 'if __name__ == "__main__":\n'
BEGIN = "# ---- Put in by `tsproxy.py bundle`: the loader, then each file as text, at the line that stands before it. ----\n"
END = "# ---- The end of what `tsproxy.py bundle` put in. ----\n\n\n"
MARKS = "'" * 3  # spelled so that this file can be quoted as it stands
LICENCE = re.compile(r"\.dist-info/(?:licenses/)?((?:[^/]+/)*(?:licen[cs]e|copying)[^/]*)$", re.IGNORECASE)

# What open(), lstat() and rename() answer when OUT is no place for a file, rather than that writing one failed
BAD_PLACE = (
    errno.EACCES,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
)
ALLOWED = "allowed: - (standard output), or a new or a regular file in a directory that you may write to"


def run(out: str) -> int:
    """Write the bundle to `out`, whole or not at all, and say so; or to standard output, and nothing else, for "-"."""
    script = build(inspect.getsource(_entry()), _files()).encode()
    if out == "-":
        _say(script)
        return exits.DRAINED
    _write(out, script)
    _say(f"{printable(out)}: {len(script)} bytes, sha256 {hashlib.sha256(script).hexdigest()}\n".encode())
    return exits.DRAINED


# What goes in


def _entry() -> ModuleType:
    """tsproxy.py: the script that runs or, behind an installed command, the module. Known by the manual, its docstring."""
    for name in ("tsproxy", "__main__"):
        module = sys.modules.get(name)
        if module and (module.__doc__ or "").startswith("tsproxy:"):
            return module
    raise Exit(exits.FAILED, "can't bundle: what runs is not tsproxy.py, or Python -OO has taken its manual away")


def _files() -> Dict[str, str]:
    """Path in the bundle -> text. A bundle that runs has it all; else modules are asked of whatever imports them."""
    held = getattr(_tsproxy.__loader__, "bundled", None)
    if held is not None:
        return {path: text[1:] for path, (_, text) in held.items()}
    licences = {f"docopt/{name}": text for name, text in _licences("docopt-ng").items()}
    modules = {**dict(_modules("_tsproxy")), **dict(_modules("docopt"))}
    return {**_own_licence(), **licences, **modules, **dict(_templates())}


def _modules(name: str) -> Iterator[Tuple[str, str]]:
    """(path, text) of a module and, if it is a package, of all that is in it."""
    spec = importlib.util.find_spec(name)
    loader: Any = spec and spec.loader
    text = loader.get_source(name) if loader else None
    if spec is None or text is None:
        raise Exit(exits.FAILED, f"can't bundle {name}: its source is not here")
    inside = spec.submodule_search_locations
    yield name.replace(".", "/") + (".py" if inside is None else "/__init__.py"), text
    for module in pkgutil.iter_modules(inside or ()):
        yield from _modules(f"{name}.{module.name}")


def _templates() -> Iterator[Tuple[str, str]]:
    """(path, text) of each file beside the modules of that package."""
    spec = importlib.util.find_spec(TEMPLATES)
    loader: Any = spec and spec.loader
    reader = loader.get_resource_reader(TEMPLATES)
    for name in reader.contents():
        if reader.is_resource(name) and not name.endswith((".py", ".pyc")):
            with reader.open_resource(name) as file:
                yield f"{TEMPLATES.replace('.', '/')}/{name}", str(file.read(), "utf-8")


def _own_licence() -> Dict[str, str]:
    """tsproxy's own: it stands beside tsproxy.py in a checkout, in the metadata once it is installed."""
    home = Path(inspect.getfile(_entry())).resolve().parent
    if not (home / "lib" / "_tsproxy").is_dir():
        return {"LICENSE": "\n".join(_licences("tsproxy").values())}
    try:
        return {"LICENSE": (home / "LICENSE").read_text("utf-8")}
    except OSError as problem:
        raise Exit(exits.FAILED, f"can't bundle without tsproxy's licence: {home / 'LICENSE'}: {problem.strerror}") from None


def _licences(distribution: str) -> Dict[str, str]:
    """Name -> text of the licence files of an installed distribution; Exit if there is none, for they must go along."""
    try:
        files = metadata.files(distribution) or []
        found = {match[1]: file for file in files for match in [LICENCE.search(str(file))] if match}
        texts = {name: found[name].read_text("utf-8") for name in sorted(found)}
    except (metadata.PackageNotFoundError, OSError, UnicodeDecodeError):
        texts = {}
    if not texts:
        raise Exit(exits.FAILED, f"can't bundle without {distribution}'s licence; to get it: pip install {distribution}")
    return texts


# The script


def build(entry: str, files: Mapping[str, str]) -> str:
    """tsproxy.py, or a bundle whose block is made anew, with these files in it."""
    entry = re.sub(r"\A#!.*\n", SHEBANG, _without_block(entry))
    at = entry.rfind(MAIN)
    if at < 0:
        raise Exit(exits.FAILED, f"can't bundle: tsproxy.py has no line {MAIN.strip()!r}")
    opening = f"{entry[:at]}{BEGIN}\n{files[LOADER]}\n\nFILES: Files = {{}}\n"
    listing = "".join(_listing(opening.count("\n") + 1, files))
    return f"{opening}{listing}\n\ninstall(__file__, FILES)\n\n{END}{entry[at:]}"


def _without_block(entry: str) -> str:
    """The files inside may quote the marks: the block reaches from the first one to the last one."""
    head, begin, rest = entry.partition(BEGIN)
    return head + rest.rpartition(END)[2] if begin else entry


def _listing(line: int, files: Mapping[str, str]) -> Iterator[str]:
    """One statement a file, sorted by path, the first one at `line`: FILES[path] = line of the text, the text."""
    for path in sorted(files):
        literal = quote("\n" + files[path])
        line += 3
        yield f"\n\nFILES[{path!a}] = {line}, {literal}\n"
        line += files[path].count("\n") + 1


def quote(text: str) -> str:
    """A literal with as many lines as the text, which Python reads as the text.

    It is raw, so all stands there as it is. Only what a raw literal can't hold is put between two pieces of it.
    """

    def splice(run: re.Match[str]) -> str:
        fits = run.end() < len(text) and not re.search("'{3}|[\r\0]", run[0])
        return run[0] if fits else f"{MARKS}{run[0]!a}r{MARKS}"

    # A whole run at a time, so that no piece ends with a quote, or with a backslash that would take its end away
    return f"r{MARKS}" + re.sub(r"['\\\r\0]+", splice, text) + MARKS


# Where it goes


def _say(text: bytes) -> None:
    """Write to standard output now: what fails must fail here, not at the interpreter's end."""
    try:
        _write_all(1, text)
    except BrokenPipeError:
        raise
    except OSError as problem:
        raise Exit(exits.FAILED, f"standard output: {problem.strerror}") from None


def _write_all(fd: int, text: bytes) -> None:
    rest = memoryview(text)
    while rest:
        rest = rest[os.write(fd, rest) :]


def _write(out: str, script: bytes) -> None:
    """Put the script in OUT's place in one step. Whatever fails, OUT stays as it was and nothing else is left."""
    try:
        _refuse_other_kinds(out)
        _replace(out, script)
    except OSError as problem:
        if problem.errno not in BAD_PLACE:
            raise Exit(exits.FAILED, f"can't write {out!r}: {problem.strerror}") from None
        raise Exit(exits.USAGE, f"OUT: given {out!r}: {problem.strerror}; {ALLOWED}") from None


def _refuse_other_kinds(out: str) -> None:
    """Exit if something stands there that is no regular file: a directory, a device, a symbolic link, which may lead on."""
    try:
        mode = os.lstat(out).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "a symbolic link" if stat.S_ISLNK(mode) else "no regular file"
        raise Exit(exits.USAGE, f"OUT: given {out!r}, which is {kind}; {ALLOWED}")


def _replace(out: str, script: bytes) -> None:
    temporary = os.path.join(os.path.dirname(out), f".tsproxy-{os.urandom(6).hex()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o755)  # and the umask
    try:
        try:
            _write_all(fd, script)
            os.fsync(fd)  # some file systems say only now that they are full
        finally:
            os.close(fd)
        os.replace(temporary, out)
    except BaseException:
        os.unlink(temporary)
        raise
