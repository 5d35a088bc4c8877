"""One replica's slot: what it is for, how it is, its processes."""
