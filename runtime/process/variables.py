"""Environment variables by which `heteromesh run` and the sandbox tell a script's Trainer what to do."""

from __future__ import annotations

CLUSTER_VARIABLE, PLAN_VARIABLE = "HETEROMESH_CLUSTER", "HETEROMESH_PLAN"
"""Paths of the cluster and the plan file."""
DRY_RUN_VARIABLE = "HETEROMESH_DRY_RUN"
"""Number of ranks to plan for; set by `heteromesh run --dry-run`."""
