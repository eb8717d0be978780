"""The hosts of a cluster file as network namespaces on one Linux machine."""
