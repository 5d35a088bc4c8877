"""The configuration: options, how a file becomes them, what is wrong with it."""
