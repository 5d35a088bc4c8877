"""Who may receive requests, and who gets the next."""
