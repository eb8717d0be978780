"""Who holds which range of parameters and optimizer state."""
