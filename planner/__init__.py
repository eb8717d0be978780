"""Cluster, model and cost descriptions, solvers and plans. Pure Python, numpy and PuLP: never torch."""
