"""A tiny training job: random sequences and a tiny Llama."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

import heteromesh as hm
from llama import Llama
from steps import TINY

DATA = [[random.Random(i).randrange(TINY.vocab) for _ in range(2 + (i * 37) % 90)] for i in range(60)]


def gather_costs(tokens_per_device: int) -> str:
    """Returns a cost file, in which long sequences are split by gathering keys."""
    return f"""
seconds_per_token2 = 1e-7
seconds_per_token = 1e-4
seconds_per_pass = 1e-4
bytes_per_token = 2048
tokens_per_device = {tokens_per_device}
method = "gather"
[bytes_per_second]
2 = 1e9
"""


def make_trainer(folder: Path, model: torch.nn.Module | None = None, data: Any = None, **changes: Any) -> hm.Trainer:
    torch.manual_seed(7)
    options = {"batch_tokens": 220, "max_steps": 20, "run_dir": folder, "learning_rate": 3e-3, "plan_seconds": 0.02}
    data = [torch.tensor(s) for s in DATA] if data is None else data
    return hm.Trainer(model or Llama(TINY), None, data, hm.TrainerConfig(**(options | changes)))
