"""Control messages between members and the coordinator."""
