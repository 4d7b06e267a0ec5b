"""What the command line can ask for, one file a command."""
