"""Who reduces which share of the gradients."""
