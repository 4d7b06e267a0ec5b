"""Counters, records and the one reporter that turns them into JSON lines. Knows no sockets."""
