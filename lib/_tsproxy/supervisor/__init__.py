"""The main thread: start-up, worker pool, fork server, resolver, drift, watchdog, drain. Relays nothing itself."""
