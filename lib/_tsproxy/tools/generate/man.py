"""`generate man`: tsproxy(1), made of the manual that `--help` prints.

Knows how the manual is laid out, and roff. Knows nothing of what it says.
"""

from __future__ import annotations

import re
from typing import Iterator

from _tsproxy.tools.generate import templates

_ENTRY = re.compile(r" {0,2}(-\S+(?: -\S+)?|[a-z]+)(?:  +(.*))?")  # "  -p --port=<port>    Listening port", "demo    show it"
_HEADING = re.compile(r"([A-Z][^:]*):")  # "Where to:", with its options below
_NOTE = re.compile(r"([A-Z][a-z ]*): (.*)")  # "Signals: SIGTERM drains ..."


def text(manual: str) -> str:
    """The page: man(7), which groff and mandoc take. There the program has the name that an installed one is called by."""
    purpose, usage, commands, *options, notes = manual.strip().replace("tsproxy.py", "tsproxy").split("\n\n")
    return templates.fill(
        "tsproxy.1",
        PURPOSE=_escaped(purpose.partition(": ")[2].rstrip(".")),
        USAGE="\n".join(_escaped(line.strip()) for line in usage.splitlines()[1:]),
        COMMANDS="\n".join(_entries(commands)),
        OPTIONS="\n".join(line for group in options for line in _options(group)),
        NOTES="\n".join(_notes(notes)),
    )


def _options(group: str) -> Iterator[str]:
    """One group of options, under its heading where it has one."""
    first, _, rest = group.partition("\n")
    heading = _HEADING.fullmatch(first)
    yield f".SS {_escaped(heading[1]) if heading else 'Others'}"
    yield from _entries(rest if heading else group)


def _entries(paragraph: str) -> Iterator[str]:
    """Each term with what is said of it, and what belongs to no term."""
    for line in paragraph.splitlines():
        entry = _ENTRY.fullmatch(line)
        if entry:
            yield from (".TP", " ".join(map(_term, entry[1].split())))
        said = entry[2] if entry else line
        if said:
            yield _escaped(said.strip())


def _notes(paragraph: str) -> Iterator[str]:
    for line in paragraph.splitlines():
        note = _NOTE.fullmatch(line)
        if note:
            yield f".SH {note[1].upper().replace('CODES', 'STATUS')}"
        yield _escaped(note[2] if note else line)


def _term(word: str) -> str:
    """A command or an option in bold, its argument in italics."""
    name, equals, argument = word.partition("=")
    return rf"\fB{_escaped(name)}\fR{equals}" + (rf"\fI{_escaped(argument)}\fR" if argument else "")


def _escaped(text: str) -> str:
    """As roff(7) wants it: no dash is a hyphen, and no line begins with a control character."""
    plain = text.replace("\\", r"\e").replace("-", r"\-")
    return rf"\&{plain}" if plain.startswith((".", "'")) else plain
