"""The fields of the `start` line: version, addresses, policy, runtime, and the knobs and limits that took effect.

Knows names and order of the fields. Knows nothing of how the values came about.
"""

from __future__ import annotations

import platform
from typing import Any, Dict, List, Tuple

import _tsproxy
from _tsproxy.cli.config import Config, Route, compact
from _tsproxy.linux.addresses import from_sockaddr
from _tsproxy.proxy import pipes
from _tsproxy.stats import encoder
from _tsproxy.supervisor.startup import Prepared


def fields(prepared: Prepared, wakeup: str) -> Dict[str, Any]:
    """Flat, but for lists of short texts. `wakeup`: eventfd or pipe."""
    config = prepared.shared.config
    (route,) = config.routes
    addresses = [from_sockaddr(listener.family, listener.getsockname()) for listener in prepared.listeners]
    return {
        "version": _tsproxy.__version__,
        "listen_address": addresses[0].ip,
        "listen_port": addresses[0].port,
        "listeners": [str(address) for address in addresses],
        "targets": [str(target) for target in route.targets],
        "upstream_addresses": [str(upstream) for upstream in prepared.resolver.addresses],
        "timestamps": route.timestamps,
        "static_timestamp": config.static_timestamp,
        "witness": prepared.shared.lever.label,
        "workers": config.workers,
        "runtime": config.runtime,
        "python": platform.python_version(),
        "json_encoder": encoder.ENCODER,
        "knobs": _knobs(config, route, wakeup),
        "limits": _limits(config, route, prepared.nofile),
    }


def _knobs(config: Config, route: Route, wakeup: str) -> List[str]:
    """What took effect, as name=value."""
    values: Dict[str, object] = {
        "wakeup": wakeup,
        "tcp_nodelay": 1,
        "tcp_save_syn": 1,
        "keepalive_s": route.keepalive_s,
        "user_timeout_ms": route.user_timeout_ms,
        "buffer_size": route.buffer_size,
        "zero_copy": "splice" if route.zero_copy == "auto" and pipes.HAS_SPLICE else "",
        "busy_poll_us": config.busy_poll_us,
        "cpus": compact(config.cpus),
        "sources": ",".join(route.sources),
        "interface": route.interface,
        "dscp": route.dscp,
        "allow": ",".join(map(str, route.allow)),
        "reuse_port": int(config.reuse_port),
        "user": config.user,
    }
    return [f"{name}={value}" for name, value in values.items() if value]


def _limits(config: Config, route: Route, nofile: int) -> List[str]:
    values: Tuple[Tuple[str, object], ...] = (
        ("max_connections", route.max_connections),
        ("max_connections_per_client", route.max_connections_per_client),
        ("on_full", route.on_full),
        ("nofile", nofile),
        ("connect_timeout_s", route.connect_timeout_s),
        ("idle_timeout_s", route.idle_timeout_s),
        ("half_close_timeout_s", route.half_close_timeout_s),
        ("drain_timeout_s", config.drain_timeout_s),
    )
    return [f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in values]
