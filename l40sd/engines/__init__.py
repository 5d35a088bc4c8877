"""What is known of each engine, and what exactly is run."""
