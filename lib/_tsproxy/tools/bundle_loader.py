"""Imports from text: what a bundle holds is found and loaded here, and nothing is compiled before it is imported.

Running or importing a bundle installs this; importing it does nothing else. So `runpy.run_path(path)` gives another
interpreter the modules, where path is the `__file__` of any that came from the bundle; `compiled` gives it those that this
one has imported, without to read or to compile the file again, which somebody may have replaced meanwhile.

This text stands in each bundle twice: live, to load the rest, and as one of the modules. So it has no `from __future__`
line, which may stand at the top of a script only.
"""

import io
import os
import sys
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import Dict, Optional, Sequence, Tuple

Files = Dict[str, Tuple[int, str]]  # path -> (the bundle's line where its text starts, a newline and the text)


class Bundle:
    """Finder and loader (importlib.abc) of the modules in one bundle. Their `__file__` is `path`, the bundle's."""

    def __init__(self, path: str, bundled: Files, compiled: Optional[Dict[str, CodeType]] = None) -> None:
        """`compiled` has what another interpreter's Bundle has compiled: those modules need no text."""
        self.path, self.bundled = os.path.abspath(path), bundled
        self.compiled = {} if compiled is None else compiled  # path in the bundle -> code

    def find_spec(
        self, name: str, path: Optional[Sequence[str]] = None, target: Optional[ModuleType] = None
    ) -> Optional[ModuleSpec]:
        """The spec of a module in here. A package of the same name from elsewhere, with its own path, keeps its modules."""
        if path or self._place(name) is None:
            return None
        spec = ModuleSpec(name, self, origin=self.path, is_package=self.is_package(name))  # type: ignore[arg-type]
        spec.has_location = True  # __file__ is set from origin
        return spec

    def create_module(self, spec: ModuleSpec) -> None:
        """Nothing special: a plain module."""

    def exec_module(self, module: ModuleType) -> None:
        """Compile the module's text and run it."""
        exec(self.get_code(module.__name__), module.__dict__)  # noqa: S102 -- that is what importing is

    def get_code(self, name: str) -> CodeType:
        """The code, at the lines where its text stands in the bundle: for tracebacks, debuggers and `inspect`."""
        place = self._place(name) or ""
        if place in self.compiled:
            return self.compiled[place]
        code = self._compile(*self._held(name))
        if sys.version_info >= (3, 13):  # for other interpreters, which older Pythons can't have: 0.3 MiB
            self.compiled[place] = code
        return code

    def _compile(self, line: int, text: str) -> CodeType:
        try:
            return _moved(compile(text, self.path, "exec", dont_inherit=True), line - 2)
        except SyntaxError:  # at a line of its own as well
            return compile("\n" * (line - 2) + text, self.path, "exec", dont_inherit=True)

    def get_source(self, name: str) -> str:
        """The module's text as it was before bundling."""
        return self._held(name)[1][1:]

    def is_package(self, name: str) -> bool:
        """True if other modules are in it."""
        return (self._place(name) or "").endswith("/__init__.py")

    def get_resource_reader(self, name: str) -> "Resources":
        """Reads the files beside a package's modules."""
        return Resources(self.bundled, name.replace(".", "/"))

    def _held(self, name: str) -> Tuple[int, str]:
        held = self.bundled.get(self._place(name) or "")
        if held is None:
            raise ImportError(f"{name} is not in {self.path}", name=name)
        return held

    def _place(self, name: str) -> Optional[str]:
        stem = name.replace(".", "/")
        places = (f"{stem}/__init__.py", f"{stem}.py")
        return next((place for place in places if place in self.bundled or place in self.compiled), None)


def _moved(code: CodeType, lines: int) -> CodeType:
    """The code as if so many empty lines stood before it; to compile those as well takes 6 ms of a start."""
    inside = tuple(_moved(const, lines) if isinstance(const, CodeType) else const for const in code.co_consts)
    return code.replace(co_firstlineno=code.co_firstlineno + lines, co_consts=inside)


class Resources:
    """As much of importlib.resources.abc.ResourceReader as is needed here."""

    def __init__(self, bundled: Files, package: str) -> None:
        self._bundled, self._package = bundled, package

    def open_resource(self, resource: str) -> io.BytesIO:
        """The file, to be read. FileNotFoundError for one that is not here."""
        place = f"{self._package}/{resource}"
        if place not in self._bundled:
            raise FileNotFoundError(place)
        return io.BytesIO(self._bundled[place][1][1:].encode())


def install(path: str, bundled: Files, compiled: Optional[Dict[str, CodeType]] = None) -> None:
    """Let `import` look here first. Where a bundle is installed already nothing changes: its modules are in use."""
    if not any(hasattr(finder, "bundled") for finder in sys.meta_path):
        sys.meta_path.insert(0, Bundle(path, bundled, compiled))
