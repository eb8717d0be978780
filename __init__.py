"""Heteromesh: distributed training for heterogeneous clusters.

Names are imported when first used, so that `import heteromesh` costs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from heteromesh.comm.gradients.reducer import GradientReducer
    from heteromesh.comm.world import World, join_world
    from heteromesh.errors import UserError
    from heteromesh.parallel.attention.api import attention, linear_attention
    from heteromesh.parallel.state.owner import Replicated
    from heteromesh.parallel.state.sharded import Sharded
    from heteromesh.parallel.state.sharded_weights import ShardedWeights
    from heteromesh.planner.sequences.step import plan_step
    from heteromesh.runtime.config import TrainerConfig
    from heteromesh.runtime.engine.executor import StepExecutor
    from heteromesh.runtime.engine.layer_major import LayerMajor
    from heteromesh.runtime.engine.passes import PassMajor
    from heteromesh.runtime.hooks.api import Hook, StepCommitted, TrainingReport
    from heteromesh.runtime.process.environment import is_first
    from heteromesh.runtime.trainer import Trainer
    from heteromesh.runtime.training.planned_steps import planned_steps
    from heteromesh.runtime.work.reader import Reader

__version__ = "0.1.0"
__all__ = [
    "GradientReducer",
    "Hook",
    "LayerMajor",
    "PassMajor",
    "Reader",
    "Replicated",
    "Sharded",
    "ShardedWeights",
    "StepCommitted",
    "StepExecutor",
    "Trainer",
    "TrainerConfig",
    "TrainingReport",
    "UserError",
    "World",
    "attention",
    "is_first",
    "join_world",
    "linear_attention",
    "plan_step",
    "planned_steps",
]

_HOME = {
    "GradientReducer": "heteromesh.comm.gradients.reducer",
    "Hook": "heteromesh.runtime.hooks.api",
    "LayerMajor": "heteromesh.runtime.engine.layer_major",
    "PassMajor": "heteromesh.runtime.engine.passes",
    "Reader": "heteromesh.runtime.work.reader",
    "Replicated": "heteromesh.parallel.state.owner",
    "Sharded": "heteromesh.parallel.state.sharded",
    "ShardedWeights": "heteromesh.parallel.state.sharded_weights",
    "StepCommitted": "heteromesh.runtime.hooks.api",
    "StepExecutor": "heteromesh.runtime.engine.executor",
    "Trainer": "heteromesh.runtime.trainer",
    "TrainerConfig": "heteromesh.runtime.config",
    "TrainingReport": "heteromesh.runtime.hooks.api",
    "UserError": "heteromesh.errors",
    "World": "heteromesh.comm.world",
    "attention": "heteromesh.parallel.attention.api",
    "is_first": "heteromesh.runtime.process.environment",
    "join_world": "heteromesh.comm.world",
    "linear_attention": "heteromesh.parallel.attention.api",
    "plan_step": "heteromesh.planner.sequences.step",
    "planned_steps": "heteromesh.runtime.training.planned_steps",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'heteromesh' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
