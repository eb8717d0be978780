"""Attention of blocks and tiles on one device."""
