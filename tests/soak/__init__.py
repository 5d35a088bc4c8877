"""Long runs over real processes: random operations, random kills of the daemon, connections without end."""
