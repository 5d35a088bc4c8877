"""The control socket: what operators ask, and what they are told."""
