"""`generate logrotate`: keeps the file small that the shell's `>>` writes the lines into."""

from __future__ import annotations

from _tsproxy.tools.generate.text import fill_shipper

_CONF = """\
# tsproxy @VERSION@: keeps the file of its lines small, where they go to one: tsproxy ... >>@LINES_FILE@
#
# Make:   mkdir -p @DIR@
#         tsproxy.py generate logrotate > /etc/logrotate.d/tsproxy
# Try:    logrotate --debug /etc/logrotate.d/tsproxy; logrotate --force /etc/logrotate.d/tsproxy
# Undo:   rm /etc/logrotate.d/tsproxy
#
# copytruncate, since the shell opened the file and nobody will open it again. Three things to know:
# - append with >>. After a truncation >>, and it alone, goes on at the beginning; > would leave a hole of zeros.
# - lines written between the copy and the truncation are lost, and not counted: tsproxy can't know. Where each line
#   counts, take a pipe or the journal, which have no such moment.
# - a shipper sees the truncation when the file is shorter than what it has read: hence no rotation below 1 MiB.
@LINES_FILE@ {
    copytruncate
    daily
    minsize 1M
    maxsize 256M
    rotate 7
    compress
    delaycompress
    missingok
    notifempty
}
"""


def text() -> str:
    """A file for /etc/logrotate.d."""
    return fill_shipper(_CONF)
