"""The event loop: descriptors, timers, deferred close. Knows nothing of what its handlers do."""
