"""A whole plan: made, checked, explained and played."""
