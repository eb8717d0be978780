"""A job's memory: what the ranks have, what the model takes, and whether its weights must be sharded."""
