"""What is slow or stuck and why, from the members' reports."""
