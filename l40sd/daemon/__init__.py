"""The process l40sd: from the command line to its end."""
