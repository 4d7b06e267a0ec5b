"""What the host gives: Linux numbers, sockets, addresses, wake-ups, limits. Knows nothing of relaying."""
