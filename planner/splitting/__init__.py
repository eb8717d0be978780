"""What each method of splitting a sequence sends and computes."""
