"""What is wanted, and the way there."""
