"""l40sctl, the command line."""
