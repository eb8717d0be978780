"""Collectives of uneven owners: schedules, the engine that moves them, and torch's own where those are used."""
