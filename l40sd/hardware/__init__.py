"""The host: GPUs, how they are linked, what is on them."""
