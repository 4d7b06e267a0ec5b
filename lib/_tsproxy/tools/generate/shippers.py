"""`generate rsyslog|...|logrotate`: configurations that read the lines, move each field to its name elsewhere, pass them on.

Knows how each shipper's language moves a field. Which field goes where is in `fields`; all else is in the templates.
"""

from __future__ import annotations

import json
from typing import Dict, Iterable, Iterator

from _tsproxy.tools.generate import fields, templates


def fill(template: str, **lines: Iterable[str]) -> str:
    """The template of that name with lines, or a single value as one line, for each placeholder."""
    values = {name: "\n".join(given) for name, given in lines.items()}
    return templates.fill(template, ECS_VERSION=fields.ECS_VERSION, **values)


def _scaled(value: str, names: fields.Names) -> str:
    return f"{value} * {names.scale}" if names.scale != 1 else value


def rsyslog() -> str:
    """A file for /etc/rsyslog.d; rsyslog keeps the types."""

    def moves() -> Iterator[str]:
        for field, names in fields.ecs():
            source = f"$!tsproxy!{field}"
            sets = " ".join(f"set $!{name.replace('.', '!')} = {_scaled(source, names)};" for name in names.ecs)
            yield f"if exists({source}) then {{ {sets} }}"
            yield f"unset {source};"

    return fill("rsyslog.conf", MOVES=moves())


def syslog_ng() -> str:
    """A file for /etc/syslog-ng/conf.d. It writes only the groups of fields that it is told of."""
    kept = ["@timestamp", "message", *(f"{group}.*" for group in ("tsproxy", "event", "ecs", "service", "network"))]
    keys = dict.fromkeys([*kept, *(f"{group}.*" for group in _ecs_groups())])
    return fill("syslog-ng.conf", MOVES=_syslog_ng_moves(), KEYS=[" ".join(f"--key {key}" for key in keys)])


def _syslog_ng_moves() -> Iterator[str]:
    """Not by rename(), which makes texts of numbers in 3.38."""
    for field, names in fields.ecs():
        old = f"tsproxy.{field}"
        value = f"$(* ${{{old}}} {names.scale})" if names.scale != 1 else f"${{{old}}}"
        for name in names.ecs:
            yield f'set("{value}" value("{name}") condition("${{{old}}}" ne ""));'
        yield f'unset(value("{old}"));'


def _ecs_groups() -> Dict[str, Dict[str, str]]:
    """The groups that ECS has these fields in, empty, in their order."""
    return {name.partition(".")[0]: {} for _, names in fields.ecs() for name in names.ecs if "." in name}


def fluent_bit() -> str:
    """A configuration of its own, or a part of one. A field that is nil makes no group."""

    def put(name: str, value: str) -> str:
        group, _, rest = name.partition(".")
        return f'put(out, "{group}", "{rest}", {value})' if rest else f"out.{name} = {value}"

    def moves() -> Iterator[str]:
        for field, names in fields.ecs():
            sets = " ".join(put(name, _scaled(f"line.{field}", names)) for name in names.ecs)
            yield f"if line.{field} ~= nil then {sets} end line.{field} = nil"

    return fill("fluent-bit.yaml", MOVES=moves())


def filebeat() -> str:
    """A file of inputs; the script's moves are [[field, [its names], what it is multiplied by], ...]."""
    rows = [json.dumps([field, names.ecs, names.scale]) for field, names in fields.ecs()]
    script = fill("filebeat.js", MOVES=["[\n  " + ",\n  ".join(rows) + "\n]"])
    return fill("filebeat.yaml", SCRIPT=[script])


def vector() -> str:
    """A configuration of its own, or a part of one."""
    groups = {**{group: {} for group in ("ecs", "event", "network", "service")}, **_ecs_groups()}
    severities = {"ERROR": [str(fields.SEVERITIES["error"])], "SEVERITIES": [json.dumps(fields.SEVERITIES)]}
    ecs = fill("vector-ecs.vrl", GROUPS=[json.dumps(groups)], MOVES=_vrl_ecs_moves())
    return fill("vector.yaml", ECS=[ecs], OTEL=[fill("vector-otel.vrl", MOVES=_vrl_otel_moves(), **severities)])


def _vrl_ecs_moves() -> Iterator[str]:
    for field, names in fields.ecs():
        value = f"int!(line.{field}) * {names.scale}" if names.scale != 1 else f"line.{field}"
        sets = "; ".join(f".{name} = {value}" for name in names.ecs)
        yield f"if exists(line.{field}) {{ {sets}; del(line.{field}) }}"


def _vrl_otel_moves() -> Iterator[str]:
    for field, names in fields.otel_attributes():
        sets = "; ".join(f'attributes."{name}" = line.{field}' for name in names)
        yield f"if exists(line.{field}) {{ {sets}; del(line.{field}) }}"


def alloy() -> str:
    """A file for /etc/alloy. ParseJSON() makes doubles of numbers: ports and the pid are made whole again."""
    moves, moved = [], []
    for field, names in fields.otel_attributes():
        value = f'cache["{field}"]'
        whole = f"Int({value})" if field == "pid" or field.endswith("_port") else value
        moves += [f'`set(attributes["{name}"], {whole}) where {value} != nil`,' for name in names]
        moved.append(f'`delete_key(cache, "{field}")`,')
    levels = fields.SEVERITIES.items()
    severities = [f'`set(severity_number, {number}) where cache["level"] == "{level}"`,' for level, number in levels]
    return fill("alloy.alloy", SEVERITIES=severities, MOVES=moves, MOVED=moved)
