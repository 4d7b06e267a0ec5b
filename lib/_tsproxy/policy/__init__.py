"""Whether the timestamp policy holds on this host, and so which sessions may connect and relay. Knows no sessions."""
