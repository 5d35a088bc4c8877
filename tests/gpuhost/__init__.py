"""What only a host with real GPUs can show: see ``__main__``."""
