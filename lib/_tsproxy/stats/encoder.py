"""Encodes fields as one JSON line: with orjson if it is installed, else with `json`, which gives the same bytes.

A line has at most 4,096 bytes (PIPE_BUF): write(2) to a pipe is atomic up to that, so lines of two writers never mix (pipe(7)).
"""

from __future__ import annotations

import json
import time
from typing import Any, Dict

from _tsproxy.linux.uapi import PIPE_BUF

try:
    import orjson
except ImportError:
    orjson = None  # type: ignore[assignment, unused-ignore]

Fields = Dict[str, Any]

ENCODER = "orjson" if orjson is not None else "json"
_ELLIPSIS = "..."
_SHORT_TEXT = 2 * len(_ELLIPSIS)  # truncating a text of up to this length would not make it shorter


def with_json(fields: Fields) -> bytes:
    """Compact UTF-8 JSON by the standard library, the same bytes as orjson's."""
    return json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()


def with_orjson(fields: Fields) -> bytes:
    """Compact UTF-8 JSON by orjson. Call it only if ENCODER is "orjson"."""
    try:
        return orjson.dumps(fields)
    except TypeError:
        return with_json(fields)  # an integer of more than 64 bits


def _dumps(fields: Fields) -> bytes:
    return with_json(fields) if orjson is None else with_orjson(fields)


class Stamps:
    """Formats the timestamps of consecutive lines. Most are in the same second as the one before, so its text is cached."""

    def __init__(self) -> None:
        self._second, self._text = -1, ""

    def rfc3339(self, at_ns: int) -> str:
        """UTC with six digits and Z, from nanoseconds of CLOCK_REALTIME."""
        second, fraction_ns = divmod(at_ns, 1_000_000_000)
        if second != self._second:
            self._second, self._text = second, _to_the_second(second)
        return f"{self._text}.{fraction_ns // 1000:06}Z"


def _to_the_second(at_s: int) -> str:
    year, month, day, hour, minute, second, *_ = time.gmtime(at_s)  # strftime(3) would cost 2 us more
    return f"{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}"


def line(fields: Fields) -> bytes:
    """One line with its newline, at most 4,096 bytes: the longest texts and lists are truncated until it fits.

    When nothing can be truncated any more, the last fields are left out.
    """
    try:
        encoded = _dumps(fields)
    except UnicodeEncodeError:
        encoded = b""
    return encoded + b"\n" if 0 < len(encoded) < PIPE_BUF else _truncated(fields)


def _truncated(fields: Fields) -> bytes:
    """The slow path: replace lone surrogates, and truncate until the line fits."""
    fields = {name: _valid_unicode(value) for name, value in fields.items()}
    encoded = _dumps(fields)
    while len(encoded) >= PIPE_BUF:
        fields = _truncate_longest(fields, len(encoded) - PIPE_BUF + 1)
        encoded = _dumps(fields)
    return encoded + b"\n"


def _valid_unicode(value: Any) -> Any:
    """The value with lone surrogates (of names that are not UTF-8) escaped: orjson refuses them, json writes invalid UTF-8."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "backslashreplace").decode()
    return [_valid_unicode(item) for item in value] if isinstance(value, (list, tuple)) else value


def _truncate_longest(fields: Fields, excess: int) -> Fields:
    """The fields with the longest text or list truncated, and an ellipsis at its end; without the last one if all are short.

    It loses `excess` bytes, but at most half of its length: then another one may be the longest.
    """
    longest = max(fields, key=lambda name: _truncatable_bytes(fields[name]))
    if _truncatable_bytes(fields[longest]):
        return {**fields, longest: _truncate(fields[longest], excess)}
    return dict(list(fields.items())[:-1])


def _truncatable_bytes(value: Any) -> int:
    """How many bytes a value takes in JSON if truncating would make it shorter; else 0."""
    if isinstance(value, str):
        return len(_dumps({"": value})) if len(value) > _SHORT_TEXT else 0
    if isinstance(value, list) and (len(value) > 2 or any(map(_truncatable_bytes, value))):
        return len(_dumps({"": value}))
    return 0


def _truncate(value: Any, excess: int) -> Any:
    """A text without its end; a list without its last items, or with its longest item truncated if that is half of the list."""
    if isinstance(value, str):
        return value[: max(len(value) // 2, len(value) - excess - len(_ELLIPSIS))] + _ELLIPSIS
    sizes = [_truncatable_bytes(item) for item in value]
    if len(value) <= 2 or 2 * max(sizes) > len(_dumps({"": value})):
        at = sizes.index(max(sizes))
        return [*value[:at], _truncate(value[at], excess), *value[at + 1 :]]
    keep, freed = len(value), -_item_bytes(_ELLIPSIS)
    while keep > len(value) // 2 and freed < excess:
        keep -= 1
        freed += _item_bytes(value[keep])
    return [*value[:keep], _ELLIPSIS]


def _item_bytes(item: Any) -> int:
    """How many bytes an item takes in a JSON list, with its comma."""
    return len(_dumps({"": item})) - len(b'{"":}') + 1
