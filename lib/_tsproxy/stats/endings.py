"""Why a session ended, and how its `connection` line names that: `reason`, HAProxy's termination state, the level."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple


class Ending(IntEnum):
    """Why a session ended. The record has it as this number."""

    CLOSED = 0
    CLIENT_RESET = 1
    SERVER_RESET = 2
    CLIENT_TIMEOUT = 3
    SERVER_TIMEOUT = 4
    CLIENT_IDLE = 5
    SERVER_IDLE = 6
    CLIENT_HALF_CLOSED = 7
    SERVER_HALF_CLOSED = 8
    CONNECT_REFUSED = 9
    CONNECT_TIMEOUT = 10
    CONNECT_FAILED = 11
    CLIENT_LEFT = 12
    NO_DESCRIPTORS = 13
    NO_PORTS = 14
    DRAIN = 15
    POLICY = 16
    BUG = 17
    DRAIN_CONNECTING = 18
    POLICY_DRIFT = 19
    BUG_CONNECTING = 20


class EndingFields(NamedTuple):
    """The fields of a `connection` line that an ending decides."""

    reason: str
    termination_state: str
    level: str = "info"


# termination_state: HAProxy's configuration manual, 8.5 "Session state at disconnection", first two letters; where the
# manual leaves it open, what HAProxy 2.6 logs in TCP mode for the same event (tests/root/test_termination_codes.py).
ENDING_FIELDS = {
    Ending.CLOSED: EndingFields("closed", "--"),
    Ending.CLIENT_RESET: EndingFields("client_reset", "CD"),
    Ending.SERVER_RESET: EndingFields("server_reset", "SD"),
    # No ACK within --user-timeout or to keepalive probes: the socket fails as by a reset. c and s are the proxy's own timeouts.
    Ending.CLIENT_TIMEOUT: EndingFields("client_timeout", "CD"),
    Ending.SERVER_TIMEOUT: EndingFields("server_timeout", "SD"),
    Ending.CLIENT_IDLE: EndingFields("idle_timeout", "cD"),
    Ending.SERVER_IDLE: EndingFields("idle_timeout", "sD"),
    Ending.CLIENT_HALF_CLOSED: EndingFields("half_close_timeout", "cD"),
    Ending.SERVER_HALF_CLOSED: EndingFields("half_close_timeout", "sD"),
    Ending.CONNECT_REFUSED: EndingFields("connect_refused", "SC", "warning"),
    Ending.CONNECT_TIMEOUT: EndingFields("connect_timeout", "sC", "warning"),
    Ending.CONNECT_FAILED: EndingFields("connect_failed", "SC", "warning"),
    Ending.CLIENT_LEFT: EndingFields("client_left", "CD"),
    Ending.NO_DESCRIPTORS: EndingFields("no_descriptors", "RC", "error"),
    Ending.NO_PORTS: EndingFields("no_ports", "RC", "error"),
    Ending.DRAIN: EndingFields("drain", "KD", "warning"),
    Ending.POLICY: EndingFields("policy", "PR", "error"),
    Ending.BUG: EndingFields("internal_error", "ID", "error"),
    Ending.DRAIN_CONNECTING: EndingFields("drain", "KC", "warning"),
    Ending.POLICY_DRIFT: EndingFields("policy_drift", "PD", "error"),
    Ending.BUG_CONNECTING: EndingFields("internal_error", "IC", "error"),
}

# Endings that can happen in either phase have a termination state for each.
WHILE_CONNECTING = {
    Ending.DRAIN: Ending.DRAIN_CONNECTING,
    Ending.BUG: Ending.BUG_CONNECTING,
}
