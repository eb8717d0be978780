"""Authenticated TCP connections between ranks that can be aborted, and sums over them."""
