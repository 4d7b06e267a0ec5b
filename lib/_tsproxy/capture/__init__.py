"""What a network carried: frames from capture files and packet sockets, and the TCP headers in them down to TSopt."""
