"""What happens around steps: printing, records, checkpoints, cost learning; and the hooks of users."""
