"""Text from outside, made fit to be shown to people: names of files, interfaces, tables, what a resolver or a kernel says.

Knows which characters a terminal would act on instead of showing them. Knows nothing of where a text comes from.
"""

from __future__ import annotations


def printable(text: str, kept: str = "") -> str:
    r"""The text with each character that is not shown as itself written as an escape, but for those in `kept`.

    Controls and terminal escapes, marks that turn the direction of writing, line breaks of any kind, and what is no UTF-8:
    a byte that os.fsdecode() has kept as a lone surrogate (PEP 383) becomes \xff.
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one in kept else _escaped(one) for one in text)


def _escaped(one: str) -> str:
    number = ord(one)
    return f"\\x{number - 0xDC00:02x}" if 0xDC80 <= number <= 0xDCFF else one.encode("unicode_escape").decode()
