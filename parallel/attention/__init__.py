"""Sequence-parallel attention: one module a method."""
