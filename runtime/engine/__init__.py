"""Executes passes, and measures what they cost."""
