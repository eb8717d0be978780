"""The sum of gradients over the ranks, in buckets, while the last backward runs."""
