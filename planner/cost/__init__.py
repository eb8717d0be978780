"""What a pass costs on any set of ranks."""
