"""The kernel's interfaces: constants, sockets, addresses, wake-ups, limits, namespaces. Knows nothing of relaying."""
