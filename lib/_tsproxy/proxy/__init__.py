"""The data path: listener, acceptor, session, direction, inbox, worker. Moves bytes; knows nothing of timestamps."""
