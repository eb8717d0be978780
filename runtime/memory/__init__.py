"""A job's memory: what the ranks have, what the model takes, whether its weights must be sharded, and what it came to."""
