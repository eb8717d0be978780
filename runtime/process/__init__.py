"""This process: its environment, peers, signals and how it fails."""
