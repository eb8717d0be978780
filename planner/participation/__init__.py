"""Which ranks take part in a job, and how they hold its weights: decided by a whole step's seconds."""
