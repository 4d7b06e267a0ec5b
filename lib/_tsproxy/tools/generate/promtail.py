"""`generate promtail`: the lines from a file or standard input, to Loki."""

from __future__ import annotations

from _tsproxy.tools.generate.text import fill_shipper

_CONF = """\
# tsproxy @VERSION@: its lines through Promtail to Loki. Promtail is at its end; for new set-ups: tsproxy.py generate alloy
#
# Make:   tsproxy.py generate promtail > /etc/promtail/tsproxy.yml        and set the address of Loki below
# Try:    promtail -check-syntax -config.file=/etc/promtail/tsproxy.yml
#         promtail -dry-run -config.file=/etc/promtail/tsproxy.yml        prints what it would send
#         promtail -config.file=/etc/promtail/tsproxy.yml
# Look:   logcli query '{job="tsproxy", event="connection"} | json | duration_us > 1000000'
# Undo:   rm /etc/promtail/tsproxy.yml /var/lib/promtail/tsproxy.yaml; systemctl restart promtail
#
# In: a file (tsproxy ... >>@LINES_FILE@; tsproxy.py generate logrotate keeps it small), or a pipe
# (tsproxy ... | promtail -stdin -config.file=...).
# Out: the line as it is, at its own time with microseconds, labelled by event and level only: each value of a label is a
# stream of its own. "| json" has the fields, with their types; tsproxy.py generate fields has their names elsewhere.
server:
  disable: true
positions:
  filename: /var/lib/promtail/tsproxy.yaml
clients:
  - url: http://127.0.0.1:3100/loki/api/v1/push
scrape_configs:
  - job_name: tsproxy
    static_configs:
      - targets: [localhost]
        labels:
          job: tsproxy
          __path__: @LINES_FILE@
    pipeline_stages:
      - json:
          expressions: {timestamp: timestamp, level: level, event: event}
      - timestamp:
          source: timestamp
          format: RFC3339Nano
      - labels: {level: , event: }
"""


def text() -> str:
    """A configuration of its own."""
    return fill_shipper(_CONF)
