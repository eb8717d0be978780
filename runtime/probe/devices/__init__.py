"""What this rank's device is and how fast it computes."""
