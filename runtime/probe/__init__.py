"""Measures devices, links and NICs, and fits the cost model."""
