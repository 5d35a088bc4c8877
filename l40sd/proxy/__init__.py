"""A client's request, from its first byte to the last of its reply."""
