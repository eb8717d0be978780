"""The run directory: metrics, plans, traces and checkpoints."""
