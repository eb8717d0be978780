"""Whether a cluster file's measured costs are for the model at hand."""

from __future__ import annotations

import torch

from heteromesh.planner.cluster.cluster import Cluster
from heteromesh.planner.cost.measured import measured_costs
from heteromesh.planner.cost.passes import Costs
from heteromesh.runtime.engine.calibrate import ObservedAttention
from heteromesh.runtime.engine.executor import StepExecutor

TOLERANCE = 0.02
"""Of the number of parameters: biases and norms differ between models of one shape."""


def known_costs(
    cluster: Cluster, executor: StepExecutor, shape: ObservedAttention | None, autocast: torch.dtype | None
) -> Costs | None:
    """Returns the file's costs where they are for this shape and dtype; shape: of the executor's attention."""
    model = cluster.measured.model
    if model is None or shape is None or executor.forwards != 1 or autocast is torch.float16:
        return None
    parameters = list(executor.model.parameters())
    count = sum(p.numel() for p in parameters)
    half = any(p.dtype is torch.bfloat16 for p in parameters) or autocast is torch.bfloat16
    same = (
        (shape.calls, shape.heads, shape.kv_heads, shape.dim)
        == (model.layers, model.heads, model.kv_heads, model.head_dim)
        and abs(count / model.parameters - 1) <= TOLERANCE
        and model.dtype == ("bf16" if half else "fp32")
    )
    return measured_costs(cluster) if same else None
