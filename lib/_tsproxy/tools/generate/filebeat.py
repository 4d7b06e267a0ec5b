"""`generate filebeat`: the lines from a file or standard input, as ECS, by a script processor."""

from __future__ import annotations

import json

from _tsproxy.tools.generate import fields
from _tsproxy.tools.generate.text import fill_shipper

_CONF = """\
# tsproxy @VERSION@: its lines through Filebeat 8 or later, in ECS. What is called what: tsproxy.py generate fields
#
# Make:   tsproxy.py generate filebeat > /etc/filebeat/inputs.d/tsproxy.yml    with this in filebeat.yml:
#             filebeat.config.inputs: {enabled: true, path: inputs.d/*.yml}
# Try:    filebeat test config && systemctl restart filebeat
# Look:   journalctl -u filebeat; in Kibana: event.module : tsproxy
# Undo:   rm /etc/filebeat/inputs.d/tsproxy.yml; systemctl restart filebeat
#
# In: a file (tsproxy ... >>@LINES_FILE@; tsproxy.py generate logrotate keeps it small), or a pipe
# (tsproxy ... | filebeat -e) with "- type: stdin" in the place of type, id, paths, and prospector; Filebeat takes no other
# input beside stdin. Or journald with "- type: journald" and "include_matches.match: [_SYSTEMD_UNIT=tsproxy.service]".
# Out: what filebeat.yml says. Filebeat writes @timestamp with milliseconds unless told otherwise; tsproxy.timestamp keeps
# the microseconds.
# A line that is not JSON goes out too, as event.kind pipeline_error with the message.
- type: filestream
  id: tsproxy
  paths:
    - @LINES_FILE@
  # By name and inode, as before 9.0: the default, a fingerprint, sees a file only from its 1,024th byte on.
  prospector.scanner.fingerprint.enabled: false
  file_identity.native: ~
  processors:
    - decode_json_fields:
        fields: [message]
        target: tsproxy
    - script:
        lang: javascript
        source: |
@SCRIPT@
    - timestamp:
        field: tsproxy.timestamp
        layouts:
          - "2006-01-02T15:04:05.999999Z"
        test:
          - "2026-11-22T14:30:43.399836Z"
        ignore_missing: true
"""

_SCRIPT = """\
var moves = @MOVES@;
function process(event) {
  event.Put("event.module", "tsproxy");
  event.Put("service.name", "tsproxy");
  event.Put("ecs.version", "@ECS_VERSION@");
  var name = event.Get("tsproxy.event");
  if (!name) {
    event.Put("event.kind", "pipeline_error");
    return;
  }
  event.Delete("message");
  event.Put("event.kind", name == "metrics" ? "metric" : "event");
  event.Put("event.action", name);
  event.Put("event.dataset", "tsproxy." + name);
  if (name == "connection") {
    event.Put("event.category", ["network"]);
    event.Put("event.type", ["connection", "end"]);
    event.Put("network.transport", "tcp");
    event.Put("network.bytes", event.Get("tsproxy.rx_bytes") + event.Get("tsproxy.tx_bytes"));
  }
  event.Delete("tsproxy.event");
  for (var i = 0; i < moves.length; i++) {
    var value = event.Get("tsproxy." + moves[i][0]);
    if (value !== null && value !== undefined) {
      for (var j = 0; j < moves[i][1].length; j++) {
        event.Put(moves[i][1][j], moves[i][2] == 1 ? value : value * moves[i][2]);
      }
    }
    event.Delete("tsproxy." + moves[i][0]);
  }
}
"""


def text() -> str:
    """A file of inputs."""
    script = fill_shipper(_SCRIPT, MOVES=_moves())
    indented = "\n".join(f"          {line}" for line in script.splitlines())
    return fill_shipper(_CONF, SCRIPT=indented)


def _moves() -> str:
    """[[field, [its names], what it is multiplied by], ...]."""
    rows = [json.dumps([field, names.ecs, names.scale]) for field, names in fields.ecs()]
    return "[\n  " + ",\n  ".join(rows) + "\n]"
