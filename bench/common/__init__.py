"""What the benchmarks stand on: where things run, what relays there are, the load, the figures, how they are shown."""
