"""Pipeline stages of unequal layers."""
