"""The main thread: bind, accept, hand over, resolve, drain. Relays nothing itself."""
