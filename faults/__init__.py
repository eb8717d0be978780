"""Membership, gradient codes and straggler policies, diagnosis, recovery, fault injection."""
