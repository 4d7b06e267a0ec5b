"""Fields into one JSON line: orjson where it can be had, `json` with the same bytes where not.

A line is at most 4,096 bytes, a pipe's atomic write (PIPE_BUF, pipe(7)), so two writers never mix their lines.
"""

from __future__ import annotations

import json
import time
from typing import Any, Dict

try:
    import orjson
except ImportError:
    orjson = None  # type: ignore[assignment, unused-ignore]

Fields = Dict[str, Any]

ENCODER = "orjson" if orjson is not None else "json"
MOST = 4096
_MARK = "..."
_SHORT = 2 * len(_MARK)  # texts up to this length only grow by a cut


def with_json(fields: Fields) -> bytes:
    """Compact UTF-8 JSON, as orjson writes it, by the standard library."""
    return json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()


def with_orjson(fields: Fields) -> bytes:
    """Compact UTF-8 JSON by orjson; only where ENCODER says so."""
    try:
        return orjson.dumps(fields)
    except TypeError:
        return with_json(fields)  # a sum beyond 64 bits


def _dumps(fields: Fields) -> bytes:
    return with_json(fields) if orjson is None else with_orjson(fields)


class Stamps:
    """Timestamps of lines that come in a row: most share their second with the one before, so its text is kept."""

    def __init__(self) -> None:
        self._second, self._text = -1, ""

    def rfc3339(self, at_ns: int) -> str:
        """UTC with six digits and Z, from nanoseconds of CLOCK_REALTIME."""
        second, rest = divmod(at_ns, 1_000_000_000)
        if second != self._second:
            self._second, self._text = second, _to_the_second(second)
        return f"{self._text}.{rest // 1000:06}Z"


def _to_the_second(at_s: int) -> str:
    year, month, day, hour, minute, second, *_ = time.gmtime(at_s)  # strftime(3) would cost 2 us more
    return f"{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}"


def line(fields: Fields) -> bytes:
    """One line with its newline, at most 4,096 bytes: the longest texts and lists are cut until it fits.

    Where there is nothing left to cut, the last fields are left out.
    """
    try:
        encoded = _dumps(fields)
    except UnicodeEncodeError:
        encoded = b""
    return encoded + b"\n" if 0 < len(encoded) < MOST else _fitted(fields)


def _fitted(fields: Fields) -> bytes:
    """The seldom case: something to clean or to cut."""
    fields = {name: _sound(value) for name, value in fields.items()}
    encoded = _dumps(fields)
    while len(encoded) >= MOST:
        fields = _shorter(fields, len(encoded) - MOST + 1)
        encoded = _dumps(fields)
    return encoded + b"\n"


def _sound(value: Any) -> Any:
    """No lone surrogates (a name or path that is no UTF-8): orjson refuses them, json writes bytes that are no UTF-8."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "backslashreplace").decode()
    return [_sound(item) for item in value] if isinstance(value, (list, tuple)) else value


def _shorter(fields: Fields, excess: int) -> Fields:
    """The same fields with the longest text or list cut, and a mark at the cut; one field less if all are short.

    It is cut by the `excess` of bytes, but to half at most: then there may be a longer one.
    """
    longest = max(fields, key=lambda name: _to_cut(fields[name]))
    if _to_cut(fields[longest]):
        return {**fields, longest: _cut(fields[longest], excess)}
    return dict(list(fields.items())[:-1])


def _to_cut(value: Any) -> int:
    """How many bytes a value takes, if cutting would make it shorter; else 0."""
    if isinstance(value, str):
        return len(_dumps({"": value})) if len(value) > _SHORT else 0
    if isinstance(value, list) and (len(value) > 2 or any(map(_to_cut, value))):
        return len(_dumps({"": value}))
    return 0


def _cut(value: Any, excess: int) -> Any:
    """A text without its end; a list without its last items, or with its longest one cut where that is half of it."""
    if isinstance(value, str):
        return value[: max(len(value) // 2, len(value) - excess - len(_MARK))] + _MARK
    sizes = [_to_cut(item) for item in value]
    if len(value) <= 2 or 2 * max(sizes) > len(_dumps({"": value})):
        at = sizes.index(max(sizes))
        return [*value[:at], _cut(value[at], excess), *value[at + 1 :]]
    keep, freed = len(value), -_in_list(_MARK)
    while keep > len(value) // 2 and freed < excess:
        keep -= 1
        freed += _in_list(value[keep])
    return [*value[:keep], _MARK]


def _in_list(item: Any) -> int:
    """How many bytes an item takes, its comma included."""
    return len(_dumps({"": item})) - len(b'{"":}') + 1
