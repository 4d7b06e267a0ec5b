"""The command line: arguments into options, options into one frozen Config; the exit codes. Knows nothing of their use."""
