"""`generate syslog-ng`: the lines from a file or from syslog, as ECS."""

from __future__ import annotations

from typing import Iterator

from _tsproxy.tools.generate import fields
from _tsproxy.tools.generate.text import fill_shipper

_CONF = """\
# tsproxy @VERSION@: its lines through syslog-ng, in ECS. What is called what: tsproxy.py generate fields
# Wants syslog-ng 4, or 3.38 (Debian 12) with "@version: 4.0" as the first line of syslog-ng.conf: before that, numbers
# and true and false come out as texts.
#
# Make:   mkdir -p @DIR@
#         tsproxy.py generate syslog-ng > /etc/syslog-ng/conf.d/tsproxy.conf
# Try:    syslog-ng --syntax-only && systemctl restart syslog-ng
# Look:   tail -f @ECS_FILE@
# Undo:   rm /etc/syslog-ng/conf.d/tsproxy.conf; systemctl restart syslog-ng
#
# In, one of these:
#   tsproxy ... >>@LINES_FILE@                     a file; tsproxy.py generate logrotate keeps it small
#   tsproxy ... | logger --tag tsproxy --size 8192           a pipe; without --size a line is cut into pieces of 1 KiB
#   StandardOutput=journal, SyslogIdentifier=tsproxy         systemd
# The last two come by the source s_src, as Debian's syslog-ng.conf calls it; on RHEL it is s_sys.
# Out: a file; elasticsearch-http(), kafka() or network(), with the same template, may stand in its place.
# A line that is not JSON comes out too, as event.kind pipeline_error with the message.

source s_tsproxy {
    file("@LINES_FILE@" flags(no-parse) program-override("tsproxy") follow-freq(1));
};

filter f_tsproxy { program("tsproxy" type(string)); };

rewrite r_tsproxy {
    set("${tsproxy.timestamp}" value("@timestamp"));
    set("${tsproxy.event}" value("event.action"));
    set("tsproxy.${tsproxy.event}" value("event.dataset"));
    set("event" value("event.kind"));
    set("metric" value("event.kind") condition("${tsproxy.event}" eq "metrics"));
    set(list("network") value("event.category") condition("${tsproxy.event}" eq "connection"));
    set(list("connection,end") value("event.type") condition("${tsproxy.event}" eq "connection"));
    set("tcp" value("network.transport") condition("${tsproxy.event}" eq "connection"));
    set("$(+ ${tsproxy.rx_bytes} ${tsproxy.tx_bytes})" value("network.bytes") condition("${tsproxy.event}" eq "connection"));
    unset(value("tsproxy.timestamp"));
    unset(value("tsproxy.event"));
@MOVES@
};

rewrite r_tsproxy_text {
    set("pipeline_error" value("event.kind"));
    set("${MESSAGE}" value("message"));
};

rewrite r_tsproxy_all {
    set("tsproxy" value("event.module"));
    set("tsproxy" value("service.name"));
    set("@ECS_VERSION@" value("ecs.version"));
};

destination d_tsproxy {
    file("@ECS_FILE@" template("$(format-json --scope none @KEYS@)\\n"));
};

log {
    source(s_tsproxy);
    source(s_src);
    filter(f_tsproxy);
    if {
        parser { json-parser(prefix("tsproxy.")); };
        rewrite(r_tsproxy);
    } else {
        rewrite(r_tsproxy_text);
    };
    rewrite(r_tsproxy_all);
    destination(d_tsproxy);
    flags(final);
};
"""

_KEPT = ("@timestamp", "message", "tsproxy.*", "event.*", "ecs.*", "service.*", "network.*")


def text() -> str:
    """A file for /etc/syslog-ng/conf.d."""
    return fill_shipper(
        _CONF,
        MOVES="\n".join(_moves()),
        KEYS=" ".join(f"--key {key}" for key in _keys()),
    )


def _keys() -> Iterator[str]:
    """What is written: the sets of fields that the map has names in."""
    yield from _KEPT
    found = (f"{name.partition('.')[0]}.*" for _, names in fields.ecs() for name in names.ecs if "." in name)
    yield from (key for key in dict.fromkeys(found) if key not in _KEPT)


def _moves() -> Iterator[str]:
    """Each field that has a name in ECS goes there. Not by rename(), which makes texts of numbers in 3.38."""
    for field, names in fields.ecs():
        old = f"tsproxy.{field}"
        value = f"$(* ${{{old}}} {names.scale})" if names.scale != 1 else f"${{{old}}}"
        for name in names.ecs:
            yield f'    set("{value}" value("{name}") condition("${{{old}}}" ne ""));'
        yield f'    unset(value("{old}"));'
