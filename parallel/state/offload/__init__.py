"""Optimizer state outside the device: in host memory and on disk, updated on host and device at the same time."""
