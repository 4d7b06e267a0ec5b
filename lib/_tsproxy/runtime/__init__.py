"""How workers are started, watched and replaced: threads, interpreters or processes, behind one kind of seat."""
