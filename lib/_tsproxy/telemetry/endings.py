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


class Words(NamedTuple):
    """How an ending reads in a `connection` line."""

    reason: str
    termination_state: str
    level: str = "info"


# termination_state: HAProxy's management guide, "Session state at disconnection", first two letters.
WORDS = {
    Ending.CLOSED: Words("closed", "--"),
    Ending.CLIENT_RESET: Words("client_reset", "CD"),
    Ending.SERVER_RESET: Words("server_reset", "SD"),
    # No ACK within --user-timeout or the keepalive probes: ETIMEDOUT on an established connection.
    Ending.CLIENT_TIMEOUT: Words("client_timeout", "cD"),
    Ending.SERVER_TIMEOUT: Words("server_timeout", "sD"),
    Ending.CLIENT_IDLE: Words("idle_timeout", "cD"),
    Ending.SERVER_IDLE: Words("idle_timeout", "sD"),
    Ending.CLIENT_HALF_CLOSED: Words("half_close_timeout", "cD"),
    Ending.SERVER_HALF_CLOSED: Words("half_close_timeout", "sD"),
    Ending.CONNECT_REFUSED: Words("connect_refused", "SC", "warning"),
    Ending.CONNECT_TIMEOUT: Words("connect_timeout", "sC", "warning"),
    Ending.CONNECT_FAILED: Words("connect_failed", "SC", "warning"),
    Ending.CLIENT_LEFT: Words("client_left", "CC"),
    Ending.NO_DESCRIPTORS: Words("no_descriptors", "RC", "error"),
    Ending.NO_PORTS: Words("no_ports", "RC", "error"),
    Ending.DRAIN: Words("drain", "KD", "warning"),
    Ending.POLICY: Words("policy", "PC", "error"),
    Ending.BUG: Words("internal_error", "ID", "error"),
}
