"""The set-ups as files that their own linters read, and how the places in one are filled in.

A place is `__NAME__`, a word that each of these languages takes. On a line of its own, behind a comment mark, it stands for
lines: each is indented as the place is, and where there is none the line goes away.

Knows the files beside this one. Knows nothing of what goes into them.
"""

from __future__ import annotations

import re
from typing import Any, Mapping

import _tsproxy
from _tsproxy.cli import program

PLACE = re.compile(r'^([ \t]*)(?:#|//|--|\.\\") __([A-Z_]+)__\n|__([A-Z]+(?:_[A-Z]+)*)__', re.MULTILINE)


def fill(name: str, **values: object) -> str:
    """The template of that name with a value in each place; KeyError for a place that has none.

    What stands in a value is not looked into. Templates call the program tsproxy.py; filled, they have the name by which it
    was started.
    """
    values["VERSION"] = _tsproxy.__version__
    return PLACE.sub(lambda place: _filled(place, values), program.named(read(name)))


def read(name: str) -> str:
    """The text of a template. Whatever imported this package is asked for it: Python, from a directory, or a bundle."""
    loader: Any = __spec__ and __spec__.loader
    with loader.get_resource_reader(__name__).open_resource(name) as file:
        return str(file.read(), "utf-8")


def _filled(place: re.Match[str], values: Mapping[str, object]) -> str:
    indent, lines, word = place.groups()
    if word:
        return str(values[word])
    return "".join(f"{indent}{line}\n" if line else "\n" for line in str(values[lines]).splitlines())


def in_parts(heading: str, files: Mapping[str, str]) -> str:
    """Path -> text as one text, each file under a line that names its path; awk takes them apart, as `heading` should tell."""
    return "\n".join([heading, *(f"# {path}\n{text}" for path, text in files.items())])
