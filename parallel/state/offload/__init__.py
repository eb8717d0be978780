"""Optimizer state outside the device: subgroups on host memory and disk, updated on host and device at the same time."""
