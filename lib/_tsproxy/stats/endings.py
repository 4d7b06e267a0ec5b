"""The ways a connection ends: a word for people, HAProxy's two letters for those who know them."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple


class Ending(IntEnum):
    """Why a connection ended; the number travels in the record."""

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


class Words(NamedTuple):
    """How an ending reads in a `connection` line."""

    reason: str
    termination_state: str
    level: str = "info"


# termination_state: HAProxy's configuration manual, 8.5 "Session state at disconnection", first two letters; where the
# manual leaves it open, what HAProxy 2.6 logs in TCP mode for the same event (tests/test_termination_codes.py).
WORDS = {
    Ending.CLOSED: Words("closed", "--"),
    Ending.CLIENT_RESET: Words("client_reset", "CD"),
    Ending.SERVER_RESET: Words("server_reset", "SD"),
    # No ACK within --user-timeout or to the keepalive probes: the socket fails, as by a reset (c and s: the proxy's own clock).
    Ending.CLIENT_TIMEOUT: Words("client_timeout", "CD"),
    Ending.SERVER_TIMEOUT: Words("server_timeout", "SD"),
    Ending.CLIENT_IDLE: Words("idle_timeout", "cD"),
    Ending.SERVER_IDLE: Words("idle_timeout", "sD"),
    Ending.CLIENT_HALF_CLOSED: Words("half_close_timeout", "cD"),
    Ending.SERVER_HALF_CLOSED: Words("half_close_timeout", "sD"),
    Ending.CONNECT_REFUSED: Words("connect_refused", "SC", "warning"),
    Ending.CONNECT_TIMEOUT: Words("connect_timeout", "sC", "warning"),
    Ending.CONNECT_FAILED: Words("connect_failed", "SC", "warning"),
    Ending.CLIENT_LEFT: Words("client_left", "CD"),
    Ending.NO_DESCRIPTORS: Words("no_descriptors", "RC", "error"),
    Ending.NO_PORTS: Words("no_ports", "RC", "error"),
    Ending.DRAIN: Words("drain", "KD", "warning"),
    Ending.POLICY: Words("policy", "PR", "error"),
    Ending.BUG: Words("internal_error", "ID", "error"),
    Ending.DRAIN_CONNECTING: Words("drain", "KC", "warning"),
    Ending.POLICY_DRIFT: Words("policy_drift", "PD", "error"),
    Ending.BUG_CONNECTING: Words("internal_error", "IC", "error"),
}

# What may end a connection in either phase has a code for each.
WHILE_CONNECTING = {
    Ending.DRAIN: Ending.DRAIN_CONNECTING,
    Ending.BUG: Ending.BUG_CONNECTING,
}
