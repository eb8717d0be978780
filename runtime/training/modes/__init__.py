"""How a job whose ranks stay can train: the whole model on every rank, layer by layer, or in pipeline stages."""
