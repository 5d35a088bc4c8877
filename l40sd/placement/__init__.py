"""Which GPUs, CPUs and memory each replica gets."""
