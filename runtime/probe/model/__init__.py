"""What a model costs on these devices."""
