"""One module for each outside thing: translate and nothing else."""
