"""What is true of TCP timestamps on this host, and what may be relayed because of it. Knows no relay."""
