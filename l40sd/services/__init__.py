"""The running parts: each owns one piece of mutable state and one task."""
