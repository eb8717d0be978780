"""One connection over several NICs of a host."""
