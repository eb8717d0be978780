"""Trainer, launcher, command line, data, checkpoints, metrics and traces."""
