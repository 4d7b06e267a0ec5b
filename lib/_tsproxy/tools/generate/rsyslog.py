"""`generate rsyslog`: the lines from a file or from syslog, as ECS."""

from __future__ import annotations

from typing import Iterator

from _tsproxy.tools.generate import fields
from _tsproxy.tools.generate.text import fill_shipper

_CONF = """\
# tsproxy @VERSION@: its lines through rsyslog 8.2010 or later, in ECS. What is called what: tsproxy.py generate fields
#
# Make:   mkdir -p @DIR@
#         tsproxy.py generate rsyslog > /etc/rsyslog.d/10-tsproxy.conf
# Try:    rsyslogd -N1 && systemctl restart rsyslog
# Look:   tail -f @ECS_FILE@
# Undo:   rm /etc/rsyslog.d/10-tsproxy.conf; systemctl restart rsyslog
#
# In, one of these:
#   tsproxy ... >>@LINES_FILE@                     a file; tsproxy.py generate logrotate keeps it small
#   tsproxy ... | logger --tag tsproxy --size 8192           a pipe; without --size a line is cut into pieces of 1 KiB
#   StandardOutput=journal, SyslogIdentifier=tsproxy         systemd, where journald passes on to syslog
# Out: a file; omelasticsearch, omkafka or omfwd, with template="tsproxy-ecs", may stand in its place.
# A line that is not JSON comes out too, as event.kind pipeline_error with the message.

module(load="imfile")
module(load="mmjsonparse")

template(name="tsproxy-ecs" type="list") {
    property(name="$!")
    constant(value="\\n")
}

ruleset(name="tsproxy") {
    action(type="mmjsonparse" cookie="" container="$!tsproxy")
    if $parsesuccess == "OK" then {
        if $!tsproxy!event == "connection" then {
            set $.ok = parse_json("{\\"category\\":[\\"network\\"],\\"type\\":[\\"connection\\",\\"end\\"]}", "\\$!event");
            set $!network!transport = "tcp";
            set $!network!bytes = $!tsproxy!rx_bytes + $!tsproxy!tx_bytes;
        }
        if $!tsproxy!event == "metrics" then set $!event!kind = "metric";
        else set $!event!kind = "event";
        set $!event!module = "tsproxy";
        set $!event!dataset = "tsproxy." & $!tsproxy!event;
        set $!event!action = $!tsproxy!event;
        unset $!tsproxy!event;
        set $!@timestamp = $!tsproxy!timestamp;
        unset $!tsproxy!timestamp;
        # exists() is false for null too.
@MOVES@
    } else {
        unset $!tsproxy;
        set $!event!kind = "pipeline_error";
        set $!event!module = "tsproxy";
        set $!message = $msg;
    }
    set $!ecs!version = "@ECS_VERSION@";
    set $!service!name = "tsproxy";
    action(type="omfile" file="@ECS_FILE@" template="tsproxy-ecs")
    stop
}

# Killed, it reads up to 100 lines again that it had read before.
input(type="imfile" file="@LINES_FILE@" tag="tsproxy:" ruleset="tsproxy" addMetadata="off"
    reopenOnTruncate="on" persistStateInterval="100")
if $programname == "tsproxy" then call tsproxy
"""


def text() -> str:
    """A file for /etc/rsyslog.d."""
    return fill_shipper(
        _CONF,
        MOVES="\n".join(_moves()),
    )


def _moves() -> Iterator[str]:
    """Each field that has a name in ECS goes there; rsyslog keeps its type."""
    for field, names in fields.ecs():
        source = f"$!tsproxy!{field}"
        times = f" * {names.scale}" if names.scale != 1 else ""
        sets = " ".join(f"set $!{name.replace('.', '!')} = {source}{times};" for name in names.ecs)
        yield f"        if exists({source}) then {{ {sets} }}"
        yield f"        unset {source};"
