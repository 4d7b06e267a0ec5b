"""The fields of the `start` line: version, addresses, policy, runtime, and the knobs and limits that took effect.

Knows names and order of the fields. Knows nothing of how the values came about.
"""

from __future__ import annotations

import platform
from typing import Any, Dict, List, Mapping, Sequence

import _tsproxy
from _tsproxy.cli.config import Config, Route, compact
from _tsproxy.linux.addresses import from_sockaddr
from _tsproxy.proxy import pipes
from _tsproxy.stats import encoder
from _tsproxy.supervisor.startup import Prepared, PreparedRoute


def fields(prepared: Prepared, wakeup: str) -> Dict[str, Any]:
    """Flat, but for lists of short texts. `wakeup`: eventfd or pipe. With a file of routes each has a line of its own."""
    config = prepared.shared.config
    version = {"version": _tsproxy.__version__}
    of_process = {
        "workers": config.workers,
        "runtime": config.runtime,
        "python": platform.python_version(),
        "json_encoder": encoder.ENCODER,
    }
    if config.routes_file:
        listening = _listening(prepared.routes) if len(prepared.routes) == 1 else _NOWHERE
        knobs, limits = _knobs_of_process(config, wakeup), _limits_of_process(config, prepared.nofile)
        return {**version, "routes": len(prepared.routes), **listening, **of_process, **_lists(knobs, limits)}
    (of_route,) = prepared.routes
    knobs = {**_knobs_of_process(config, wakeup), **_knobs(of_route.route)}
    limits = {**_limits(of_route.route), **_limits_of_process(config, prepared.nofile)}
    return {**version, **_listening(prepared.routes), **_asked(config, of_route), **of_process, **_lists(knobs, limits)}


def of_route(config: Config, prepared: PreparedRoute) -> Dict[str, Any]:
    """The fields of a `route` line, which says that clients of this route are served."""
    route = prepared.route
    return {
        "route": route.name,
        **_listening([prepared]),
        **_asked(config, prepared),
        **_lists(_knobs(route), _limits(route)),
    }


_NOWHERE = {"listen_address": None, "listen_port": None}


def _listening(several: Sequence[PreparedRoute]) -> Dict[str, Any]:
    listeners = [listener for prepared in several for listener in prepared.listeners]
    addresses = [from_sockaddr(listener.family, listener.getsockname()) for listener in listeners]
    return {
        "listen_address": addresses[0].ip,
        "listen_port": addresses[0].port,
        "listeners": [str(address) for address in addresses],
    }


def _asked(config: Config, prepared: PreparedRoute) -> Dict[str, Any]:
    return {
        "targets": [str(target) for target in prepared.route.targets],
        "upstream_addresses": [str(upstream) for upstream in prepared.resolver.addresses],
        "timestamps": prepared.route.timestamps,
        "static_timestamp": config.static_timestamp,
        "witness": prepared.args.lever.label,
    }


def _lists(knobs: Mapping[str, object], limits: Mapping[str, object]) -> Dict[str, List[str]]:
    """As name=value; knobs only those that took effect."""
    return {
        "knobs": [f"{name}={value}" for name, value in knobs.items() if value],
        "limits": [f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in limits.items()],
    }


def _knobs_of_process(config: Config, wakeup: str) -> Dict[str, object]:
    return {
        "wakeup": wakeup,
        "busy_poll_us": config.busy_poll_us,
        "cpus": compact(config.cpus),
        "reuse_port": int(config.reuse_port),
        "user": config.user,
    }


def _knobs(route: Route) -> Dict[str, object]:
    return {
        "tcp_nodelay": 1,
        "tcp_save_syn": 1,
        "keepalive_s": route.keepalive_s,
        "user_timeout_ms": route.user_timeout_ms,
        "buffer_size": route.buffer_size,
        "zero_copy": "splice" if route.zero_copy == "auto" and pipes.HAS_SPLICE else "",
        "sources": ",".join(route.sources),
        "interface": route.interface,
        "dscp": route.dscp,
        "allow": ",".join(map(str, route.allow)),
        "segments_warning": route.segments_warning,
    }


def _limits(route: Route) -> Dict[str, object]:
    return {
        "max_connections": route.max_connections,
        "max_connections_per_client": route.max_connections_per_client,
        "on_full": route.on_full,
        "connect_timeout_s": route.connect_timeout_s,
        "idle_timeout_s": route.idle_timeout_s,
        "half_close_timeout_s": route.half_close_timeout_s,
    }


def _limits_of_process(config: Config, nofile: int) -> Dict[str, object]:
    return {"nofile": nofile, "drain_timeout_s": config.drain_timeout_s}
