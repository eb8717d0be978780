"""Finds and uses the NICs of this host."""
