"""`generate journald`: the lines into the systemd journal, whole, and out of it again."""

from __future__ import annotations

from _tsproxy.tools.generate.text import fill

_UNIT = """\
# tsproxy @VERSION@: its lines in the systemd journal. What is called what elsewhere: tsproxy.py generate fields
#
# Make:   mkdir -p /etc/systemd/system/tsproxy.service.d
#         tsproxy.py generate journald > /etc/systemd/system/tsproxy.service.d/journald.conf
#         systemctl daemon-reload && systemctl restart tsproxy
# Try:    without a unit: tsproxy ... | systemd-cat -t tsproxy
# Look:   journalctl -u tsproxy -o cat | jq -R 'fromjson? | select(.event == "connection")'
# Undo:   rm /etc/systemd/system/tsproxy.service.d/journald.conf
#         rmdir --ignore-fail-on-non-empty /etc/systemd/system/tsproxy.service.d
#         systemctl daemon-reload; systemctl restart tsproxy
#
# A line is MESSAGE as it is (LineMax= is 48K, a line 4,096 bytes at most); the journal knows no types, and its own
# clock stands beside the line's. Onwards: systemd-journal-upload, or Vector (type: journald), Filebeat (type: journald),
# Alloy (loki.source.journal), rsyslog (imjournal; its own Ratelimit.Interval="0" too), syslog-ng (systemd-journal()).
# A journal that stands still makes tsproxy drop lines and count them, never wait.
[Service]
StandardOutput=journal
# Text for people comes in between: jq -R 'fromjson?' passes it over.
StandardError=journal
SyslogIdentifier=tsproxy
# One line for each connection: none shall be held back.
LogRateLimitIntervalSec=0
"""


def text() -> str:
    """A drop-in for tsproxy.service, as `generate systemd` or anybody makes it."""
    return fill(_UNIT)
