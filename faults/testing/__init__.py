"""Faults injected on purpose, and checkers of what follows."""
