"""A member of a job: its group, atomic commits, and the state that joiners get."""
