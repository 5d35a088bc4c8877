"""Measurements of l40sd's own parts."""
