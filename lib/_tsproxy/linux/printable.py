"""Escapes text from outside before it is shown: names of files, interfaces, tables, messages of a resolver or a kernel.

Knows which characters a terminal interprets instead of showing them. Knows nothing of where a text comes from.
"""

from __future__ import annotations


def printable(text: str, kept: str = "") -> str:
    r"""The text with each character that is not printable escaped, except those in `kept`.

    Controls and terminal escapes, marks that turn the direction of writing, line breaks of any kind, and what is no UTF-8:
    a byte that os.fsdecode() has kept as a lone surrogate (PEP 383) becomes \xff.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in kept else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    number = ord(char)
    return f"\\x{number - 0xDC00:02x}" if 0xDC80 <= number <= 0xDCFF else char.encode("unicode_escape").decode()
