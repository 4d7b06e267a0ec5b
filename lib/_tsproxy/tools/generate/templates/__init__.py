"""The set-ups as template files, which their own linters read, and how one is filled in.

A placeholder is `__NAME__`, a word that each of these languages takes. Alone on a line, behind a comment mark, it stands for
any number of lines: each is indented as the placeholder is.

Knows the files beside this one. Knows nothing of the values.
"""

from __future__ import annotations

import re
from typing import Any, Mapping

import _tsproxy
from _tsproxy.cli import program

PLACEHOLDER = re.compile(r'^([ \t]*)(?:#|//|--|\.\\") __([A-Z_]+)__\n|__([A-Z]+(?:_[A-Z]+)*)__', re.MULTILINE)


def fill(name: str, **values: object) -> str:
    """The template of that name with a value for each placeholder; KeyError where one is missing. Values are not scanned.

    Templates call the program tsproxy.py; filled, they have the name by which it was started.
    """
    values["VERSION"] = _tsproxy.__version__
    return PLACEHOLDER.sub(lambda found: _filled(found, values), program.named(read(name)))


def read(name: str) -> str:
    """The text of a template, from the loader that imported this package: a directory's, a zip file's or a bundle's."""
    loader: Any = __spec__ and __spec__.loader
    with loader.get_resource_reader(__name__).open_resource(name) as file:
        return str(file.read(), "utf-8")


def _filled(found: re.Match[str], values: Mapping[str, object]) -> str:
    indent, lines, word = found.groups()
    if word:
        return str(values[word])
    return "".join(f"{indent}{line}\n" if line else "\n" for line in str(values[lines]).splitlines())


def in_parts(heading: str, files: Mapping[str, str]) -> str:
    """Several files (path -> text) as one text, each under a line "# path". The heading should say how awk splits it."""
    return "\n".join([heading, *(f"# {path}\n{text}" for path, text in files.items())])
