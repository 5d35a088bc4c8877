"""A host and an engine without a GPU."""
