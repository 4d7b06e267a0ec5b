"""`generate KIND`: the one-time set-up that makes the policy hold, or what ships the lines, as text to read, load and undo."""

from __future__ import annotations

from functools import partial
from typing import Callable, Mapping, Optional

from _tsproxy.cli import exits
from _tsproxy.cli.config import Config, Route
from _tsproxy.cli.exits import Exit
from _tsproxy.tools.generate import completion, fields, man, prometheus, setups, shippers

KINDS: Mapping[str, Callable[[Config, Route], str]] = {
    "nftables": setups.nftables,
    "netns": setups.netns,
    "systemd": setups.systemd,
    "docker": setups.docker,
    "kubernetes": setups.kubernetes,
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
REWRITING = "nftables"  # the only kind that can: the others turn the option off where it is made


def without_options(chosen: Mapping[str, object], manual: str) -> int:
    """Print what takes no option: that one of ALONE that is true in docopt's dictionary."""
    kind = next(kind for kind in ALONE if chosen[kind])
    print(SHIPPERS[kind]() if kind in SHIPPERS else FROM_MANUAL[kind](manual), end="")
    return exits.DRAINED


def run(kind: str, config: Config) -> int:
    """Print the set-up of that kind for what `config` asks. Exit 2 for a kind that is none or can't do it."""
    if kind not in KINDS:
        raise Exit(exits.USAGE, f"KIND: given {kind!r}; allowed: {' or '.join(KINDS)}; {' or '.join(ALONE)} alone")
    (route,) = config.routes
    _require_mode(kind, route.timestamps)
    if kind != REWRITING:
        _require_port(kind, route.port)
        _require_no_interface(kind, route.interface)
    print(KINDS[kind](config, route), end="")
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


def _require_no_interface(kind: str, interface: Optional[str]) -> None:
    """In a namespace of its own tsproxy has other interfaces than this host's."""
    if interface is not None:
        allowed = f"none (it is in a namespace of its own; generate {REWRITING} leaves it where the interface is)"
        raise Exit(exits.USAGE, f"--interface: given {interface!r}; allowed with generate {kind}: {allowed}")
