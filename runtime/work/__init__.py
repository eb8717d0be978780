"""Batches, their plans and their tensors, ahead of the loop."""
