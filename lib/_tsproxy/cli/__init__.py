"""Words into options, options into one frozen Config; the exit codes. Knows nothing of what is done with them."""
