"""The time namespace (time_namespaces(7)): how far our CLOCK_MONOTONIC is ahead of the one that the kernel's TCP reads."""

from __future__ import annotations

PATH = "/proc/self/timens_offsets"


def monotonic_shift_ns() -> int:
    """The shift in nanoseconds; 0 outside a time namespace and on kernels that have none."""
    try:
        with open(PATH, encoding="utf-8") as offsets:
            for line in offsets:
                clock, seconds, nanoseconds = line.split()
                if clock == "monotonic":
                    return int(seconds) * 1_000_000_000 + int(nanoseconds)
    except OSError:
        pass  # before Linux 5.5 there are no time namespaces
    return 0
