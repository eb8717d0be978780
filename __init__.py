"""Heteromesh: distributed training for heterogeneous clusters.

Names are imported when first used, so that `import heteromesh` costs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from heteromesh.errors import UserError
    from heteromesh.parallel.attention.api import attention, linear_attention
    from heteromesh.planner.sequences.step import plan_step
    from heteromesh.runtime.config import TrainerConfig
    from heteromesh.runtime.engine.executor import StepExecutor
    from heteromesh.runtime.hooks.api import Hook, StepCommitted, TrainingReport
    from heteromesh.runtime.trainer import Trainer

__version__ = "0.1.0"
__all__ = [
    "Hook",
    "StepCommitted",
    "StepExecutor",
    "Trainer",
    "TrainerConfig",
    "TrainingReport",
    "UserError",
    "attention",
    "linear_attention",
    "plan_step",
]

_HOME = {
    "Hook": "heteromesh.runtime.hooks.api",
    "StepCommitted": "heteromesh.runtime.hooks.api",
    "StepExecutor": "heteromesh.runtime.engine.executor",
    "Trainer": "heteromesh.runtime.trainer",
    "TrainerConfig": "heteromesh.runtime.config",
    "TrainingReport": "heteromesh.runtime.hooks.api",
    "UserError": "heteromesh.errors",
    "attention": "heteromesh.parallel.attention.api",
    "linear_attention": "heteromesh.parallel.attention.api",
    "plan_step": "heteromesh.planner.sequences.step",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'heteromesh' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
