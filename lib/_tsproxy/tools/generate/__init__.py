"""`generate KIND`: the one-time set-up that makes the policy hold, or what ships the lines, as text to read, load and undo."""

from __future__ import annotations

from typing import Callable, Mapping

from _tsproxy.cli import exits
from _tsproxy.cli.config import Config
from _tsproxy.cli.exits import Exit
from _tsproxy.tools.generate import (
    alloy,
    docker,
    fields,
    filebeat,
    fluent_bit,
    journald,
    kubernetes,
    logrotate,
    netns,
    nftables,
    promtail,
    rsyslog,
    syslog_ng,
    systemd,
    vector,
)

KINDS: Mapping[str, Callable[[Config], str]] = {
    "nftables": nftables.text,
    "netns": netns.text,
    "systemd": systemd.text,
    "docker": docker.text,
    "kubernetes": kubernetes.text,
}
SHIPPERS: Mapping[str, Callable[[], str]] = {
    "rsyslog": rsyslog.text,
    "syslog-ng": syslog_ng.text,
    "vector": vector.text,
    "fluent-bit": fluent_bit.text,
    "filebeat": filebeat.text,
    "promtail": promtail.text,
    "alloy": alloy.text,
    "journald": journald.text,
    "logrotate": logrotate.text,
    "fields": fields.text,
}
"""What goes with the lines, whatever the proxy is asked for: these take no option."""
REWRITING = "nftables"  # the only kind that can: the others turn the option off where it is made


def ship(kind: str) -> int:
    """Print the configuration of that shipper."""
    print(SHIPPERS[kind](), end="")
    return exits.DRAINED


def run(kind: str, config: Config) -> int:
    """Print the set-up of that kind for what `config` asks. Exit 2 for a kind that is none or can't do it."""
    if kind not in KINDS:
        raise Exit(exits.USAGE, f"KIND: given {kind!r}; allowed: {' or '.join(KINDS)}; {' or '.join(SHIPPERS)} alone")
    _require_mode(kind, config.timestamps)
    if kind != REWRITING:
        _require_port(kind, config.port)
    print(KINDS[kind](config), end="")
    return exits.DRAINED


def _require_mode(kind: str, mode: str) -> None:
    if mode == "preserve":
        raise Exit(exits.USAGE, "--timestamps: given 'preserve'; allowed with generate: strip or rewrite (it needs no set-up)")
    if mode == "rewrite" and kind != REWRITING:
        raise Exit(
            exits.USAGE,
            f"--timestamps: given 'rewrite'; allowed with generate {kind}: strip (generate {REWRITING} can rewrite)",
        )


def _require_port(kind: str, port: int) -> None:
    """The set-up names the port, so it can't be left to the kernel."""
    if port == 0:
        raise Exit(exits.USAGE, f"--port: given '0'; allowed with generate {kind}: a port from 1 to 65535")
