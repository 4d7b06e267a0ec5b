"""Counters, records, and the reporter thread that writes them as JSON lines. Knows no sockets."""
