"""`generate KIND`: the one-time set-up that makes the policy hold, or what ships the lines, as text to read, load and undo."""

from __future__ import annotations

from functools import partial
from typing import Callable, Mapping

from _tsproxy.cli import exits
from _tsproxy.cli.config import Config
from _tsproxy.cli.exits import Exit
from _tsproxy.policy import kinds
from _tsproxy.tools.generate import completion, containers, fields, man, prometheus, setups, shippers

KINDS: Mapping[str, Callable[[Config], str]] = {
    "nftables": setups.nftables,
    "netns": setups.netns,
    "systemd": setups.systemd,
    "docker": containers.docker,
    "kubernetes": containers.kubernetes,
}
SHIPPERS: Mapping[str, Callable[[], str]] = {
    "rsyslog": shippers.rsyslog,
    "syslog-ng": shippers.syslog_ng,
    "vector": shippers.vector,
    "fluent-bit": shippers.fluent_bit,
    "filebeat": shippers.filebeat,
    "promtail": partial(shippers.fill, "promtail.yaml"),
    "alloy": shippers.alloy,
    "journald": partial(shippers.fill, "journald.conf"),
    "logrotate": partial(shippers.fill, "logrotate.conf"),
    "fields": fields.text,
    "prometheus": prometheus.text,
    "grafana": partial(shippers.fill, "grafana.json"),
}
"""What goes with the lines, whatever the proxy is asked for: these take no option."""
FROM_MANUAL: Mapping[str, Callable[[str], str]] = {
    "man": man.text,
    "completion": partial(completion.text, kinds=tuple(KINDS)),
}
"""What is made of the text that `--help` prints, and takes no option either."""
ALONE = (*SHIPPERS, *FROM_MANUAL)


def without_options(chosen: Mapping[str, object], manual: str) -> int:
    """Print what takes no option: that one of ALONE that is true in docopt's dictionary."""
    kind = next(kind for kind in ALONE if chosen[kind])
    print(SHIPPERS[kind]() if kind in SHIPPERS else FROM_MANUAL[kind](manual), end="")
    return exits.DRAINED


def run(kind: str, config: Config) -> int:
    """Print the set-up of that kind for what `config` asks. Exit 2 for a kind that is none or can't do it."""
    if kind not in KINDS:
        raise Exit(exits.USAGE, f"KIND: given {kind!r}; allowed: {' or '.join(KINDS)}; {' or '.join(ALONE)} alone")
    kinds.require(kind, config)
    print(KINDS[kind](config), end="")
    return exits.DRAINED
