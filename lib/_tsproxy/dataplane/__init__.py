"""The data path: workers, relays, buffers, inboxes. Moves bytes; knows nothing of timestamps or of standard output."""
