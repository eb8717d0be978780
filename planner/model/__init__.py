"""Models, sequence lengths and measured constants."""
