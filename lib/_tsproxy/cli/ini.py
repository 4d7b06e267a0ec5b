"""An INI file into sections, keys and values, each with the number of its line, for messages that a person can act on.

The dialect is configparser's without interpolation, with "=" alone between key and value, with "#" and ";" for lines that are
comments, and with an error for whatever stands twice; configparser itself keeps no line numbers. Knows bytes and lines. Knows
nothing of what a section or a key means.
"""

from __future__ import annotations

import codecs
import io
import os
import re
import select
from typing import Dict, List, NamedTuple, Optional

from _tsproxy.cli.config import UsageError, is_address

MOST_BYTES = 4 << 20
_PATIENCE_S = 10  # with a pipe whose writer is silent
DEFAULT = "DEFAULT"  # the section whose keys hold for all others
_SHOWN = 63  # characters of a name or line in a message
_SECTION = re.compile(r"\[(.+)\]")


class Value(NamedTuple):
    """One line of a key's value, without the blanks around it."""

    text: str
    line: int


class Key(NamedTuple):
    """A key of a section. `values` has one item for each line that is not empty."""

    line: int
    values: List[Value]


class Section(NamedTuple):
    """A section, by its name as it stands in the file; any text."""

    name: str
    line: int
    keys: Dict[str, Key]


class BadFile(UsageError):
    """The one line for a file that can't be taken: file, number of the line, section if it is in one, and what is wrong."""

    def __init__(self, file: str, line: int, section: Optional[str], problem: str) -> None:
        within = "" if section is None else f"[{shown(section)}] "
        super().__init__(f"{file}:{line}: {within}{problem}")


def shown(name: str) -> str:
    """The name of a section or key for a message: short, and without characters that a terminal would obey."""
    return repr(name if len(name) <= _SHOWN else f"{name[:_SHOWN]}...")[1:-1]


def contents(path: str) -> bytes:
    """The bytes of a file, at most one more than MOST_BYTES. OSError as open(2) and read(2); ValueError for a path with a NUL.

    A pipe or a terminal is read up to its end, too, but without blocking for who writes nothing (TimeoutError): a start would
    not hear of SIGTERM meanwhile, and a reload would be the last one.
    """
    parts: List[bytes] = []
    with open(path, "rb", buffering=0, opener=_open_nonblocking) as file:
        poller = select.poll()
        poller.register(file, select.POLLIN)
        while sum(map(len, parts)) <= MOST_BYTES:
            part = file.read(MOST_BYTES + 1)
            if part:
                parts.append(part)
            elif part is not None:
                break
            elif not poller.poll(_PATIENCE_S * 1000):
                raise TimeoutError(0, f"nothing came for {_PATIENCE_S} s")
    return b"".join(parts)


def _open_nonblocking(path: str, flags: int) -> int:
    """open(2) of a FIFO waits for a writer otherwise (fifo(7))."""
    return os.open(path, flags | os.O_NONBLOCK)


def read(data: bytes, file: str) -> List[Section]:
    """The sections of the file in their order. BadFile for the first line that is none of a section, a key, or a comment."""
    reader = _Reader(file)
    for number, line in enumerate(io.StringIO(_decoded(data, file), newline=None), 1):
        reader.take(number, line)
    return list(reader.sections.values())


def _decoded(data: bytes, file: str) -> str:
    """UTF-8, with a byte order mark or without."""
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        before = io.StringIO(data[: error.start].decode(), newline=None).read()
        given = f"given the byte 0x{data[error.start]:02x}; allowed: UTF-8"
        raise BadFile(file, before.count("\n") + 1, None, given) from None


class _Reader:
    """Takes one line after the other."""

    def __init__(self, file: str) -> None:
        self._file = file
        self.sections: Dict[str, Section] = {}
        self._section: Optional[Section] = None
        self._key: Optional[Key] = None  # to which a line that is further in belongs
        self._indent = 0  # of that key

    def take(self, number: int, line: str) -> None:
        text, indent = line.strip(), len(line) - len(line.lstrip())
        if not text or text[0] in "#;":
            return
        header = _SECTION.fullmatch(text)
        if self._key is not None and indent > self._indent:
            if header and not is_address(header[1]):  # of which several may stand one a line, in brackets or without
                self._refuse_indented(number, text)
            self._key.values.append(Value(text, number))
            return
        if header:
            self._begin(header[1], number)
        else:
            self._key, self._indent = self._add(text, number), indent

    def _refuse_indented(self, number: int, text: str) -> None:
        allowed = "a section without blanks before it: an indented line goes on with the key above"
        raise BadFile(self._file, number, self._section and self._section.name, f"given '{shown(text)}'; allowed: {allowed}")

    def _begin(self, name: str, number: int) -> None:
        first = self.sections.get(name)
        if first:
            raise BadFile(self._file, number, name, f"given twice; allowed: once (it is in line {first.line}, too)")
        self._section = self.sections[name] = Section(name, number, {})
        self._key = None

    def _add(self, text: str, number: int) -> Key:
        name, equals, value = text.partition("=")
        name, value = name.rstrip(), value.lstrip()
        within, given = self._section and self._section.name, f"given '{shown(text)}'"
        if not equals or not name:
            problem = f"{given}; allowed: key = value, [section], or a comment, in a line that begins with # or ;"
            raise BadFile(self._file, number, within, problem)
        if self._section is None:
            raise BadFile(self._file, number, None, f"{given}; allowed: a section before the first key, e.g. [oe-primary]")
        first = self._section.keys.get(name)
        if first:
            again = f"{shown(name)}: given twice; allowed: once (it is in line {first.line}, too)"
            raise BadFile(self._file, number, within, again)
        self._section.keys[name] = key = Key(number, [Value(value, number)] if value else [])
        return key
