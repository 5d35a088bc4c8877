"""l40sd: runs a multi-GPU PCIe host as an inference service."""

__version__ = "0.1.0"
