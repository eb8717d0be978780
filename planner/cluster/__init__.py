"""Hosts, devices, NICs and the links between them."""
