"""net.ipv4.tcp_timestamps of this network namespace, through one descriptor that stays open.

/proc/sys/net has the values of the namespace of the process that opens it, and the open file stays with that namespace. The
kernel reads the value for each SYN that it sends, over IPv6 too (tcp_syn_options() in net/ipv4/tcp_output.c): 0 no TSopt; 1
with a random offset for each connection; 2 and more without an offset (Documentation/networking/ip-sysctl.rst).
"""

from __future__ import annotations

import os

PATH = "/proc/sys/net/ipv4/tcp_timestamps"


class Sysctl:
    """The descriptor. One pread(2) of a few bytes for each read."""

    def __init__(self, path: str = PATH) -> None:
        """OSError if /proc is not mounted or not readable."""
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def value(self) -> int:
        """The value now. OSError as pread(2) raises it; ValueError if it is no number."""
        return int(os.pread(self._fd, 16, 0))

    def is_zero(self) -> bool:
        """Whether the value is 0 now; False if it can't be read. Cheaper than value(): it is called twice for a connection."""
        try:
            return os.pread(self._fd, 4, 0) == b"0\n"
        except OSError:
            return False

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._fd)
